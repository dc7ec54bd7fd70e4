"""Batches as a pure function of (seed, epoch, batch number), a sample's augmentation of (seed, epoch, sample).

A loader holds no random state: the order and the augmentation of an epoch are drawn from generators seeded by (seed,
epoch), the latter for all samples at once. So a run that goes on from a checkpoint, another runtime, another method or
another batch size sees the same images, and the epoch is all there is to save. An epoch can repeat the augmentation of
another one in a new order (`set_draw`), for what is kept per sample from epoch to epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from decoupled.data.augment import Augment
from decoupled.data.dataset import Split
from decoupled.errors import UserError
from decoupled.specs import positive

# They keep the streams of random numbers apart: no seed of an order is ever the seed of an augmentation.
_ORDER, _AUGMENT = 0, 1


class Batch(NamedTuple):
    """Some samples of a split, N of them.

    Attributes:
        inputs: shape (N, *inputs), augmented if the loader augments.
        targets: int64, shape (N,).
        indices: int64, shape (N,): positions in the split; they address per-sample state.
    """

    inputs: Tensor
    targets: Tensor
    indices: Tensor


def _generator(*key: int) -> torch.Generator:
    """Return a generator whose state depends on all the numbers of the key, and changes with each."""
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


class Loader:
    """An iterable of `Batch` over one split.

    Each ``iter(loader)`` is one epoch: that of the last `set_epoch`, and the next one every time after. The epoch
    advances when the iteration starts, so one that is broken off is not repeated. `set_draw` holds for one epoch.

    Args:
        split: the samples.
        batch_size: samples in a batch; the last batch may be smaller.
        shuffle: a new random order every epoch; else the order of the split.
        seed: of order and augmentation; not negative.
        augment: random changes of the inputs; None leaves them as they are.
        drop_last: leave out a last batch that is smaller.

    Raises:
        UserError: a batch size below 1, a negative seed, or no batch at all.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        augment: Augment | None = None,
        drop_last: bool = False,
    ) -> None:
        positive("Loader", batch_size=batch_size)
        if seed < 0:
            raise UserError(f"a loader's seed must not be negative, got {seed}")
        if drop_last and len(split) < batch_size:
            raise UserError(
                f"drop_last leaves no batch: {len(split)} samples in batches of {batch_size}; "
                f"use batch_size={len(split)} or less"
            )
        self.split, self.batch_size, self.shuffle, self.seed = split, batch_size, shuffle, seed
        self.augment, self.drop_last = augment, drop_last
        self._epoch, self._draw = 0, 0

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        batches = len(self.split) / self.batch_size
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    def __iter__(self) -> Iterator[Batch]:
        epoch, draw = self._epoch, self._draw
        self.set_epoch(epoch + 1)
        return self._batches(epoch, draw)

    def _batches(self, epoch: int, draw: int) -> Iterator[Batch]:
        order, augment = self.order(epoch), self.augment
        draws = None if augment is None else augment.draw(len(self.split), _generator(_AUGMENT, self.seed, draw))
        for number in range(len(self)):
            indices = order[number * self.batch_size : (number + 1) * self.batch_size]
            inputs = self.split.inputs[indices]
            if augment is not None and draws is not None:
                inputs = augment.apply(inputs, draws[:, indices])
            yield Batch(inputs, self.split.targets[indices], indices)

    def order(self, epoch: int) -> Tensor:
        """Return the positions of the split, int64 of shape (N,), in the order in which `epoch` visits them."""
        if not self.shuffle:
            return torch.arange(len(self.split))
        return torch.randperm(len(self.split), generator=_generator(_ORDER, self.seed, epoch))

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` (0, 1, ...) the one that the next iteration yields."""
        if epoch < 0:
            raise UserError(f"an epoch must not be negative, got {epoch}")
        self._epoch = self._draw = epoch

    def set_draw(self, epoch: int) -> None:
        """Let the next iteration repeat the augmentation of `epoch`; every sample looks as it did there."""
        if epoch < 0:
            raise UserError(f"an epoch must not be negative, got {epoch}")
        self._draw = epoch

    def state_dict(self) -> dict[str, int]:
        """Return what `load_state_dict` needs: the epoch that the next iteration yields."""
        return {"epoch": self._epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the epoch of a `state_dict`."""
        self.set_epoch(int(state["epoch"]))
