"""Dense tensors as flat bytes: described for the other process, checked and laid out again there.

tensor  -- lay_out -->  ["float32", [64, 10]], or with strides  -- spec -->  Spec  -->  fresh memory of that layout
        -- piece --->  its bytes, shared                          -- piece -->  its bytes, to be filled
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoupled.errors import ProtocolError
from decoupled.transport.frame import PAYLOAD_LIMIT

Bytes = NDArray[np.uint8]
Piece = Bytes | Tensor  # flat bytes of a tensor: in CPU memory, or on its device

NAMES: dict[torch.dtype, str] = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.complex64, torch.complex128),
    )
}
_BY_NAME = {name: dtype for dtype, name in NAMES.items()}
_NUMPY = frozenset({torch.float16, torch.float32, torch.float64, torch.int64, torch.bool})  # what both sides know
_INTEGERS = frozenset({int})
_DIMENSIONS = 64
_LAYOUTS = 1 << 12  # descriptions of tensors kept: messages of an edge are alike


class Spec(NamedTuple):
    """A checked description of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    nbytes: int
    stays: bool = False  # on its device


def lay_out(tensor: Tensor, tensors: list[Tensor]) -> Sequence[Any]:
    """Add `tensor`, as dense memory on its device, to `tensors`; returns its description.

    Raises:
        ProtocolError: it is not dense memory, or has a dtype or more dimensions than messages can carry.
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise ProtocolError(f"a tensor is not dense memory, but of {tensor.layout} on {tensor.device}")
    if tensor.dtype not in NAMES:
        raise ProtocolError(f"no tensors of {tensor.dtype}; known: {', '.join(_BY_NAME)}")
    if tensor.dim() > _DIMENSIONS:
        raise ProtocolError(f"a tensor has {tensor.dim()} dimensions; the limit is {_DIMENSIONS}")
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    description, has_gaps = _description(tensor.dtype, tensor.shape, tensor.stride())
    if has_gaps:
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    tensors.append(tensor)
    return description


@functools.lru_cache(_LAYOUTS)
def _description(dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[Sequence[Any], bool]:
    """What `spec` reads, and whether the tensor must be copied because its memory has gaps."""
    usual = (NAMES[dtype], tuple(shape))
    if strides == _usual_strides(shape):
        return usual, False
    return ((*usual, strides), False) if is_dense(shape, strides) else (usual, True)


def spec(dtype: Any, shape: Any, strides: Any = None) -> Spec:
    """A checked description of a tensor: nothing absurd passes."""
    if type(dtype) is not str or dtype not in _BY_NAME:
        raise ProtocolError(f"unknown dtype {str(dtype)[:40]!r}")
    for numbers in (shape,) if strides is None else (shape, strides):
        if type(numbers) is not list or len(numbers) > _DIMENSIONS or not _INTEGERS.issuperset(map(type, numbers)):
            raise ProtocolError(f"a tensor has the impossible shape or strides {str(numbers)[:80]}")
    return _checked(dtype, tuple(shape), None if strides is None else tuple(strides))


@functools.lru_cache(_LAYOUTS)
def _checked(dtype: str, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> Spec:
    if any(not 0 <= n <= PAYLOAD_LIMIT for n in (*shape, *(strides or ()))):
        raise ProtocolError(f"a tensor has the impossible shape or strides {str(strides or shape)[:80]}")
    kind = _BY_NAME[dtype]
    laid_out = _usual_strides(shape) if strides is None else strides
    nbytes = math.prod(shape) * kind.itemsize
    if nbytes > PAYLOAD_LIMIT or any(n > PAYLOAD_LIMIT for n in laid_out):
        raise ProtocolError(f"a tensor announces {nbytes} bytes, more than the limit of {PAYLOAD_LIMIT}")
    if strides is not None and (len(shape) != len(strides) or not is_dense(shape, laid_out)):
        raise ProtocolError(f"strides {strides} do not fit the shape {shape}")
    return Spec(kind, shape, laid_out, nbytes)


def _usual_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, size = [], 1
    for length in reversed(shape):
        strides.append(size)
        size *= max(length, 1)
    return tuple(reversed(strides))


def _memory_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """Dimensions from the one with the largest strides to the one with the smallest."""
    return sorted(range(len(shape)), key=lambda d: (-strides[d], -shape[d]))


def is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements fill their memory without gaps or overlaps (strides of dimensions of length 1 are free)."""
    size = 1
    for d in reversed(_memory_order(shape, strides)):
        if shape[d] > 1 and 0 not in shape:
            if strides[d] != size:
                return False
            size *= shape[d]
    return True


def piece(tensor: Tensor, stays: bool) -> Piece:
    """The memory of a dense tensor as flat bytes."""
    if not tensor.numel():
        return np.empty(0, np.uint8)
    if not stays and tensor.dtype in _NUMPY and tensor.is_contiguous():
        return tensor.numpy().reshape(-1).view(np.uint8)
    flat = torch.as_strided(tensor, (tensor.numel(),), (1,), tensor.storage_offset()).view(torch.uint8)
    return flat if stays else flat.numpy()
