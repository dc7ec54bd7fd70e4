"""Forward-forward: two kinds of data instead of a backward pass; a block tells them apart by the length of its output.

    stream     what block 0 is given                                      who learns from it
    neutral    x as it is, and so as in evaluation                        the last block, from the loss of the network
    positive   x with its label written over the first features           all others
    negative   x with another label, drawn at random                      all others

    a block above the first starts with   x <- x / sqrt(mean(x^2) + 1e-8)   per sample: only the direction goes on
    G(y)  = sum over units of y^2 (of images: of the mean over space of every channel's y^2)
    J_k   = [ mean softplus(theta - G(y_k+)) + mean softplus(G(y_k-) - theta) ] / 2,   theta = threshold * units

    label i of C among m = min(C, features): feature i mod m gets 1 / (1 + i div m), the others of the m get 0, on a
    scale from the least to the largest value of the batch; with at least C features that is a one-hot code

Labels of the negative stream depend on the seed and the number of the batch alone. The network that is evaluated is a
linear probe made deep: the blocks with their normalisation on the plain input, the last block being the classifier.

Source: Hinton 2022 (arXiv 2212.13345).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled.coupling import Bottom, Coupling, Lower, Place, Top, Upper
from decoupled.messages import Data
from decoupled.methods.local_parallelism.streams import Labelled, Sends, Streams
from decoupled.sample_losses import mean

_STREAMS = 3


@dataclass(frozen=True)
class Goodness(Coupling):
    """Three streams up, nothing down."""

    threshold: float
    up: tuple[str, ...] = field(default=("neutral", "positive", "negative"), init=False)
    down: tuple[str, ...] = field(default=(), init=False)
    substitutes: bool = field(default=True, init=False)

    def lower(self, place: Place) -> Lower:
        return Top(place) if place.top else Contrast(place, self.threshold)

    def upper(self, place: Place) -> Upper:
        return Streams(place, _STREAMS)

    def bottom(self, place: Place) -> Upper:
        return Bottom() if place.top else Written(place, "forward_forward", _STREAMS)

    def front(self, k: int, K: int) -> nn.Module | None:
        return UnitLength() if k else None


class UnitLength(nn.Module):
    """Scale every sample so that the mean of its squares is 1; of images it is the length per pixel that counts."""

    def forward(self, x: Tensor) -> Tensor:
        eps = max(1e-8, torch.finfo(x.dtype).tiny)  # in float16 1e-8 is 0
        return x / (x.square().mean(tuple(range(1, x.dim())), keepdim=True) + eps).sqrt()


class Written(Labelled):
    """The input as it is, with its label, and with another one."""

    def __init__(self, place: Place, method: str, streams: int) -> None:
        super().__init__(place, method, streams)
        self._codes = codes(self.classes, math.prod(place.inputs))
        self._seed = int(torch.randint(1 << 31, (), device="cpu"))  # of the trainer's

    def streams_of(self, x: Tensor, labels: Tensor, batch: int) -> list[Tensor]:
        return [x, self._written(x, labels), self._written(x, others(labels, self.classes, self._seed + batch))]

    def _written(self, x: Tensor, labels: Tensor) -> Tensor:
        low, high = x.min(), x.max()
        flat = x.flatten(1).clone()
        flat[:, : self._codes.shape[1]] = low + (high - low) * self._codes.to(x)[labels]
        return flat.view_as(x)


def codes(classes: int, features: int) -> Tensor:
    """What stands for each label: (classes, min(classes, features)), in [0, 1]."""
    width = min(classes, features)
    made = torch.zeros(classes, width, device="cpu")
    for label in range(classes):
        made[label, label % width] = 1 / (1 + label // width)
    return made


def others(labels: Tensor, classes: int, seed: int) -> Tensor:
    """A wrong label for each, drawn evenly; the same for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    steps = 1 + torch.randint(classes - 1, labels.shape, generator=draw, device="cpu")
    return (labels + steps.to(labels.device)) % classes


def goodness(y: Tensor) -> Tensor:
    """G: (N, units) or (N, channels, *space) -> (N,)."""
    return y.square().flatten(2).mean(2).sum(1) if y.dim() > 2 else y.square().sum(1)


class Contrast(Sends):
    """J_k: large goodness for positive data, small for negative data."""

    def __init__(self, place: Place, threshold: float) -> None:
        super().__init__(place, _STREAMS)
        self._theta = threshold * place.shapes[place.k][0]

    def objective(self, y: Tensor, data: Data | None) -> Tensor:
        _, positive, negative = y.chunk(_STREAMS)
        losses = F.softplus(self._theta - goodness(positive)) + F.softplus(goodness(negative) - self._theta)
        return mean(losses, data) / 2
