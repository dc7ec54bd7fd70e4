"""Messages as bytes and back: two lines of JSON and the raw bytes of the tensors. Nothing is ever unpickled.

    Up(key=(1, "a"), version=3, payload=(t,), ...)
      -> meta    [1,"a",3,...]                                                                  values, in order
                 {"kind": "Up", "fields": {"key": {"t": [null, null]}, "version": null,         layout
                                           "payload": {"t": [{"x": ["float32", [64, 10]]}]}, ...}}
      -> pieces  [the bytes of t]

In the layout null stands for the next value (None, a bool, int, float or str); the rest is tagged: {"t": tuple}, {"f":
frozenset}, {"x": [dtype, shape, strides]} for the next tensor (strides only where they are not the usual ones; gaps in
memory are closed before sending). {"d": ...} is a tensor that stays on its device on the way; all others are sent from,
and arrive in, CPU memory. Messages of an edge are alike: layouts are written and read once, values every time.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from decoupled.errors import ProtocolError
from decoupled.messages import Data, Down, End, Losses, Message, Probe, Up
from decoupled.transport import cuda
from decoupled.transport.dense import Piece, Spec, lay_out, piece, spec
from decoupled.transport.frame import META_LIMIT, PAYLOAD_LIMIT, TENSORS_LIMIT

_Kind = TypeVar("_Kind", bound=type[Message])

_PLAIN = frozenset({type(None), bool, int, float, str})  # JSON knows them
_TAGS: dict[type, str] = {tuple: "t", frozenset: "f"}
_COLLECTIONS = {tag: collection for collection, tag in _TAGS.items()}
_KEPT = 1 << 10  # layouts kept of messages, sent and arrived: those of an edge are alike
_SMALL, _FEW = 1 << 12, 1 << 8  # bytes, and values, of a layout that is kept
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
    values: list[Any] = []
    tensors: list[Tensor] = []
    try:
        layout = tuple([_pack(part, values, tensors, keep) for part in _parts(kind)(message)])
        write = _layout_text if len(values) <= _FEW else _layout_text.__wrapped__
        meta = _TEXT.encode(values).encode() + b"\n" + write(kind, layout)
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
        return Encoded(meta, [piece(tensor, False) for tensor in tensors])
    pieces = [piece(t, _stays(t, keep)) for t in cuda.to_host(tensors, keep)]
    stays = any(isinstance(one, Tensor) for one in pieces)
    return Encoded(meta, pieces, cuda.computed(keep) if stays else cuda.nothing)


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
        try:
            values, _, layout = meta.partition(b"\n")
            read = _read_layout if len(layout) <= _SMALL else _read_layout.__wrapped__
            self._layout = read(layout)
            self._values, due = json.loads(values), self._layout.values
            if (
                type(self._values) is not list
                or len(self._values) != due
                or not _PLAIN.issuperset(map(type, self._values))
            ):
                raise ProtocolError(f"{due} plain values are due, but {str(self._values)[:80]} arrived")
        except ProtocolError as error:
            raise ProtocolError(f"edge {edge}: {error}") from None
        except (ValueError, TypeError, KeyError, LookupError, AttributeError, RecursionError) as error:
            raise ProtocolError(
                f"edge {edge}: what arrived does not describe a known message: {type(error).__name__}: {error}"
            ) from None
        specs = self._layout.specs
        if len(specs) != tensors or self._layout.nbytes != size:
            raise ProtocolError(
                f"edge {edge}: a message describes {len(specs)} tensors of {self._layout.nbytes} bytes, "
                f"its header announced {tensors} of {size}"
            )
        if device is None and any(one.stays for one in specs):
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
        self.pieces = [piece(tensor, one.stays) for tensor, one in zip(self._tensors, specs, strict=True)]

    def message(self) -> Message:
        """The message, once the pieces are filled."""
        kind, parts = self._layout.kind, [*self._values, *reversed(self._tensors)]
        try:
            return kind(**{name: _fill(part, parts) for name, part in self._layout.fields})
        except Exception as error:  # a message kind may refuse anything
            raise ProtocolError(f"edge {self._edge}: a {kind.__name__} arrived that is not one: {error}") from error


@functools.cache
def _fields(kind: type[Message]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


@functools.cache
def _parts(kind: type[Message]) -> Callable[[Message], tuple[Any, ...]]:
    """What reads all fields of a message."""
    first, *more = _fields(kind)
    read = operator.attrgetter(first, *more)
    return read if more else lambda message: (read(message),)


# Where a part of a message comes from: value n is n, tensor n is ~n, a tuple or frozenset is its type and its parts.
_Part = int | tuple[type, list[Any]]


class _Layout(NamedTuple):
    """A layout that arrived, checked."""

    kind: type[Message]
    fields: tuple[tuple[str, _Part], ...]
    values: int  # how many belong to it
    specs: tuple[Spec, ...]
    nbytes: int  # of all tensors


def _pack(value: Any, values: list[Any], tensors: list[Tensor], keep: torch.device | None) -> Any:
    """The layout of `value`, which can be hashed; what it holds is added to `values` and `tensors`."""
    if type(value) in _PLAIN:
        values.append(value)
        return None
    if isinstance(value, int):  # a number with something attached travels as the number
        values.append(int(value))
        return None
    if type(value) in _TAGS:
        return (_TAGS[type(value)], tuple([_pack(item, values, tensors, keep) for item in value]))
    if isinstance(value, Tensor):
        description = lay_out(value, tensors)
        return ("d" if _stays(tensors[-1], keep) else "x", description)
    raise ProtocolError(
        f"it holds a {type(value).__name__}; messages hold tensors, None, bool, int, float, str, tuple and frozenset"
    )


@functools.lru_cache(_KEPT)
def _layout_text(kind: type[Message], layout: tuple[Any, ...]) -> bytes:
    fields = dict(zip(_fields(kind), map(_tagged, layout), strict=True))
    return _TEXT.encode({"kind": kind.__name__, "fields": fields}).encode()


def _tagged(part: Any) -> Any:
    if part is None:
        return None
    tag, inner = part
    return {tag: inner if tag in ("x", "d") else list(map(_tagged, inner))}


def _stays(tensor: Tensor, keep: torch.device | None) -> bool:
    return keep is not None and tensor.device == keep and tensor.numel() > 0


@functools.lru_cache(_KEPT)
def _read_layout(text: bytes) -> _Layout:
    """Check a layout. Errors are those of JSON, of looking something up, or a ProtocolError."""
    description = json.loads(text)
    kind = _kinds[description["kind"]]
    specs: list[Spec] = []
    values = itertools.count()
    fields = tuple((name, _unpack(part, values, specs)) for name, part in description["fields"].items())
    if dict(fields).keys() != set(_fields(kind)):
        raise ProtocolError(f"a {kind.__name__} arrived with the fields {', '.join(dict(fields))}")
    return _Layout(kind, fields, next(values), tuple(specs), sum([one.nbytes for one in specs]))


def _unpack(part: Any, values: Iterator[int], specs: list[Spec]) -> _Part:
    if part is None:
        return next(values)
    if type(part) is dict and len(part) == 1:
        ((tag, inner),) = part.items()
        if tag in _COLLECTIONS and type(inner) is list:
            return (_COLLECTIONS[tag], [_unpack(item, values, specs) for item in inner])
        if tag in ("x", "d") and type(inner) is list:
            found = spec(*inner)
            specs.append(found if tag == "x" else found._replace(stays=True))
            return ~(len(specs) - 1)
    raise ProtocolError(f"unknown value in a message: {str(part)[:80]}")


def _fill(part: _Part, parts: list[Any]) -> Any:
    """`parts` holds the values, then the tensors from the last to the first, so that ~n is tensor n."""
    if type(part) is int:
        return parts[part]
    collection, inner = part  # type: ignore[misc]
    return collection([_fill(item, parts) for item in inner])
