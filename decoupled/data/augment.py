"""Augmentation: a random crop of the padded image and a random horizontal flip, drawn from a given generator."""

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

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return changed copies of `images` (N, C, H, W); each image draws its own shift and flip from `generator`."""
        if images.dim() != 4:
            raise UserError(
                f"augmentation takes images (N, C, H, W), got shape {tuple(images.shape)}; use augment=None"
            )
        count, _, height, width = images.shape
        pad = self.padding
        padded = torch.nn.functional.pad(images, (pad, pad, pad, pad), value=self.fill)
        # One gather for the whole batch: rows (N, H) and columns (N, W) say where each pixel comes from.
        down, right = torch.randint(2 * pad + 1, (2, count, 1), generator=generator)
        rows, columns = down + torch.arange(height), right + torch.arange(width)
        if self.flip:
            mirrored = torch.randint(2, (count, 1), generator=generator).bool()
            columns = torch.where(mirrored, columns.flip(1), columns)
        sample = torch.arange(count)[:, None, None]
        # Channels move to the end while indexing, so that one index triple serves all of them.
        return (
            padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
        )
