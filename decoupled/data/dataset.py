"""What a dataset is: three splits of standardised images or of sequences, and the augmentation that suits them.

Standardising uses the mean and standard deviation of the *training* split, one value per channel, so nothing about the
held-out samples leaks into training.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decoupled.data.augment import Augment
from decoupled.errors import UserError


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a dataset, in memory.

    Attributes:
        inputs: shape (N, *inputs); float32, or int64 token numbers.
        targets: int64 class labels, shape (N,), or (N, length): one per position of a sequence.

    Raises:
        UserError: no samples, or not one target per input.
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if self.targets.dim() not in (1, 2) or self.targets.dtype != torch.int64:
            raise UserError(
                f"targets must be int64 labels of shape (N,) or (N, length), got {self.targets.dtype} of shape "
                f"{tuple(self.targets.shape)}; convert them with .long() and one label per sample or position"
            )
        if len(self.inputs) != len(self.targets):
            raise UserError(f"{len(self.inputs)} inputs but {len(self.targets)} targets; give one target per input")
        if not len(self.targets):
            raise UserError("a split has no samples; make it at least one sample large")

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification dataset.

    Attributes:
        name: the name `load` knows it by.
        inputs: shape of one sample, e.g. ``(1, 28, 28)``.
        classes: number of classes; labels are 0 ... classes - 1.
        train: the samples to train on.
        validation: held out from training, for choices such as a learning rate.
        test: held out from both, for the number that is reported.
        augment: random changes that keep the class, for a training `Loader`; None where none is known.
        description: what the samples were made from: size and hash of the source.

    Raises:
        UserError: a sample of another shape or a label outside the classes.
    """

    name: str
    inputs: tuple[int, ...]
    classes: int
    train: Split
    validation: Split
    test: Split
    augment: Augment | None = None
    description: str = ""

    @property
    def summary(self) -> str:
        """Name, sizes of the splits and description, in one line."""
        sizes = f"train {len(self.train)}, validation {len(self.validation)}, test {len(self.test)}"
        return f"{self.name}, {sizes}" + (f"; {self.description}" if self.description else "")

    def __post_init__(self) -> None:
        for part in ("train", "validation", "test"):
            split: Split = getattr(self, part)
            if tuple(split.inputs.shape[1:]) != self.inputs:
                raise UserError(
                    f"dataset {self.name!r}, {part}: samples have shape {tuple(split.inputs.shape[1:])}, "
                    f"expected {self.inputs}; declare the shape the samples have"
                )
            low, high = int(split.targets.min()), int(split.targets.max())
            if low < 0 or high >= self.classes:
                raise UserError(
                    f"dataset {self.name!r}, {part}: labels run from {low} to {high}, outside 0 ... "
                    f"{self.classes - 1}; check the label file and the number of classes"
                )


def permutation(samples: int, seed: int) -> np.ndarray:
    """Return a random order of ``range(samples)`` that depends on `seed` only."""
    if seed < 0:
        raise UserError(f"a split seed must not be negative, got {seed}")
    return np.random.Generator(np.random.PCG64(seed)).permutation(samples)


def take_apart(samples: int, held_out: dict[str, int], seed: int, limit: int | None = None) -> dict[str, np.ndarray]:
    """Divide sample numbers at random into the held-out parts and ``train``, which gets the rest.

    Args:
        samples: how many there are.
        held_out: size of every held-out part, by name.
        seed: the parts depend on it and on `samples` only.
        limit: keep at most so many training samples; the held-out parts do not change with it.

    Returns:
        Disjoint arrays of sample numbers by part name.

    Raises:
        UserError: a size below 1, or nothing left to train on.
    """
    for name, size in [*held_out.items(), ("limit", 1 if limit is None else limit)]:
        if size < 1:
            raise UserError(f"{name} must be at least 1 sample, got {size}")
    if sum(held_out.values()) >= samples:
        parts = " + ".join(f"{name} {size}" for name, size in held_out.items())
        raise UserError(f"{parts} leave nothing of {samples} samples to train on; hold out fewer")
    order, parts, start = permutation(samples, seed), {}, 0
    for name, size in held_out.items():
        parts[name] = order[start : start + size]
        start += size
    rest = order[start:]
    parts["train"] = rest if limit is None else rest[:limit]
    return parts


def standardise(images: dict[str, np.ndarray]) -> tuple[dict[str, Tensor], float]:
    """Shift and scale all parts by the statistics of the part ``train``.

    Args:
        images: arrays of shape (N, C, H, W) by part name, any numeric type.

    Returns:
        The parts as float32 tensors (training split: mean 0, standard deviation 1 per channel), and the smallest
        standardised training value: the background, with which a crop may be filled.
    """
    # float64 sums: float32 loses digits over 47 million pixels.
    mean = images["train"].mean(axis=(0, 2, 3), dtype=np.float64)[None, :, None, None].astype(np.float32)
    std = images["train"].std(axis=(0, 2, 3), dtype=np.float64)[None, :, None, None].astype(np.float32)
    std = np.where(std > 0, std, np.float32(1))
    scaled = {part: torch.from_numpy((values.astype(np.float32) - mean) / std) for part, values in images.items()}
    return scaled, float(scaled["train"].min())


def assemble(
    name: str,
    classes: int,
    images: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    padding: int = 1,
    flip: bool = False,
) -> Dataset:
    """Standardise the parts of an image set and put the dataset together.

    Args:
        name, classes: of the dataset.
        images: (N, C, H, W), any numeric type. labels: (N,), integers. Both by part: train, validation, test.
        padding, flip: of its augmentation, see `Augment`.
    """
    scaled, background = standardise(images)
    splits = {part: Split(scaled[part], torch.from_numpy(labels[part].astype(np.int64))) for part in scaled}
    return Dataset(
        name=name,
        inputs=tuple(splits["train"].inputs.shape[1:]),
        classes=classes,
        augment=Augment(padding=padding, flip=flip, fill=background),
        description=_fingerprint(images, labels),
        **splits,
    )


def _fingerprint(images: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> str:
    """How many images and bytes there are, and a hash of images and labels, split by split and in their order."""
    parts = [array for part in ("train", "validation", "test") for array in (images[part], labels[part])]
    hashed = hashlib.sha256()
    for array in parts:
        hashed.update(np.ascontiguousarray(array).data)
    return (
        f"{sum(map(len, labels.values()))} images, {sum(array.nbytes for array in parts)} bytes, "
        f"sha256 {hashed.hexdigest()}"
    )
