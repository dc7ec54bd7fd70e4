"""A worker: one actor that hosts nodes of a graph, and hands messages between them and to other workers.

    own backward queue  ----+                            +--> own queues, if the next node lives here
    mailbox "backward"  ----+--> one node: forward or ---+--> another worker's mailbox
    own forward queue   ----+    backward of one message +--> the controller: answers of inputs, results of losses
    mailbox "forward"   ----+

The first line that has a message is served: answers go before new work, because they free what nodes remember and
keep weights from being updated under a message's feet; own queues go before mail, so what has begun here goes on, and
instances are overtaken less. Nodes that only steer (Phi, Cond, Isu, Concat, ...) wait in no queue: what reaches one is
handled in the operation that sent it, so a queue holds work and nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from decoupled.errors import OperationError, ProtocolError
from decoupled.graph.build import Input, NodeGraph
from decoupled.graph.message import Found, Signal
from decoupled.graph.node import Backward, Forward, Node, Result, Sends, State
from decoupled.graph.transform import PPT
from decoupled.messages import End, Message
from decoupled.runtime.contract import Actor, Outcome, Want

CONTROLLER = "controller"
Item = tuple[bool, Node, int, State, Tensor | None]  # an answer or not, where, which port, ...
Where = tuple[Node, int, str]  # node, its port, and the actor it lives at


def addresses(graph: NodeGraph, places: Mapping[str, str]) -> tuple[dict[str, list[Where]], dict[str, list[Where]]]:
    """Per node: where its outputs lead, and where its inputs come from. `places`: node -> actor."""

    def look_up(table: Mapping[str, list[tuple[str, int]]]) -> dict[str, list[Where]]:
        return {n: [(graph.nodes[m], port, places[m]) for m, port in ends] for n, ends in table.items()}

    return look_up(graph.successors()), look_up(graph.predecessors())


class GraphWorker(Actor):
    """Hosts nodes.

    Args:
        name: of the actor. graph: checked. places: node -> actor.
        backward_first: answers go before new work; else messages are handled as they arrive.
        method: its name, for error messages only.

    Attributes:
        nodes: those that live here.
        bytes_forward, bytes_backward: sent to other workers since it was made.
    """

    def __init__(
        self, name: str, graph: NodeGraph, places: Mapping[str, str], backward_first: bool = True, method: str = ""
    ) -> None:
        self.name, self._method = name, method
        self.nodes = {n: node for n, node in graph.nodes.items() if places[n] == name and not isinstance(node, Input)}
        self._successors, self._predecessors = addresses(graph, places)
        self._forward: deque[Item] = deque()
        self._backward: deque[Item] = deque() if backward_first else self._forward
        self._back_port = "backward" if backward_first else "forward"
        self._idle = self._ahead = self._own = (Want(),)
        self._ended = self._gathers = False
        self.bytes_forward = self.bytes_backward = 0

    def begin(self, training: bool, limit: int, ports: Collection[str]) -> None:
        """Get ready for an epoch.

        Args:
            limit: unanswered messages on one output that are taken for a loop that does not end.
            ports: those that other actors send to.
        """
        mail = tuple(Want((port,)) for port in ("backward", "forward") if port in ports)
        self._idle, self._ahead, self._own = mail, (*mail[: len(mail) - 1], Want()), (Want(),)
        self._gathers = any(node.batch > 1 for node in self.nodes.values())
        if self._gathers:  # then mail is put to what waits here already
            self._ahead = self._own = (*mail, Want())
        self._forward.clear()
        self._backward.clear()
        self._ended = False
        for node in self.nodes.values():
            node.limit = limit
            node.begin(training)

    def wants(self) -> Sequence[Want]:
        if self._backward:
            return self._own
        if self._forward:
            return self._ahead
        return () if self._ended else self._idle

    def handle(self, want: Want, messages: tuple[Message, ...]) -> Outcome:
        if not messages:
            item = (self._backward or self._forward).popleft()
        else:
            message = messages[0]
            if not isinstance(message, Signal):
                assert isinstance(message, End)
                return self._end()
            item = message.back, self.nodes[message.node], message.port, message.state, message.payload
            if item[1].batch > 1:
                (self._backward if item[0] else self._forward).append(item)
                return Outcome()
        leaving: list[tuple[str, Message]] = []
        brought = [item]
        for one in brought:  # grows: nodes here that only steer have their turn at once
            self._route(one[1], self._visit(one), brought, leaving)
        return Outcome(label(item), leaving)

    def _gather(self, item: Item) -> list[tuple[State, Tensor | None]]:
        """`item` and what waits for the same, as many as its node takes together."""
        back, node, _, state, payload = item
        queue = self._backward if back else self._forward
        alike, others = [(state, payload)], []
        for one in queue:
            if one[1] is node and one[0] == back and len(alike) < node.batch:
                alike.append(one[3:])
            else:
                others.append(one)
        queue.clear()
        queue.extend(others)
        return alike

    def _visit(self, item: Item) -> Sends:
        back, node, port, state, payload = item
        try:
            if node.batch > 1 and isinstance(node, PPT):
                return node.take_many(back, self._gather(item))
            if back:
                return node.take_backward(port, state, payload)
            assert payload is not None
            return node.take_forward(port, state, payload)
        except Exception as error:
            raise OperationError(self.name, label(item), error, self._method) from error

    def _route(self, node: Node, sends: Sends, brought: list[Item], leaving: list[tuple[str, Message]]) -> None:
        for send in sends:
            if type(send) is Forward:
                target, port, place = self._successors[node.name][send.port]
                if place == self.name:
                    queue = brought if target.steers else self._forward
                    queue.append((False, target, port, send.state, send.payload))
                    continue
                about = send.state[0].about
                signal = Signal(send.state, False, target.name, port, send.payload, about, node.version)
                self.bytes_forward += signal.nbytes
                leaving.append((f"{place}.forward", signal))
            elif type(send) is Backward:
                target, port, place = self._predecessors[node.name][send.port]
                if place == self.name:
                    queue = brought if target.steers else self._backward
                    queue.append((True, target, port, send.state, send.gradient))
                    continue
                about = send.state[0].about
                signal = Signal(send.state, True, target.name, port, send.gradient, about, node.version)
                self.bytes_backward += signal.nbytes
                leaving.append((f"{place}.{self._back_port}", signal))
            else:
                assert isinstance(send, Result)
                found = Found(send.state, send.loss, send.score, send.samples)
                leaving.append((f"{CONTROLLER}.{self._back_port}", found))

    def _end(self) -> Outcome:
        """Every instance has come back: nothing may be left, and what gradients there are become an update."""
        self._ended = True
        if left := [f"node {n!r}, {what}" for n, node in self.nodes.items() for what in node.open()]:
            raise OperationError(
                self.name, "end of the epoch", ProtocolError(f"all instances came back, yet {'; '.join(left[:8])}")
            )
        for node in self.nodes.values():
            if isinstance(node, PPT):
                node.end_epoch()
        return Outcome()

    def snapshot(self) -> dict[str, Any]:
        """The weights and counts of its nodes, and its own: what other processes want to know after an epoch."""
        nodes = {name: node.snapshot() for name, node in self.nodes.items()}
        return {"nodes": nodes, "bytes": (self.bytes_forward, self.bytes_backward)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what another process has found here."""
        for name, found in state["nodes"].items():
            self.nodes[name].restore(found)
        self.bytes_forward, self.bytes_backward = state["bytes"]


def label(item: Item) -> str:
    """An operation in words: F or B, node, state."""
    back, node, _, state, _ = item
    return f"{'B' if back else 'F'} {node.name} {state}"
