"""Rows: what an edge keeps per sample of the data set, addressed by sample index.

    indices (batch,) --> get / put --> values (batch, *features)

The table grows to the largest index seen; a row that was never written is unknown.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Rows:
    """One row per sample, grown to the largest index seen; rows never written are unknown."""

    def __init__(self) -> None:
        self._values: Tensor | None = None
        self._known = torch.zeros(0, dtype=torch.bool)

    @property
    def nbytes(self) -> int:
        return 0 if self._values is None else self._values.numel() * self._values.element_size()

    def know(self, indices: Tensor) -> bool:
        """Whether every one of these rows has been written."""
        return len(self._known) > int(indices.max()) and bool(self._known[indices].all())

    def get(self, indices: Tensor) -> Tensor:
        assert self._values is not None
        return self._values[indices]

    def put(self, indices: Tensor, values: Tensor) -> None:
        missing = int(indices.max()) + 1 - len(self._known)
        if self._values is None:
            self._values = values.new_zeros(0, *values.shape[1:])
        if missing > 0:
            missing = max(missing, len(self._known) // 2)  # grow by half, so that growing stays cheap
            self._values = torch.cat([self._values, values.new_zeros(missing, *values.shape[1:])])
            self._known = torch.cat([self._known, self._known.new_zeros(missing)])
        self._values[indices] = values
        self._known[indices] = True

    def merge(self, indices: Tensor, values: Tensor) -> Tensor:
        """`values`, with the rows that are known replaced by what is stored; the others are stored."""
        known = torch.tensor([n < len(self._known) and bool(self._known[n]) for n in indices.tolist()])
        merged = values.clone()
        if known.any():
            merged[known] = self.get(indices[known])
        self.put(indices, merged)
        return merged

    def state_dict(self) -> dict[str, Any]:
        return {} if self._values is None else {"values": self._values, "known": self._known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._values, self._known = state["values"].clone(), state["known"].clone()
