"""Small graphs with instances and the same computation unrolled in plain autograd, for tests and as examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled.graph.build import NodeGraph
from decoupled.graph.instance import Instance, Pumped
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
