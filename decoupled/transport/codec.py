"""Messages as bytes and back: a description in JSON and the raw bytes of the tensors. Nothing is ever unpickled.

    Up(key=(1, "a"), version=3, payload=(t,), ...)
      -> meta    {"kind": "Up", "fields": {"key": {"t": [1, "a"]}, "version": 3,
                                           "payload": {"t": [{"x": ["float32", [64, 10]]}]}, ...}}
      -> pieces  [the bytes of t]

A value is None, a bool, int, float or str, or tagged: {"t": tuple}, {"f": frozenset}, {"x": [dtype, shape, strides]}
for the next tensor (strides only where they are not the usual ones; gaps in memory are closed before sending). {"d":
...} is a tensor that stays on its device on the way; all others are sent from, and arrive in, CPU memory.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoupled.errors import ProtocolError
from decoupled.messages import Data, Down, End, Losses, Message, Probe, Up
from decoupled.transport import cuda
from decoupled.transport.frame import META_LIMIT, PAYLOAD_LIMIT, TENSORS_LIMIT

Bytes = NDArray[np.uint8]
Piece = Bytes | Tensor  # flat bytes of a tensor: in CPU memory, or on its device
_Kind = TypeVar("_Kind", bound=type[Message])

_NAMES: dict[torch.dtype, str] = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.complex64, torch.complex128),
    )
}
_BY_NAME = {name: dtype for dtype, name in _NAMES.items()}
_NUMPY = frozenset({torch.float16, torch.float32, torch.float64, torch.int64, torch.bool})  # what both sides know
_PLAIN = frozenset({type(None), bool, int, float, str})  # JSON knows them
_INTEGERS = frozenset({int})
_DIMENSIONS = 64
_LAYOUTS = 1 << 12  # descriptions of tensors kept: messages of an edge are alike
_TEXT = json.JSONEncoder(separators=(",", ":"))

_kinds: dict[str, type[Message]] = {}


def register(kind: _Kind) -> _Kind:
    """Let messages of this frozen dataclass cross processes; usable as a decorator. Sender and receiver must do it."""
    if _kinds.setdefault(kind.__name__, kind) is not kind:
        raise ProtocolError(f"another message kind is already registered as {kind.__name__!r}; rename one of the two")
    if not dataclasses.is_dataclass(kind):
        raise ProtocolError(f"message kind {kind.__name__!r} is not a dataclass; decorate it")
    return kind


for _kind in (Message, End, Data, Losses, Probe, Up, Down):
    register(_kind)


class Encoded(NamedTuple):
    """A message as bytes; each piece is the memory of one tensor, shared where possible.

    `computed` waits until the pieces that stay on a device have been computed.
    """

    meta: bytes
    pieces: list[Piece]
    computed: Callable[[], None] = cuda.nothing


def encode(message: Message, edge: str, keep: torch.device | None = None) -> Encoded:
    """Describe `message` and lay out its tensors; those on the device `keep` stay there. `edge` is for errors.

    Raises:
        ProtocolError: it holds something that cannot be sent.
    """
    kind = type(message)
    if _kinds.get(kind.__name__) is not kind:
        raise ProtocolError(f"edge {edge}: messages of kind {kind.__name__!r} are unknown; codec.register them")
    tensors: list[Tensor] = []
    try:
        fields = {name: _pack(getattr(message, name), tensors, keep) for name in _fields(kind)}
        meta = _TEXT.encode({"kind": kind.__name__, "fields": fields}).encode()
    except (ValueError, RecursionError, ProtocolError) as error:
        raise ProtocolError(f"edge {edge}: a message {kind.__name__} cannot be sent: {error}") from None
    size = sum([tensor.nbytes for tensor in tensors])
    if len(meta) > META_LIMIT or len(tensors) > TENSORS_LIMIT or size > PAYLOAD_LIMIT:
        raise ProtocolError(
            f"edge {edge}: a message {kind.__name__} is too large: {len(meta)} bytes of description "
            f"(limit {META_LIMIT}), {len(tensors)} tensors (limit {TENSORS_LIMIT}), {size} bytes of tensors "
            f"(limit {PAYLOAD_LIMIT})"
        )
    if keep is None and all(tensor.is_cpu for tensor in tensors):
        return Encoded(meta, [_piece(tensor, False) for tensor in tensors])
    pieces = [_piece(t, _stays(t, keep)) for t in cuda.to_host(tensors, keep)]
    return Encoded(meta, pieces, cuda.computed(keep))


class Draft:
    """A message whose tensors have not arrived yet.

    Args:
        meta: the description.
        tensors, size: how many tensors and bytes of them the header announced.
        edge: for errors.
        device: where the tensors go that stay on a device; None: there are none.
        pin: whether the others are put into pinned memory, from where a GPU copies them without anybody waiting.

    Attributes:
        pieces: fresh memory for the bytes of each tensor, to be filled.

    Raises:
        ProtocolError: the description is not one of a message, or disagrees with the header; nothing was allocated.
    """

    def __init__(
        self, meta: bytes, tensors: int, size: int, edge: str, device: torch.device | None = None, pin: bool = False
    ) -> None:
        self._edge = edge
        specs: list[_Spec] = []
        try:
            description = json.loads(meta)
            self._kind = _kinds[description["kind"]]
            fields = {name: _unpack(value, specs) for name, value in description["fields"].items()}
        except ProtocolError as error:
            raise ProtocolError(f"edge {edge}: {error}") from None
        except (ValueError, TypeError, KeyError, LookupError, AttributeError, RecursionError) as error:
            raise ProtocolError(
                f"edge {edge}: what arrived does not describe a known message: {type(error).__name__}: {error}"
            ) from None
        if fields.keys() != set(_fields(self._kind)):
            raise ProtocolError(f"edge {edge}: a {self._kind.__name__} arrived with the fields {', '.join(fields)}")
        found = sum([spec.nbytes for spec in specs])
        if len(specs) != tensors or found != size:
            raise ProtocolError(
                f"edge {edge}: a message describes {len(specs)} tensors of {found} bytes, "
                f"its header announced {tensors} of {size}"
            )
        self._fields = fields
        if device is None and any(spec.stays for spec in specs):
            raise ProtocolError(f"edge {edge}: a tensor should come from a device, but no device is at this end")
        try:
            self._tensors = [
                torch.empty_strided(s.shape, s.strides, dtype=s.dtype, device=device)
                if s.stays
                else torch.empty_strided(s.shape, s.strides, dtype=s.dtype, pin_memory=pin)
                for s in specs
            ]
        except RuntimeError as error:
            raise ProtocolError(f"edge {edge}: no memory for tensors of {size} bytes: {error}") from None
        self.pieces = [_piece(tensor, spec.stays) for tensor, spec in zip(self._tensors, specs, strict=True)]

    def message(self) -> Message:
        """The message, once the pieces are filled."""
        fields = {name: _fill(value, self._tensors) for name, value in self._fields.items()}
        try:
            return self._kind(**fields)
        except Exception as error:  # a message kind may refuse anything
            raise ProtocolError(
                f"edge {self._edge}: a {self._kind.__name__} arrived that is not one: {error}"
            ) from error


@functools.cache
def _fields(kind: type[Message]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


class _Spec(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    nbytes: int
    stays: bool = False  # on its device


class _Slot(NamedTuple):
    number: int  # of the tensor that belongs here


def _pack(value: Any, tensors: list[Tensor], keep: torch.device | None) -> Any:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, int):  # a number with something attached travels as the number
        return int(value)
    if type(value) is tuple:
        return {"t": [_pack(item, tensors, keep) for item in value]}
    if type(value) is frozenset:
        return {"f": [_pack(item, tensors, keep) for item in value]}
    if isinstance(value, Tensor):
        description = _lay_out(value, tensors)
        return {"d" if _stays(tensors[-1], keep) else "x": description}
    raise ProtocolError(
        f"it holds a {type(value).__name__}; messages hold tensors, None, bool, int, float, str, tuple and frozenset"
    )


def _stays(tensor: Tensor, keep: torch.device | None) -> bool:
    return keep is not None and tensor.device == keep and tensor.numel() > 0


def _unpack(value: Any, specs: list[_Spec]) -> Any:
    if type(value) in _PLAIN:
        return value
    if type(value) is dict and len(value) == 1:
        ((tag, inner),) = value.items()
        if tag == "t" and type(inner) is list:
            return tuple(_unpack(item, specs) for item in inner)
        if tag == "f" and type(inner) is list:
            return frozenset(_unpack(item, specs) for item in inner)
        if tag in ("x", "d") and type(inner) is list:
            spec = _spec(*inner)
            specs.append(spec if tag == "x" else spec._replace(stays=True))
            return _Slot(len(specs) - 1)
    raise ProtocolError(f"unknown value in a message: {str(value)[:80]}")


def _fill(value: Any, tensors: list[Tensor]) -> Any:
    if type(value) in _PLAIN:
        return value
    if type(value) is _Slot:
        return tensors[value.number]
    return type(value)([_fill(item, tensors) for item in value])


def _lay_out(tensor: Tensor, tensors: list[Tensor]) -> Sequence[Any]:
    """Add `tensor`, as dense memory on its device, to `tensors`; returns its description."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise ProtocolError(f"a tensor is not dense memory, but of {tensor.layout} on {tensor.device}")
    if tensor.dtype not in _NAMES:
        raise ProtocolError(f"no tensors of {tensor.dtype}; known: {', '.join(_BY_NAME)}")
    if tensor.dim() > _DIMENSIONS:
        raise ProtocolError(f"a tensor has {tensor.dim()} dimensions; the limit is {_DIMENSIONS}")
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
    """What `_spec` reads, and whether the tensor must be copied because its memory has gaps."""
    usual = (_NAMES[dtype], tuple(shape))
    if strides == _usual_strides(shape):
        return usual, False
    return ((*usual, strides), False) if _is_dense(shape, strides) else (usual, True)


def _spec(dtype: Any, shape: Any, strides: Any = None) -> _Spec:
    """A checked description of a tensor: nothing absurd passes."""
    if type(dtype) is not str or dtype not in _BY_NAME:
        raise ProtocolError(f"unknown dtype {str(dtype)[:40]!r}")
    for numbers in (shape,) if strides is None else (shape, strides):
        if type(numbers) is not list or len(numbers) > _DIMENSIONS or not _INTEGERS.issuperset(map(type, numbers)):
            raise ProtocolError(f"a tensor has the impossible shape or strides {str(numbers)[:80]}")
    return _checked(dtype, tuple(shape), None if strides is None else tuple(strides))


@functools.lru_cache(_LAYOUTS)
def _checked(dtype: str, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> _Spec:
    if any(not 0 <= n <= PAYLOAD_LIMIT for n in (*shape, *(strides or ()))):
        raise ProtocolError(f"a tensor has the impossible shape or strides {str(strides or shape)[:80]}")
    kind = _BY_NAME[dtype]
    laid_out = _usual_strides(shape) if strides is None else strides
    nbytes = math.prod(shape) * kind.itemsize
    if nbytes > PAYLOAD_LIMIT or any(n > PAYLOAD_LIMIT for n in laid_out):
        raise ProtocolError(f"a tensor announces {nbytes} bytes, more than the limit of {PAYLOAD_LIMIT}")
    if strides is not None and (len(shape) != len(strides) or not _is_dense(shape, laid_out)):
        raise ProtocolError(f"strides {strides} do not fit the shape {shape}")
    return _Spec(kind, shape, laid_out, nbytes)


def _usual_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, size = [], 1
    for length in reversed(shape):
        strides.append(size)
        size *= max(length, 1)
    return tuple(reversed(strides))


def _memory_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """Dimensions from the one with the largest strides to the one with the smallest."""
    return sorted(range(len(shape)), key=lambda d: (-strides[d], -shape[d]))


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements fill their memory without gaps or overlaps (strides of dimensions of length 1 are free)."""
    size = 1
    for d in reversed(_memory_order(shape, strides)):
        if shape[d] > 1 and 0 not in shape:
            if strides[d] != size:
                return False
            size *= shape[d]
    return True


def _piece(tensor: Tensor, stays: bool) -> Piece:
    """The memory of a dense tensor as flat bytes."""
    if not tensor.numel():
        return np.empty(0, np.uint8)
    if not stays and tensor.dtype in _NUMPY and tensor.is_contiguous():
        return tensor.numpy().reshape(-1).view(np.uint8)
    flat = torch.as_strided(tensor, (tensor.numel(),), (1,), tensor.storage_offset()).view(torch.uint8)
    return flat if stays else flat.numpy()
