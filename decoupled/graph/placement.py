"""Placement: which worker hosts which node; by hand, or balanced by measured cost.

    costs = measure(graph, instances)            seconds per instance and node, forward and backward
    balance(graph, costs, workers=2)             {"embed": 0, "recurrent": 1, ...}

Heavy nodes are dealt out first, each to the worker with the least to do; light ones go where their neighbours are, so
that their messages need not leave a worker, unless that one has its fair share already.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence

from decoupled.errors import UserError, nearest
from decoupled.graph.build import Input, NodeGraph
from decoupled.graph.execute import execute
from decoupled.graph.instance import Instance
from decoupled.runtime.contract import intra_op_threads

LIGHT = 0.1  # of a worker's fair share: what costs less follows its neighbours


def measure(graph: NodeGraph, instances: Sequence[Instance], rounds: int = 3) -> dict[str, float]:
    """Seconds per instance at every node but the inputs, on one thread: the least of some rounds.

    The graph itself is not touched.
    """
    trial = copy.deepcopy(graph)
    with intra_op_threads(1):
        found: list[dict[str, float]] = [execute(trial, instances).seconds for _ in range(rounds + 1)][1:]
    names = [name for name, node in graph.nodes.items() if not isinstance(node, Input)]
    return {name: min(one.get(name, 0.0) for one in found) / max(1, len(instances)) for name in names}


def balance(graph: NodeGraph, costs: Mapping[str, float], workers: int) -> dict[str, int]:
    """Node -> number of its worker; node -> cost in any unit."""
    share = sum(costs.values()) / workers
    heavy = sorted((n for n in costs if costs[n] > LIGHT * share), key=lambda n: -costs[n])
    load, places = [0.0] * workers, dict[str, int]()

    def put(name: str, worker: int) -> None:
        places[name] = worker
        load[worker] += costs[name]

    neighbours: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for source, _, target, _ in graph.edges():
        neighbours[source].append(target)
        neighbours[target].append(source)
    for name in heavy:
        put(name, load.index(min(load)))
    waiting = [name for name in costs if name not in places]
    while waiting:  # those with a placed neighbour first
        name = next((n for n in waiting if any(m in places for m in neighbours[n])), waiting[0])
        waiting.remove(name)
        near = Counter(places[m] for m in neighbours[name] if m in places)
        put(name, max(range(workers), key=lambda w: (load[w] < share, near[w], -load[w])))
    return places


def by_hand(graph: NodeGraph, given: Mapping[str, int]) -> dict[str, int]:
    """A placement that a user wrote, checked; nodes it leaves out go to worker 0.

    Raises:
        UserError: an unknown node, or numbers of workers with gaps.
    """
    names = [name for name, node in graph.nodes.items() if not isinstance(node, Input)]
    for name in given:
        if name not in names:
            raise UserError(f"workers places node {name!r}, which the graph has not.{nearest(name, names)}")
    places = {name: given.get(name, 0) for name in names}
    if sorted(set(places.values())) != list(range(max(places.values()) + 1)):
        raise UserError(f"workers are numbered 0, 1, ... without gaps, got {sorted(set(places.values()))}")
    return places
