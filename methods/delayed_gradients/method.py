"""Delayed gradients: the gradient of the one loss at the top arrives some updates late. A grid, not a pile:

    name              order                retention                              correction
    ddg               lockstep             KeepGraph (or KeepInputAndWeights)     -
    pipedream         one_f_one_b          KeepGraph (or KeepInputAndWeights)     -
    features_replay   lockstep             KeepInput (today's weights)            -
    fdg               tick_backward_first  KeepGraph (or KeepInputAndWeights)     Shrink(beta) per hop

All: coupling Gradient, activation up, gradient down. Block k of K is D_k = K-1-k updates late (fdg: 2(K-1-k)-1).
With frozen weights (DDG, PipeDream) the gradient is exact for the weights its batch met on the way up:

    g_k = d loss(f_{K-1}(..f_0(x; w_0[v_0])..; w_{K-1}[v_{K-1}])) / d w_k,   v_j = weight version of block j at F

Sources: Huo et al. 2018 (arXiv 1804.10574), Narayanan et al. 2019 (arXiv 1806.03377), Huo et al. 2018 (Features
Replay), Zhuang et al. 2021 (Fully Decoupled Neural Network Learning Using Delayed Gradients).
"""

from __future__ import annotations

from decoupled.correction import Shrink
from decoupled.coupling import Gradient
from decoupled.method import Facts, Method, top
from decoupled.order import lockstep, one_f_one_b, tick_backward_first
from decoupled.registry import register
from decoupled.retention import KeepGraph, KeepInput, KeepInputAndWeights

ALL_LOCKS = ("forward", "backward", "update")


def _facts(backward_weights: str = "forward") -> Facts:
    return Facts(
        exact=False,
        reach=top,
        delay=lambda k, K: K - 1 - k,
        in_flight=lambda k, K: K - k,
        backward_weights=backward_weights,
        locks=ALL_LOCKS,
    )


@register("ddg")
def ddg(recompute: bool = False) -> Method:
    """Decoupled parallel backpropagation: exact gradients, K-1-k updates late."""
    return Method(Gradient(), lockstep, _facts(), KeepInputAndWeights if recompute else KeepGraph)


@register("pipedream")
def pipedream(recompute: bool = False) -> Method:
    """Asynchronous 1F1B with weight stashing."""
    return Method(Gradient(), one_f_one_b, _facts(), KeepInputAndWeights if recompute else KeepGraph)


@register("features_replay")
def features_replay() -> Method:
    """Keeps only the input; replays it with today's weights when the gradient arrives."""
    return Method(Gradient(), lockstep, _facts("current"), KeepInput)


@register("fdg")
def fdg(beta: float = 0.5, recompute: bool = False) -> Method:
    """Fully decoupled: all blocks work on different batches at once; `beta` shrinks the gradient at every hop."""
    facts = Facts(
        exact=False,
        reach=top,
        delay=lambda k, K: max(0, 2 * (K - 1 - k) - 1),
        in_flight=lambda k, K: max(1, 2 * (K - 1 - k)),
        backward_weights="forward",
        locks=ALL_LOCKS,
    )
    retention = KeepInputAndWeights if recompute else KeepGraph
    return Method(Gradient(), tick_backward_first, facts, retention, (Shrink(beta),))
