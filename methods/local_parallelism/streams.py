"""Several streams through the same blocks, one after the other in one batch: what label-in-the-input methods share.

    data (N, ...) -- Labelled.streams_of --> [N, ...] x streams -- cat --> block 0 -- chunk --> ... -- cat --> block 1

The last block, the classifier, is sent the first stream alone: the input as it is, and so as in evaluation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decoupled.coupling import Bottom, Lower, Payload, Place, Upper
from decoupled.errors import UserError
from decoupled.messages import Data


class Streams(Upper):
    """The streams one after the other in one batch: (N, ...) each -> (streams * N, ...)."""

    def __init__(self, place: Place, streams: int) -> None:
        self.streams = 1 if place.top else streams

    def receive(self, payload: Payload, data: Data | None) -> Tensor:
        return torch.cat(payload)


class Labelled(Bottom):
    """Makes the streams from the data, for a network that ends in one decision per sample.

    Attributes:
        classes: between which the network decides.
    """

    def __init__(self, place: Place, method: str, streams: int) -> None:
        self.streams, self._method = streams, method
        self.classes, *positions = place.shapes[-1]
        if place.modules and (positions or self.classes < 2):
            raise UserError(
                f"{method} needs one decision per sample between at least 2 classes, here the network ends in "
                f"{place.shapes[-1]} per sample; use another method, e.g. greedy_local"
            )

    def receive(self, payload: Payload, data: Data | None) -> Tensor:
        assert data is not None and data.inputs is not None and data.targets is not None
        x, labels = data.inputs, data.targets.to(data.inputs.device)
        if not x.is_floating_point() or labels.is_floating_point() or labels.dim() != 1:
            raise UserError(
                f"{self._method} needs class numbers (N,) and floating-point inputs, got targets {labels.dtype} "
                f"{tuple(labels.shape)} and inputs {x.dtype}; use another method, e.g. greedy_local"
            )
        labels = labels.long()  # of bytes torch makes a mask
        if (labels < 0).any():
            raise UserError(f"{self._method} needs a label for every sample; leave out those whose label is ignored")
        return torch.cat(self.streams_of(x, labels, data.batch))

    def streams_of(self, x: Tensor, labels: Tensor, batch: int) -> list[Tensor]:
        """The streams, the input itself first; `batch` is the batch's number."""
        raise NotImplementedError


class Sends(Lower):
    """Hands the streams up, and the first one alone to the last block."""

    has_objective = True

    def __init__(self, place: Place, streams: int) -> None:
        self._streams, self._sent = streams, 1 if place.k == place.K - 2 else streams
        self.needs_data = place.k == 0  # for the labels that `Labelled` puts into the streams

    def emit(self, y: Tensor, data: Data | None) -> Payload:
        return y.detach().chunk(self._streams)[: self._sent]
