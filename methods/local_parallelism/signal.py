"""Signal propagation: the label goes up through the blocks as the input does, and every block brings the two together.

    h_0 = x,   t_0 = code of the label, shaped like the input; one per class, drawn from the seed, never changed
    h_k = f_k(h_{k-1}),   t_k = f_k(t_{k-1})           in one forward; nothing comes down
    S_k = h_k t_k^T                                    (N, N); of images: the mean over space of every pixel's product
    J_k = cross entropy of row i of S_k with i         every input finds the target of its own label, k < K-1

Rows of one class have equal targets (without dropout), so J_k is a softmax over classes that weighs each with how often
the batch has it.
The last block is the classifier: it is sent the inputs alone and follows the loss of the network.

Source: Kohan, Rietman and Siegelmann 2022 (arXiv 2204.01723).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from decoupled.coupling import Bottom, Coupling, Lower, Place, Top, Upper
from decoupled.messages import Data
from decoupled.methods.local_parallelism.streams import Labelled, Sends, Streams
from decoupled.sample_losses import mean

_STREAMS = 2


@dataclass(frozen=True)
class Signal(Coupling):
    """Inputs and codes of labels up, nothing down."""

    up: tuple[str, ...] = field(default=("input", "label"), init=False)
    substitutes: bool = field(default=True, init=False)

    def lower(self, place: Place) -> Lower:
        return Top(place) if place.top else Meeting(place, _STREAMS)

    def upper(self, place: Place) -> Upper:
        return Streams(place, _STREAMS)

    def bottom(self, place: Place) -> Upper:
        return Bottom() if place.top else Coded(place, "sigprop", _STREAMS)


class Coded(Labelled):
    """The inputs, and the codes of their labels."""

    def __init__(self, place: Place, method: str, streams: int) -> None:
        super().__init__(place, method, streams)
        self._codes = torch.randn(self.classes, *place.inputs)

    def streams_of(self, x: Tensor, labels: Tensor, batch: int) -> list[Tensor]:
        self._codes = self._codes.to(x)
        return [x, self._codes[labels]]


class Meeting(Sends):
    """J_k."""

    def objective(self, y: Tensor, data: Data | None) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):  # sums over all pixels leave float16
            h, t = (y.float() if y.dtype.itemsize < 4 else y).flatten(1).chunk(_STREAMS)
            similarity = h @ t.T / math.prod(y.shape[2:])
            losses = F.cross_entropy(similarity, torch.arange(len(h), device=y.device), reduction="none")
            return mean(losses, data)
