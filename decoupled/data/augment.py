"""Augmentation: a random crop of the padded image and a random horizontal flip.

What is drawn is apart from what is done with it, so that a loader can draw for all samples of an epoch at once and the
change of a sample does not depend on the batch it is in::

    draws = augment.draw(len(split), generator)          (3, N): down, right, mirrored
    inputs = augment.apply(images, draws[:, indices])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from decoupled.errors import UserError


@dataclass(frozen=True)
class Augment:
    """Shift every image by up to `padding` pixels each way, and mirror it with probability one half.

    Attributes:
        padding: pixels added on each side before a crop of the original size is taken; 0 = no shift.
        flip: whether to mirror left and right (not for digits and letters).
        fill: value of the added pixels, in standardised units: the background.
    """

    padding: int = 0
    flip: bool = False
    fill: float = 0.0

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise UserError(f"padding must not be negative, got {self.padding}; 0 means no shift")

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return the changes of `count` images, int64 (3, count): shift down, shift right, mirrored."""
        shifts = torch.randint(2 * self.padding + 1, (2, count), generator=generator)
        mirrored = torch.randint(2, (1, count), generator=generator) if self.flip else torch.zeros_like(shifts[:1])
        return torch.cat([shifts, mirrored])

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return copies of `images` (N, C, H, W), each changed as its column of `draws` (3, N) says."""
        if images.dim() != 4:
            raise UserError(
                f"augmentation takes images (N, C, H, W), got shape {tuple(images.shape)}; use augment=None"
            )
        count, _, height, width = images.shape
        pad = self.padding
        padded = torch.nn.functional.pad(images, (pad, pad, pad, pad), value=self.fill)
        # One gather for the whole batch: rows (N, H) and columns (N, W) say where each pixel comes from.
        down, right, mirrored = draws[:, :, None]
        rows, columns = down + torch.arange(height), right + torch.arange(width)
        columns = torch.where(mirrored.bool(), columns.flip(1), columns)
        sample = torch.arange(count)[:, None, None]
        # Channels move to the end while indexing, so that one index triple serves all of them.
        return (
            padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
        )

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return changed copies of `images` (N, C, H, W); each image draws its own shift and flip from `generator`."""
        return self.apply(images, self.draw(len(images), generator))
