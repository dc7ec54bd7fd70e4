"""The simplest way to run a graph: one thread, one queue, backward messages first. For examples, tests and profiles.

total = execute(graph, instances)        every message is handled; gradients are added up in `.grad`
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from decoupled.errors import OperationError, ProtocolError, StallError, UserError
from decoupled.graph.build import NodeGraph
from decoupled.graph.instance import Instance
from decoupled.graph.node import Backward, Forward, Key, Node, Result, Sends, State
from decoupled.graph.worker import label


@dataclass
class Executed:
    """What an execution found: the results of the losses, seconds per node, messages and answers per pair of nodes."""

    results: list[Result] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    traffic: Counter[tuple[str, str]] = field(default_factory=Counter)


def execute(
    graph: NodeGraph,
    instances: Iterable[Instance],
    training: bool = True,
    choose: Callable[[int], int] | None = None,
    limit: float = float("inf"),
) -> Executed:
    """Run all instances at once through the graph, and back.

    Args:
        graph: is checked first. instances: numbered from 0.
        training: with the way back, or without.
        choose: number of waiting messages -> which is next (any interleaving); default: backward first, in order.
        limit: unanswered messages on one output that are taken for a loop that never ends.

    Raises:
        ProtocolError, UserError: as the nodes raise them. StallError: an instance did not come back.
        OperationError: a node failed otherwise; names node and state.
    """
    graph.check()
    successors, predecessors = graph.successors(), graph.predecessors()
    forward: deque[tuple[bool, Node, int, State, object]] = deque()
    backward: deque[tuple[bool, Node, int, State, object]] = deque()
    found = Executed()

    def send(node: Node, sends: Sends) -> None:
        for one in sends:
            if type(one) is Forward:
                name, port = successors[node.name][one.port]
                found.traffic[node.name, name] += 1
                forward.append((False, graph.nodes[name], port, one.state, one.payload))
            elif type(one) is Backward:
                if node.inputs:
                    name, port = predecessors[node.name][one.port]
                    found.traffic[name, node.name] += 1
                    backward.append((True, graph.nodes[name], port, one.state, one.gradient))
            else:
                assert isinstance(one, Result)
                found.results.append(one)

    for node in graph.nodes.values():
        node.limit = limit
        node.begin(training)
    for number, instance in enumerate(instances):
        for name, position, payload in instance.messages:
            node, state = graph.entrance(name), (Key(number, instance.about), *position)
            send(node, node.check_sends([Forward(0, state, payload)]))
    while forward or backward:
        item = _next(forward, backward, choose)
        node, start = item[1], time.perf_counter()
        sends = _visit(item)
        found.seconds[node.name] = found.seconds.get(node.name, 0.0) + time.perf_counter() - start
        send(node, sends)
    left = [f"{name}: {what}" for name, node in graph.nodes.items() for what in node.open()]
    if left:
        raise StallError(f"messages of {graph.name!r} never came back: {'; '.join(left[:8])}")
    return found


def _visit(item: tuple) -> Sends:
    back, node, port, state, payload = item
    try:
        return node.take_backward(port, state, payload) if back else node.take_forward(port, state, payload)
    except (ProtocolError, StallError, UserError):
        raise
    except Exception as error:
        raise OperationError("execute", label(item), error) from error


def _next(forward: deque, backward: deque, choose: Callable[[int], int] | None) -> tuple:
    if choose is None:
        return (backward or forward).popleft()
    n = choose(len(forward) + len(backward))
    queue, n = (forward, n) if n < len(forward) else (backward, n - len(forward))
    item = queue[n]
    del queue[n]
    return item
