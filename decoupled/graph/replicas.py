"""Replicas of a bottleneck: copies with own weights and updates, each for its share of the instances.

    before    a --> node --> b
    after     a --> route (by instance) --> node, node_2, ... --> phi --> b

At the end of every epoch all copies get the mean of their weights; their optimizers keep their own moments.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from decoupled.graph.build import NodeGraph, Wire
from decoupled.graph.routing import Cond, Phi
from decoupled.graph.transform import PPT


def replicate(graph: NodeGraph, replicas: Mapping[str, int]) -> None:
    """Put `replicas[name]` copies in the place of each named node, once; `graph.replicas` says what stands for what."""
    for name, count in replicas.items():
        node = graph.nodes.get(name)
        if isinstance(node, PPT) and count > 1 and name not in graph.replicas:
            graph.replicas[name] = _replace(graph.check(), node, count)
            graph.check()


def _replace(graph: NodeGraph, node: PPT, count: int) -> list[str]:
    name = node.name
    before, after = graph.predecessors()[name][0], graph.targets.pop((name, 0))
    fresh = [PPT(copy.deepcopy(node.module), f"{name}_{r + 1}", node.own_muf, node.with_state) for r in range(1, count)]
    graph.targets[before] = []
    routes = Cond(partial(_route, count), count, f"{name}_route")(Wire(graph.nodes[before[0]], before[1]))
    graph.targets[routes[0].node.name, 0] = [(name, 0)]
    joined = Phi(f"{name}_join")
    wire = joined(Wire(node), *(copied(route) for copied, route in zip(fresh, routes[1:], strict=True)))
    graph.targets[wire.node.name, 0] = after
    return [name, *(copied.name for copied in fresh)]


def _route(count: int, instance: int, *position: Any) -> int:
    return instance % count


def average(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of state dicts; numbers that have no mean (counts) are those of the first."""
    first = states[0]
    return {
        name: torch.stack([state[name] for state in states]).mean(0) if value.is_floating_point() else value
        for name, value in first.items()
    }
