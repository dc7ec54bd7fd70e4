"""Placement: which worker hosts which node; by hand, or balanced by measured cost.

measured = measure(graph, instances)         seconds per instance and node, messages per instance and pair of nodes
balance(graph, measured, workers=2)          {"embed": 0, "recurrent": 1, ...}

load of a worker    its nodes' costs + CROSSING seconds for every message or answer that leaves or reaches it
balanced            no move of one or two nodes makes the busiest worker less busy (as busy: fewer messages cross)
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from decoupled.errors import OperationError, ProtocolError, UserError, nearest
from decoupled.graph.build import Input, NodeGraph
from decoupled.graph.execute import Executed, execute
from decoupled.graph.instance import Instance
from decoupled.runtime.contract import intra_op_threads

CROSSING = 40e-6  # seconds of each of both workers, for a message between two threads

Places = dict[str, int]


@dataclass(frozen=True)
class Measured:
    """What an instance costs: seconds by node, and messages with their answers by pair of nodes."""

    seconds: Mapping[str, float]
    traffic: Mapping[tuple[str, str], float] = field(default_factory=dict)


def measure(graph: NodeGraph, instances: Sequence[Instance], rounds: int = 3, limit: float = float("inf")) -> Measured:
    """Per instance, for every node but the inputs, on one thread: the least of some rounds; `limit` as in `execute`.

    The graph itself is not touched.

    Raises:
        OperationError: a node failed, or the protocol was broken. UserError, StallError: as in `execute`.
    """
    trial = copy.deepcopy(graph)
    try:
        with intra_op_threads(1):
            found: list[Executed] = [execute(trial, instances, limit=limit) for _ in range(rounds + 1)][1:]
    except ProtocolError as error:
        raise OperationError("controller", "measuring", error) from error
    count = max(1, len(instances))
    seconds = {n: min(one.seconds.get(n, 0.0) for one in found) / count for n in placed(graph)}
    for copies in graph.replicas.values():  # which of them a few instances met is chance
        seconds |= dict.fromkeys(copies, sum(seconds[name] for name in copies) / len(copies))
    traffic = {pair: number / count for pair, number in found[0].traffic.items() if set(pair) <= set(seconds)}
    return Measured(seconds, traffic)


def placed(graph: NodeGraph) -> list[str]:
    """The nodes that have a worker: all but the inputs."""
    return [name for name, node in graph.nodes.items() if not isinstance(node, Input)]


def balance(graph: NodeGraph, measured: Measured, workers: int) -> Places:
    """Node -> number of its worker."""
    costs = measured.seconds
    pairs = [(a, b, measured.traffic.get((a, b), 0.0)) for a, _, b, _ in graph.edges() if a in costs and b in costs]

    def busiest(places: Places) -> tuple[float, float]:
        load = [0.0] * workers
        for name, worker in places.items():
            load[worker] += costs[name]
        cut = [(a, b, messages) for a, b, messages in pairs if places[a] != places[b]]
        for a, b, messages in cut:
            load[places[a]] += CROSSING * messages
            load[places[b]] += CROSSING * messages
        return max(load), len(cut) + sum(messages for _, _, messages in cut)

    places, load = Places(), [0.0] * workers
    for name in sorted(costs, key=lambda n: -costs[n]):  # the heaviest first, to whoever has least to do
        places[name] = load.index(min(load))
        load[places[name]] += costs[name]
    best = busiest(places)
    better = True
    while better:
        better = False
        for change in _changes(list(costs), workers):
            trial = places | change
            if (found := busiest(trial)) < best:
                places, best, better = trial, found, True
    return places


def _changes(names: Sequence[str], workers: int) -> Iterator[Places]:
    """Every new place for one node, and for two."""
    for count in (1, 2):
        for some in itertools.combinations(names, count):
            for where in itertools.product(range(workers), repeat=count):
                yield dict(zip(some, where, strict=True))


def by_hand(graph: NodeGraph, given: Mapping[str, int]) -> dict[str, int]:
    """A placement that a user wrote, checked; nodes it leaves out go to worker 0.

    Raises:
        UserError: an unknown node, or numbers of workers with gaps.
    """
    names = placed(graph)
    for name in given:
        if name not in names:
            raise UserError(f"workers places node {name!r}, which the graph has not.{nearest(name, names)}")
    places = {name: given.get(name, 0) for name in names}
    if sorted(set(places.values())) != list(range(max(places.values()) + 1)):
        raise UserError(f"workers are numbered 0, 1, ... without gaps, got {sorted(set(places.values()))}")
    return places
