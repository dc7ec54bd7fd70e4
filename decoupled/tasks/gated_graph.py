"""Graphs by a gated graph network (Li et al. 2016), which chooses a node or predicts a value of the whole graph.

::

    h_0 = one-hot kind, padded with zeros
    m_v = sum over edges u -k-> v of A_k h_u + b_k,     h_v <- GRU(m_v, h_v)          `steps` times
    choice   score_v = w [h_v, h_0v],                   softmax over the nodes of the graph
    value    sum over v of s(w [h_v, h_0v]) (w' h_v)                                  s: logistic function

      nodes --> h --+--> relation0 --> concat --> gru --> step --> more --last--> concat --> out --> loss
                ^   +--> relation1 ------^                    |         first ---------^                ^-- target
                |   +--> ... ------------^                    |
                +---+-----------------------------------------+                       state (instance, t)

A payload is the states of all nodes of one graph (nodes, hidden); which edges there are, a relation looks up in the
state (`i.about`), so the network is the same for every graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Several
from typing import Any

import torch
from torch import Tensor, nn

from decoupled.data import structured
from decoupled.data.structured import Graph, Structured
from decoupled.errors import UserError
from decoupled.graph import NPT, PPT, Concat, Cond, Instance, Isu, Key, Loss, NodeGraph, Phi, Pumped
from decoupled.specs import positive
from decoupled.tasks import register
from decoupled.tasks.base import CLASSIFY, REGRESS, Grouped, one_each


class Relation(nn.Module):
    """Sums (nodes, hidden) of what comes along the edges of one kind, from the states of all nodes (nodes, hidden)."""

    def __init__(self, kind: int, hidden: int) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(hidden, hidden)

    def forward(self, h: Tensor, i: Key, t: int) -> Tensor:
        sources, targets = torch.tensor(i.about[self.kind], dtype=torch.long)
        return self.along(h, sources, targets)

    def along(self, h: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
        return torch.zeros_like(h).index_add(0, targets, self.linear(h[sources]))


class Update(nn.Module):
    """New states (nodes, hidden) from old states and the sums of all relations, side by side."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gru = nn.GRUCell(hidden, hidden)

    def forward(self, side_by_side: Tensor) -> Tensor:
        h, *sums = side_by_side.split(self.gru.hidden_size, 1)
        return self.gru(torch.stack(sums).sum(0), h)


class Score(nn.Module):
    """One number per node (nodes,), from its last and first state side by side (nodes, 2 hidden)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * hidden, 1)

    def forward(self, states: Tensor) -> Tensor:
        return self.linear(states)[:, 0]


class GatedPart(nn.Module):
    """A part of the value per node (nodes,), gated, from its last and first state side by side (nodes, 2 hidden)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * hidden, 1)
        self.part = nn.Linear(hidden, 1)

    def forward(self, states: Tensor) -> Tensor:
        return (torch.sigmoid(self.gate(states)) * self.part(states[:, : self.part.in_features]))[:, 0]


def scores_of_graph(scores: Tensor) -> Tensor:
    """(nodes,) -> (1, nodes)."""
    return scores[None]


def value_of_graph(parts: Tensor) -> Tensor:
    """(nodes,) -> (1,)."""
    return parts.sum(0, keepdim=True)


class GatedGraph(nn.Module):
    """A gated graph network; forward takes all graphs of a batch as one graph of many parts."""

    def __init__(self, relations: int, hidden: int, steps: int, chooses: bool) -> None:
        super().__init__()
        self.hidden, self.steps, self.chooses = hidden, steps, chooses
        self.relations = [Relation(kind, hidden) for kind in range(relations)]
        for kind, relation in enumerate(self.relations):
            self.add_module(f"relation{kind}", relation)
        self.gru = Update(hidden)
        self.out = Score(hidden) if chooses else GatedPart(hidden)

    def forward(self, graphs: Several[Graph]) -> tuple[Tensor, Tensor]:
        """Return scores (batch, nodes of the largest), minus infinity where no node is, or values (batch,); targets."""
        sizes = [len(graph) for graph in graphs]
        starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
        edges = [
            (u + at, kind, v + at) for at, graph in zip(starts, graphs, strict=False) for u, kind, v in graph.edges
        ]
        u, kind, v = torch.tensor(edges, dtype=torch.long).reshape(-1, 3).unbind(1)
        h = first = torch.cat([first_states(graph, self.hidden) for graph in graphs])
        for _ in range(self.steps):
            sums = [relation.along(h, u[kind == k], v[kind == k]) for k, relation in enumerate(self.relations)]
            h = self.gru(torch.cat([h, *sums], 1))
        parts = list(self.out(torch.cat([h, first], 1)).split(sizes))
        if self.chooses:
            outputs = nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=-torch.inf)
        else:
            outputs = torch.stack([part.sum() for part in parts])
        return outputs, torch.tensor([graph.target for graph in graphs])


class Graphs(Grouped[Graph]):
    """What `Babi15`, `G2` and `QM9` share; every instance is one graph."""

    def __init__(self, data: Structured[Graph], hidden: int, steps: int, chooses: bool) -> None:
        super().__init__()
        positive(f"task {data.name!r}", hidden=hidden, steps=steps)
        if hidden < len(data.tokens):
            raise UserError(
                f"task {data.name!r}: a state starts as the one-hot kind of its node, so hidden must be at least "
                f"{len(data.tokens)}, got {hidden}; make it larger"
            )
        self.name, self.data, self.description = data.name, data, data.description
        self.hidden, self.steps, self.chooses = hidden, steps, chooses
        if chooses:
            self.objective, self.target = CLASSIFY, 1.0
        else:
            self.objective, self.metric, self.higher_is_better = REGRESS, "mean absolute error", False

    def network(self) -> GatedGraph:
        return GatedGraph(len(self.data.relations), self.hidden, self.steps, self.chooses)

    def graph(self) -> NodeGraph:
        graph, parts, steps = NodeGraph(self.name), self.network(), self.steps
        nodes, first, target = graph.input("nodes"), graph.input("first"), graph.input("target")
        state = Phi("state")
        h = state(nodes)
        sums = [PPT(relation, f"relation{k}", with_state=True)(h) for k, relation in enumerate(parts.relations)]
        new = PPT(parts.gru, "gru")(Concat(name="messages")(h, *sums))
        step = Isu(lambda i, t: (i, t + 1), lambda i, t: (i, t - 1), "step")(new)
        more, last = Cond(lambda i, t: t < steps, name="more")(step)
        state.join(more)
        out = PPT(parts.out, "out")(Concat(name="ends")(last, first))
        loss, score = self.objective
        Loss(loss, score=score)(NPT(scores_of_graph if self.chooses else value_of_graph)(out), target)
        return graph

    def groups(self, split: str) -> list[list[Graph]]:
        return one_each(getattr(self.data, split))

    def instance(self, group: Several[Graph]) -> Instance:
        (graph,) = group
        h = first_states(graph, self.hidden)
        ends = ((self.steps,), torch.tensor([graph.target]))
        messages = [Pumped("nodes", (0,), h), Pumped("first", (self.steps,), h), Pumped("target", *ends)]
        edges = [[(u, v) for u, kind, v in graph.edges if kind == k] for k in range(len(self.data.relations))]
        return Instance(messages, about=tuple((tuple(u for u, _ in e), tuple(v for _, v in e)) for e in edges))


def first_states(graph: Graph, hidden: int) -> Tensor:
    """Return h_0 (nodes, hidden)."""
    return nn.functional.one_hot(torch.tensor(graph.kinds), hidden).to(torch.get_default_dtype())


@register("babi15")
class Babi15(Graphs):
    """Choose the node that answers a question of deduction.

    Args:
        hidden: width of a node's state.
        steps: rounds of messages; the answer is two edges away.
        data: options of the data set `babi15`.
    """

    def __init__(self, *, hidden: int = 5, steps: int = 2, data: Mapping[str, Any] | None = None) -> None:
        super().__init__(structured.load("babi15", **(data or {})), hidden, steps, chooses=True)


@register("g2")
class G2(Graphs):
    """A property of the small molecules that come with ase, in standard deviations; options as of `Babi15`."""

    def __init__(self, *, hidden: int = 32, steps: int = 4, data: Mapping[str, Any] | None = None) -> None:
        super().__init__(structured.load("g2", **(data or {})), hidden, steps, chooses=False)


@register("qm9")
class QM9(Graphs):
    """A property of the molecules of QM9, in standard deviations; `data` needs a `path`; options as of `Babi15`."""

    def __init__(self, *, hidden: int = 100, steps: int = 4, data: Mapping[str, Any] | None = None) -> None:
        super().__init__(structured.load("qm9", **(data or {})), hidden, steps, chooses=False)
