"""Rows: what an edge keeps per sample of the data set, addressed by sample index.

    indices (batch,) --> get / put --> values (batch, *features)

The table grows to the largest index seen; a row that was never written is unknown. Up to `limit` bytes it lies in
memory, on the device of the values; a larger one lies in a temporary file that is mapped into memory (TMPDIR says
where) and vanishes with the table.
"""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from typing import Any

import torch
from torch import Tensor

from decoupled.errors import UserError


class Rows:
    """One row per sample.

    Args:
        limit: bytes that may lie in memory; infinite: all.

    Attributes:
        memory_bytes, file_bytes: size of the table, in memory or in the file.
    """

    def __init__(self, limit: float = math.inf) -> None:
        self._limit = limit
        self._values: Tensor | None = None
        self._known = torch.zeros(0, dtype=torch.bool)
        self._file: Any = None

    @property
    def memory_bytes(self) -> int:
        return 0 if self._file is not None else self._bytes

    @property
    def file_bytes(self) -> int:
        return 0 if self._file is None else self._bytes

    @property
    def _bytes(self) -> int:
        return 0 if self._values is None else self._values.numel() * self._values.element_size()

    def know(self, indices: Tensor) -> bool:
        """Whether every one of these rows has been written."""
        return len(self._known) > int(indices.max()) and bool(self._known[indices].all())

    def get(self, indices: Tensor) -> Tensor:
        """The rows of these samples; they must be known."""
        assert self._values is not None
        return self._values[indices.to(self._values.device)]

    def put(self, indices: Tensor, values: Tensor) -> None:
        """Write the rows of these samples; of one that is there twice the last counts.

        Raises:
            UserError: a negative index, or a table that the limit or the disk has no room for.
        """
        if int(indices.min()) < 0:
            raise UserError(f"sample index {int(indices.min())}: number the samples of the data set from 0")
        row = values[0].numel() * values.element_size()
        if len(values) * row > self._limit:
            raise UserError(
                f"a memory limit of {self._limit / 2**20:.2g} MiB cannot hold one minibatch of auxiliary variables "
                f"({len(values)} rows of {row} bytes); allow {len(values) * row / 2**20:.2g} MiB or more"
            )
        missing = int(indices.max()) + 1 - len(self._known)
        if missing > 0 or self._values is None:
            self._grow(max(missing, len(self._known) // 8), values)  # ahead, so that growing stays cheap
        assert self._values is not None
        self._values.index_copy_(0, indices.to(self._values.device), values.to(self._values))
        self._known[indices.cpu()] = True

    def merge(self, indices: Tensor, values: Tensor) -> Tensor:
        """`values`, with the rows that are known replaced by what is stored; the others are stored."""
        known = torch.tensor([0 <= n < len(self._known) and bool(self._known[n]) for n in indices.tolist()])
        merged = values.to(values.dtype if self._values is None else self._values.dtype, copy=True)
        if known.any():
            merged[known] = self.get(indices[known]).to(values.device)
        self.put(indices, merged)
        return merged

    def _grow(self, more: int, like: Tensor) -> None:
        """Make room for `more` rows that look like those of `like` (batch, *features)."""
        old, rows = self._values, len(self._known) + more
        fits = rows * like[0].numel() * like.element_size() <= self._limit
        self._values = like.new_zeros(rows, *like.shape[1:]) if fits else self._mapped(rows, like)
        if old is not None and old.data_ptr() != self._values.data_ptr():
            self._values[: len(old)] = old
        self._known = torch.cat([self._known, self._known.new_zeros(more)])

    def _mapped(self, rows: int, like: Tensor) -> Tensor:
        if self._file is None:
            self._file = tempfile.NamedTemporaryFile(prefix="decoupled-rows-")  # noqa: SIM115  (it lives on)
            weakref.finalize(self, self._file.close)
        file, numel = self._file, rows * like[0].numel()
        try:
            os.posix_fallocate(file.fileno(), 0, numel * like.element_size())  # a hole would end the process when full
        except OSError as error:
            raise UserError(
                f"no room for {numel * like.element_size() / 2**20:.0f} MiB of auxiliary variables in "
                f"{tempfile.gettempdir()} ({error.strerror}); set TMPDIR, or raise the memory limit"
            ) from None
        return torch.from_file(file.name, shared=True, size=numel, dtype=like.dtype).view(rows, *like.shape[1:])

    def state_dict(self) -> dict[str, Any]:
        return {} if self._values is None else {"values": self._values, "known": self._known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._values, self._file, self._known = None, None, torch.zeros(0, dtype=torch.bool)
            self._grow(len(state["known"]), state["values"])
            assert self._values is not None
            self._values.copy_(state["values"])
            self._known = state["known"].clone()
