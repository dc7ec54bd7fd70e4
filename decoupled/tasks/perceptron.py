"""Images by a multilayer perceptron, one node per layer; an instance is a minibatch.

::

    image --> layer0 --> layer1 --> ... --> loss <-- label        the layers of `decoupled.models.mlp`: Linear + ReLU
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from decoupled import data as datasets
from decoupled.data import Dataset
from decoupled.graph import PPT, Instance, Loss, NodeGraph, Pumped
from decoupled.models.mlp import mlp
from decoupled.specs import positive
from decoupled.tasks import register
from decoupled.tasks.base import Grouped

Sample = tuple[Tensor, Tensor]  # image, label


class Perceptron(nn.Module):
    """Layers named layer0, layer1, ..."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        for k, layer in enumerate(layers):
            self.add_module(f"layer{k}", layer)

    def forward(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Return logits (batch, classes) and labels (batch,)."""
        x = torch.stack([image for image, _ in samples])
        for layer in self.children():
            x = layer(x)
        return x, torch.stack([label for _, label in samples])


class Images(Grouped[Sample]):
    """What `Digits` and `FashionMNIST` share; every instance is a minibatch."""

    def __init__(self, data: Dataset, width: int, depth: int, rows: int) -> None:
        super().__init__()
        positive(f"task {data.name!r}", rows=rows)
        self.name, self.data, self.description = data.name, data, data.description
        self.width, self.depth, self.rows = width, depth, rows

    def network(self) -> Perceptron:
        return Perceptron(mlp(self.data.inputs, self.data.classes, width=self.width, depth=self.depth))

    def graph(self) -> NodeGraph:
        graph = NodeGraph(self.name)
        x, label = graph.input("image"), graph.input("label")
        for name, layer in self.network().named_children():
            x = PPT(layer, name)(x)
        loss, score = self.objective
        Loss(loss, score=score)(x, label)
        return graph

    def groups(self, split: str) -> Iterator[list[Sample]]:
        part = getattr(self.data, split)
        samples = list(zip(part.inputs.to(torch.get_default_dtype()), part.targets, strict=True))
        yield from (samples[at : at + self.rows] for at in range(0, len(samples), self.rows))

    def instance(self, group: Sequence[Sample]) -> Instance:
        images, labels = (torch.stack(tensors) for tensors in zip(*group, strict=True))
        return Instance([Pumped("image", (), images), Pumped("label", (), labels)], size=len(group))


Options = Mapping[str, Any] | None


@register("digits")
class Digits(Images):
    """The digits of scikit-learn by a perceptron.

    Args:
        width: of the hidden layers.
        depth: number of linear layers, the output layer included; all but it are followed by a ReLU.
        rows: samples of an instance.
        data: options of the data set `digits`.
    """

    def __init__(self, *, width: int = 784, depth: int = 4, rows: int = 100, data: Options = None) -> None:
        super().__init__(datasets.load("digits", **(data or {})), width, depth, rows)


@register("fashion_mnist")
class FashionMNIST(Images):
    """Fashion-MNIST by a perceptron; options as of `Digits`."""

    def __init__(self, *, width: int = 784, depth: int = 4, rows: int = 100, data: Options = None) -> None:
        super().__init__(datasets.load("fashion_mnist", **(data or {})), width, depth, rows)
