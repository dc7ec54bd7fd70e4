"""Building a graph: nodes are called on wires, and a loop is closed with `Phi.join`.

    graph = NodeGraph("running total")
    x, start, target = graph.input("x"), graph.input("start"), graph.input("target")
    h = Phi()
    total = PPT(nn.Linear(2, 1))(Concat()(x, h(start)))
    more, last = Cond(lambda i, t, T: t < T)(Isu(lambda i, t, T: (i, t + 1, T), lambda i, t, T: (i, t - 1, T))(total))
    h.join(more)
    Loss(F.mse_loss)(last, target)
    graph.check()          a dangling port, a loop without a way back, ...: one clear error

A wire that is used twice gets a `Broadcast` in between.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from decoupled.errors import UserError, nearest
from decoupled.graph.node import Backward, Node, Sends, State
from decoupled.graph.routing import Broadcast, Isu, Phi
from decoupled.graph.transform import PPT, Loss


class Input(Node):
    """Where messages of instances come in from outside."""

    kind, inputs = "input", 0

    def forward(self, port: int, state: State, payload: Any) -> Sends:
        raise AssertionError("an input has no predecessors")

    def backward(self, port: int, state: State, gradient: Any) -> Sends:
        return (Backward(0, state, gradient),)  # to whoever pumped it


@dataclass(frozen=True, eq=False)
class Wire:
    """One output of a node, to be used as the input of others."""

    node: Node
    port: int = 0


@dataclass
class NodeGraph:
    """Nodes and what joins them.

    Attributes:
        name: for errors and drawings.
        nodes: by name, in the order they were made.
        targets: (node, output) -> [(node, input), ...].
        replicas: node -> all that stand for it, itself first.
    """

    name: str = "graph"
    nodes: dict[str, Node] = field(default_factory=dict)
    targets: dict[tuple[str, int], list[tuple[str, int]]] = field(default_factory=dict)
    replicas: dict[str, list[str]] = field(default_factory=dict)
    _checked: bool = False

    def input(self, name: str) -> Wire:
        """A new input; instances name it in their messages."""
        return Wire(self.add(Input(name)))

    def add(self, node: Node) -> Node:
        """Make `node` part of this graph, with a name of its own."""
        if node.graph is not None:
            raise UserError(f"node {node.name!r} is part of a graph already; join several streams into it with Phi")
        name = node.name or node.kind
        if not name.isidentifier() or hasattr(nn.ModuleDict, name):
            raise UserError(f"a node cannot be named {name!r}; use letters, digits and _, and no name of a ModuleDict")
        if name in self.nodes:
            number = 2
            while f"{name}{number}" in self.nodes:
                number += 1
            name = f"{name}{number}"
        node.name, node.graph = name, self
        self.nodes[name] = node
        return node

    def of(self, kind: type[Node]) -> list[Any]:
        """All nodes of a class."""
        return [node for node in self.nodes.values() if isinstance(node, kind)]

    def entrance(self, name: str) -> Input:
        """The input that a message of an instance names.

        Raises:
            UserError: there is none of that name.
        """
        inputs = {node.name: node for node in self.of(Input)}
        if name not in inputs:
            raise UserError(
                f"an instance has a message for {name!r}, which is no input of the graph.{nearest(name, inputs)} "
                f"Inputs: {', '.join(inputs)}."
            )
        return inputs[name]

    @property
    def module(self) -> nn.ModuleDict:
        """The modules of all parameterised nodes (without their replicas), by name: weights to save and compare."""
        copies = {name for names in self.replicas.values() for name in names[1:]}
        return nn.ModuleDict({node.name: node.module for node in self.of(PPT) if node.name not in copies})

    def edges(self) -> Iterator[tuple[str, int, str, int]]:
        """(node, output, node, input) of every connection."""
        for (source, out), targets in self.targets.items():
            for target, port in targets:
                yield source, out, target, port

    def successors(self) -> dict[str, list[tuple[str, int]]]:
        """Per node, for every output: the node and its input (once checked there is exactly one)."""
        return {n: [self.targets[n, port][0] for port in range(node.outputs)] for n, node in self.nodes.items()}

    def predecessors(self) -> dict[str, list[tuple[str, int]]]:
        """Per node, for every input: the node and its output that it comes from."""
        found: dict[str, list[Any]] = {name: [None] * node.inputs for name, node in self.nodes.items()}
        for source, out, target, port in self.edges():
            found[target][port] = (source, out)
        return found

    def check(self) -> NodeGraph:
        """Put in the broadcasts and refuse what cannot work; returns the graph.

        Raises:
            UserError: says which node, what is wrong, and what to do.
        """
        if self._checked:
            return self
        for (source, out), targets in list(self.targets.items()):
            if len(targets) > 1:
                self._fan_out(source, out, targets)
        for name, node in self.nodes.items():
            for port in range(node.outputs):
                if not self.targets.get((name, port)):
                    raise UserError(
                        f"graph {self.name!r}: output {port} of node {name!r} leads nowhere; every message must come "
                        "to a loss, connect it"
                    )
            if node.inputs == 0 and not isinstance(node, Input):
                raise UserError(f"graph {self.name!r}: node {name!r} has no inputs; call it on what leads to it")
            if isinstance(node, Isu) and node.inverse is None:
                where = "in a loop " if self._reaches(name, name) else ""
                raise UserError(
                    f"graph {self.name!r}: node {name!r} changes the state {where}and has no inverse, so no gradient "
                    "would find its way back; give Isu(f, inverse)"
                )
        self._check_owners()
        if not self.of(Loss):
            raise UserError(f"graph {self.name!r} has no loss; every way must end in a Loss")
        for phi in self.of(Phi):
            if self._reaches(phi.name, phi.name, lambda node: not node.changes_state):
                raise UserError(
                    f"graph {self.name!r}: the loop through node {phi.name!r} does not change the state, so the rounds "
                    "cannot be told apart; count them with an Isu in the loop"
                )
        self._checked = True
        return self

    def _check_owners(self) -> None:
        owners: dict[int, str] = {}
        for node in self.of(PPT):
            for weight in itertools.chain(node.module.parameters(), node.module.buffers()):
                if (owner := owners.setdefault(id(weight), node.name)) != node.name:
                    raise UserError(
                        f"graph {self.name!r}: nodes {owner!r} and {node.name!r} share weights, which belong to "
                        "one node alone; give each its own, or join the streams into one node with Phi"
                    )

    def _fan_out(self, source: str, out: int, targets: list[tuple[str, int]]) -> None:
        copy = self.add(Broadcast(len(targets), f"{source}_copy" if out == 0 else f"{source}_{out}_copy"))
        for port, target in enumerate(targets):
            self.targets[copy.name, port] = [target]
        self.targets[source, out] = [(copy.name, 0)]

    def _reaches(self, start: str, goal: str, through: Any = lambda node: True) -> bool:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            name = ahead.pop()
            for port in range(self.nodes[name].outputs):
                for target, _ in self.targets.get((name, port), ()):
                    if target == goal:
                        return True
                    if target not in seen and through(self.nodes[target]):
                        seen.add(target)
                        ahead.append(target)
        return False

    def __str__(self) -> str:
        lines = [f"graph {self.name}: {len(self.nodes)} nodes"]
        for name, node in self.nodes.items():
            ways = []
            for port in range(node.outputs):
                to = ", ".join(f"{target}[{i}]" for target, i in self.targets.get((name, port), ())) or "nowhere"
                ways.append(to if node.outputs == 1 else f"{port}: {to}")
            lines.append(f"  {name:<16} {node.kind:<10}" + (f" -> {'; '.join(ways)}" if ways else ""))
        return "\n".join(lines)


def connect(node: Node, wires: Sequence[Wire]) -> Any:
    """See `Node.__call__`.

    Raises:
        UserError: not wires of one graph, the wrong number of them, or a node that is connected already.
    """
    if not wires or not all(isinstance(wire, Wire) for wire in wires):
        raise UserError(f"{node.kind} must be called on wires: what graph.input and other nodes returned")
    graph = wires[0].node.graph
    if graph is None or any(wire.node.graph is not graph for wire in wires):
        raise UserError(f"{node.kind} is called on wires of different graphs")
    joins, collects = isinstance(node, Phi), node.kind == "concat"
    if not (joins and node.graph is graph):
        graph.add(node)
        if not joins and not collects and len(wires) != node.inputs:
            raise UserError(f"node {node.name!r} has {node.inputs} inputs, it was called on {len(wires)} wires")
        node.inputs = 0
    for wire in wires:
        graph.targets.setdefault((wire.node.name, wire.port), []).append((node.name, node.inputs))
        node.inputs += 1
    graph._checked = False
    outputs = tuple(Wire(node, port) for port in range(node.outputs))
    return outputs[0] if len(outputs) == 1 else outputs or None
