"""Small graphs with instances and the same computation unrolled in plain autograd, for tests and as examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled.graph.build import NodeGraph
from decoupled.graph.gathering import Flatmap, Group, Ungroup
from decoupled.graph.instance import Instance, Pumped
from decoupled.graph.node import Key
from decoupled.graph.routing import Concat, Cond, Isu, Phi
from decoupled.graph.transform import NPT, PPT, Loss


def right(prediction: Tensor, target: Tensor) -> float:
    """How many rows of `prediction` (rows, classes) are right."""
    return float((prediction.argmax(1) == target).sum())


def rnn(vocabulary: int, hidden: int, classes: int) -> NodeGraph:
    """An RNN over sequences of any length: states (instance, position, length)."""
    graph = NodeGraph("rnn")
    token, start, label = graph.input("token"), graph.input("start"), graph.input("label")
    x = PPT(nn.Embedding(vocabulary, hidden), "embed")(token)
    h = Phi("state")
    z = PPT(nn.Linear(2 * hidden, hidden), "recurrent")(Concat()(x, h(start)))
    step = Isu(lambda i, t, T: (i, t + 1, T), lambda i, t, T: (i, t - 1, T), "step")(NPT(torch.tanh)(z))
    more, last = Cond(lambda i, t, T: t < T, name="more")(step)
    h.join(more)
    Loss(F.cross_entropy, score=right)(PPT(nn.Linear(hidden, classes), "out")(last), label)
    return graph


def sequence(tokens: Tensor, label: Tensor, hidden: int) -> Instance:
    """tokens (rows, T), label (rows,)."""
    rows, T = tokens.shape
    return Instance(
        [Pumped("token", (t, T), tokens[:, t]) for t in range(T)]
        + [
            Pumped("start", (0, T), torch.zeros(rows, hidden, dtype=torch.get_default_dtype())),
            Pumped("label", (T, T), label),
        ],
        size=rows,
    )


def sequences(lengths: Sequence[int], vocabulary: int, hidden: int, classes: int, rows: int = 1) -> list[Instance]:
    """Random sequences of these lengths."""
    return [sequence(torch.randint(vocabulary, (rows, T)), torch.randint(classes, (rows,)), hidden) for T in lengths]


def unrolled(module: nn.ModuleDict, instance: Instance) -> Tensor:
    """The loss of one instance by ordinary autograd."""
    tokens = [message.payload for message in instance.messages if message.input == "token"]
    h, label = instance.messages[-2].payload, instance.messages[-1].payload
    for token in tokens:
        h = torch.tanh(module["recurrent"](torch.cat([module["embed"](token), h], -1)))
    return F.cross_entropy(module["out"](h), label)


def tree(hidden: int, classes: int) -> NodeGraph:
    """A binary tree cell applied from the leaves to the root: states (instance, node), with heap numbers."""
    graph = NodeGraph("tree")
    leaf, label = graph.input("leaf"), graph.input("label")
    below = Phi("below")
    root, child = Cond(lambda i, node: node == 1, name="root")(below(PPT(nn.Linear(3, hidden), "leaf_cell")(leaf)))
    both = Group(lambda i, node: (i, node // 2), 2, dim=1)(child)
    below.join(NPT(torch.tanh)(PPT(nn.Linear(2 * hidden, hidden), "branch")(both)))
    Loss(F.cross_entropy, score=right)(PPT(nn.Linear(hidden, classes), "out")(root), label)
    return graph


def sapling(leaves: Sequence[int], classes: int) -> Instance:
    """A tree with random leaves at these heap numbers."""
    return Instance(
        [Pumped("leaf", (n,), torch.randn(1, 3)) for n in leaves]
        + [Pumped("label", (1,), torch.randint(classes, (1,)))]
    )


def unrolled_tree(module: nn.ModuleDict, instance: Instance) -> Tensor:
    """The loss of one tree by ordinary autograd."""
    leaves = {m.position[0]: m.payload for m in instance.messages if m.input == "leaf"}

    def value(node: int) -> Tensor:
        if node in leaves:
            return module["leaf_cell"](leaves[node])
        return torch.tanh(module["branch"](torch.cat([value(2 * node), value(2 * node + 1)], 1)))

    return F.cross_entropy(module["out"](value(1)), instance.messages[-1].payload)


def spread(hidden: int, rounds: int) -> NodeGraph:
    """Message passing on a graph: every node's row goes along the edges, is summed at their ends, `rounds` times.

    States: (instance, round) for the matrix of all rows, (instance, round, node) or (.., edge) for one row of it. An
    instance says about itself: (number of nodes, ((source, target), ...)).
    """
    graph = NodeGraph("spread")
    start, target = graph.input("start"), graph.input("target")
    rows = Phi("rows")
    node = Ungroup(lambda i, t: [(i, t, v) for v in range(i.about[0])])(rows(start))
    sent = Flatmap(lambda i, t, v: [(i, t, v, e) for e, (a, _) in enumerate(i.about[1]) if a == v])(node)
    moved = PPT(nn.Linear(hidden, hidden), "along")(sent)
    ends = Group(lambda i, t, v, e: (i, t), lambda i, t: len(i.about[1]), name="ends")(moved)
    summed = NPT(_sum_at_ends, "summed", with_state=True)(ends)
    step = Isu(lambda i, t: (i, t + 1), lambda i, t: (i, t - 1), "step")(NPT(torch.tanh)(summed))
    more, last = Cond(lambda i, t: t < rounds, name="more")(step)
    rows.join(more)
    Loss(F.mse_loss)(PPT(nn.Linear(hidden, 1), "out")(last), target)
    return graph


def _sum_at_ends(x: Tensor, i: Key, t: int) -> Tensor:
    nodes, edges = i.about
    by_source = sorted(range(len(edges)), key=lambda e: (edges[e][0], e))  # the order of the states (v, e)
    ends = torch.tensor([edges[e][1] for e in by_source])
    return x.new_zeros(nodes, x.shape[1]).index_add(0, ends, x)


def web(nodes: int, edges: Sequence[tuple[int, int]], hidden: int, rounds: int) -> Instance:
    """A graph with random rows at its nodes."""
    messages = [Pumped("start", (0,), torch.randn(nodes, hidden)), Pumped("target", (rounds,), torch.randn(nodes, 1))]
    return Instance(messages, about=(nodes, tuple(edges)))


def unrolled_web(module: nn.ModuleDict, instance: Instance, rounds: int) -> Tensor:
    """The loss of one graph by ordinary autograd."""
    nodes, edges = instance.about
    rows = instance.messages[0].payload
    for _ in range(rounds):
        moved = [module["along"](rows[a : a + 1]) for a, _ in edges]
        rows = torch.stack(
            [
                sum((m[0] for m, (_, b) in zip(moved, edges, strict=True) if b == v), rows.new_zeros(rows.shape[1]))
                for v in range(nodes)
            ]
        )
        rows = torch.tanh(rows)
    return F.mse_loss(module["out"](rows), instance.messages[1].payload)
