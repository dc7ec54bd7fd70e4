"""List reduction by a vanilla recurrent network; an instance is a batch of sequences of one length.

::

    h_0 = 0,   h_t = relu(W [e(x_t), h_{t-1}] + b),   logits = V h_T + c

      token --> embed --> concat --> recurrent --> relu --> step --> more --last--> out --> loss <-- label
      start --> state ----^                                          |
                  ^--------------------------------------------------+               state (instance, t, T)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Several
from typing import Any

import torch
from torch import Tensor, nn

from decoupled.data import structured
from decoupled.data.structured import Sequence, Structured
from decoupled.graph import NPT, PPT, Concat, Cond, Instance, Isu, Loss, NodeGraph, Phi, Pumped
from decoupled.specs import positive
from decoupled.tasks import register
from decoupled.tasks.base import Grouped, zeros


class Recurrent(nn.Module):
    """A ReLU network that reads tokens one after the other and classifies its last state; padded and masked."""

    def __init__(self, tokens: int, classes: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, hidden)
        self.recurrent = nn.Linear(2 * hidden, hidden)
        self.out = nn.Linear(hidden, classes)

    def forward(self, sequences: Several[Sequence]) -> tuple[Tensor, Tensor]:
        """Return logits (batch, classes) and labels (batch,); a state is kept after the end of its sequence."""
        lengths = torch.tensor([len(sequence.tokens) for sequence in sequences])
        padded = nn.utils.rnn.pad_sequence([torch.tensor(sequence.tokens) for sequence in sequences])  # (time, batch)
        h = self.embed.weight.new_zeros(len(sequences), self.out.in_features)
        for t, x in enumerate(padded):
            running = (t < lengths)[:, None]
            h = torch.where(running, torch.relu(self.recurrent(torch.cat([self.embed(x), h], 1))), h)
        return self.out(h), torch.tensor([sequence.label for sequence in sequences])


@register("list_reduction")
class ListReduction(Grouped[Sequence]):
    """Read an operation and a list of digits, predict the reduced list modulo 10.

    Args:
        hidden: width of the state and of the embedding.
        rows: sequences of one length in an instance, at most.
        data: options of the data set `list_reduction`.
    """

    target = 0.97

    def __init__(self, *, hidden: int = 128, rows: int = 100, data: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        positive("task 'list_reduction'", hidden=hidden, rows=rows)
        self.data: Structured[Sequence] = structured.load("list_reduction", **(data or {}))
        self.hidden, self.rows, self.description = hidden, rows, self.data.description

    def network(self) -> Recurrent:
        return Recurrent(len(self.data.tokens), self.data.classes, self.hidden)

    def graph(self) -> NodeGraph:
        graph, parts = NodeGraph(self.name), self.network()
        token, start, label = graph.input("token"), graph.input("start"), graph.input("label")
        state = Phi("state")
        both = Concat()(PPT(parts.embed, "embed")(token), state(start))
        h = NPT(torch.relu)(PPT(parts.recurrent, "recurrent")(both))
        more, last = Cond(lambda i, t, T: t < T, name="more")(
            Isu(lambda i, t, T: (i, t + 1, T), lambda i, t, T: (i, t - 1, T), "step")(h)
        )
        state.join(more)
        loss, score = self.objective
        Loss(loss, score=score)(PPT(parts.out, "out")(last), label)
        return graph

    def groups(self, split: str) -> Iterator[Several[Sequence]]:
        ordered = sorted(getattr(self.data, split), key=lambda sequence: len(sequence.tokens))  # stable
        for _, alike in itertools.groupby(ordered, key=lambda sequence: len(sequence.tokens)):
            alike = list(alike)
            yield from (alike[at : at + self.rows] for at in range(0, len(alike), self.rows))

    def instance(self, group: Several[Sequence]) -> Instance:
        tokens = torch.tensor([sequence.tokens for sequence in group])
        rows, T = tokens.shape
        messages = [Pumped("token", (t, T), tokens[:, t]) for t in range(T)]
        messages.append(Pumped("start", (0, T), zeros(rows, self.hidden)))
        messages.append(Pumped("label", (T, T), torch.tensor([sequence.label for sequence in group])))
        return Instance(messages, size=rows)
