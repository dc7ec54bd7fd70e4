"""Networks of actor and critics: one shape with four ways to connect its layers, several copies at once.

    mlp        y_i = act(W_i y_{i-1})                          y_0 = x
    densenet   y_i = [act(W_i y_{i-1}), y_{i-1}]               all that went before is read by every layer, and the head
    resnet     y_1 = act(W_1 x),  y_i = y_{i-1} + act(W_i y_{i-1})
    d2rl       y_1 = act(W_1 x),  y_i = act(W_i [y_{i-1}, x])

Twin critics are two copies in one batched product: half as many calls, each with twice the work.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled.errors import unknown
from decoupled.specs import positive

CONNECTIONS = ("mlp", "resnet", "densenet", "d2rl")
ACTIVATIONS = {"relu": F.relu, "swish": F.silu}


def glorot_(weight: Tensor, inputs: int, outputs: int, random: torch.Generator) -> None:
    """Uniform within sqrt(6 / (inputs + outputs))."""
    bound = math.sqrt(6 / (inputs + outputs))
    with torch.no_grad():
        weight.uniform_(-bound, bound, generator=random)


class Stacked(nn.Module):
    """`copies` linear layers side by side: (copies, batch, inputs) or (batch, inputs) -> (copies, batch, outputs)."""

    def __init__(self, copies: int, inputs: int, outputs: int, random: torch.Generator) -> None:
        super().__init__()
        self.copies = copies
        self.weight = nn.Parameter(torch.empty(copies, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(copies, 1, outputs))
        for one in self.weight:
            glorot_(one, inputs, outputs, random)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            x = x.expand(self.copies, *x.shape)
        return torch.baddbmm(self.bias, x, self.weight)


class Network(nn.Module):
    """Hidden layers and a linear head, `copies` times: (batch, inputs) -> (copies, batch, outputs).

    Args:
        units, layers: of the hidden layers. connection, activation: see above.
    """

    def __init__(
        self, inputs: int, outputs: int, copies: int, units: int, layers: int, connection: str, activation: str,
        random: torch.Generator,
    ) -> None:  # fmt: skip
        super().__init__()
        positive("network", units=units, layers=layers)
        if connection not in CONNECTIONS:
            raise unknown("connection", connection, CONNECTIONS)
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        self.connection, self._act = connection, ACTIVATIONS[activation]
        self.layers = nn.ModuleList()
        width = inputs
        for i in range(layers):
            reads = width + inputs if connection == "d2rl" and i else width
            self.layers.append(Stacked(copies, reads, units, random))
            width = width + units if connection == "densenet" else units
        self.head = Stacked(copies, width, outputs, random)

    def hidden(self, x: Tensor) -> Tensor:
        """What the head reads."""
        y = x = x.expand(self.head.copies, *x.shape)
        for i, layer in enumerate(self.layers):
            if self.connection == "densenet":
                y = torch.cat([self._act(layer(y)), y], -1)
            elif self.connection == "resnet" and i:
                y = y + self._act(layer(y))
            elif self.connection == "d2rl" and i:
                y = self._act(layer(torch.cat([y, x], -1)))
            else:
                y = self._act(layer(y))
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))
