"""AMPNet: asynchronous model parallelism for networks whose control flow depends on the instance.

    instance i --messages (payload, state)--> [nodes of a static graph: loops, branches, trees] --> loss
               <--gradients, same states-----   every node with weights updates itself after `muf` gradients

    g <- g + dL_i/dw                     each answer that a node gets (w: today's weights, x: the activation of then)
    w <- w - step(g or g / muf), g <- 0  once it has had muf of them; no other node is asked or told

    max_active_keys = 1, muf = gradients of an instance     SGD, one instance at a time
    max_active_keys = N, muf = gradients of N instances     close to a minibatch of N; equal if nothing overtakes

`decoupled.graph` has the nodes, the controller and the workers; a method is how far it runs ahead.

Source: AMPNet, Gaunt et al. 2017 (arXiv 1705.09786).
"""

from __future__ import annotations

from decoupled.graph.asynchrony import Asynchrony
from decoupled.registry import register


@register("ampnet")
def ampnet(
    max_active_keys: int = 4,
    min_update_frequency: int = 1,
    combine: str = "mean",
    backward: str = "activation",
    replicas: dict | None = None,
    backward_first: bool = True,
    frequencies: dict | None = None,
    messages_per_instance: int = 10_000,
    batches: dict | None = None,
) -> Asynchrony:
    """Up to `max_active_keys` instances in the graph; nodes update after `min_update_frequency` gradients of their own.

    See `decoupled.graph.asynchrony.Asynchrony` for every option; `frequencies`, `replicas` and `batches` are by node.
    """
    return Asynchrony(
        max_active_keys, min_update_frequency, combine, backward, replicas or {}, backward_first, frequencies or {},
        messages_per_instance, batches or {},
    )  # fmt: skip
