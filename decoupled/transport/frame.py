"""The header of everything that crosses an edge: 48 bytes, the same in both directions.

    magic  version  kind  tensors  edge  sequence  amount  sent  meta bytes  meta checksum  header checksum
     4s       B      B       H      I       Q        Q      d        I            I               I

    source -> target   MESSAGE   meta bytes of two lines of JSON and `amount` bytes of tensors belong to it
                       PART      `amount` more bytes of the message's tensors lie in the shared memory
    target -> source   CREDIT    `amount` messages were taken: so many more may be sent
                       RELEASE   `amount` bytes more may be sent: of the shared memory they are free again; for those
                                 that stay on a device, memory lies ready ("clear to send")
    both               GOODBYE   nothing will follow

A header is checked field by field before anything it announces is read or allocated.
"""

from __future__ import annotations

import struct
import zlib
from enum import IntEnum
from typing import NamedTuple

from decoupled.errors import ProtocolError

MAGIC, VERSION = b"dcpl", 2
_FIELDS = struct.Struct("!4sBBHIQQdII")
_CHECKSUM = struct.Struct("!I")
SIZE = _FIELDS.size + _CHECKSUM.size

# The most that a message may announce. Far above what training needs, far below what brings a machine down.
META_LIMIT = 1 << 20  # bytes
PAYLOAD_LIMIT = 1 << 35  # bytes
TENSORS_LIMIT = 1 << 12


class Kind(IntEnum):
    """What a frame is."""

    MESSAGE = 1
    PART = 2
    CREDIT = 3
    RELEASE = 4
    GOODBYE = 5


class Frame(NamedTuple):
    """A header: `amount` counts messages or bytes (see above), `sent` is the sender's `time.perf_counter`."""

    kind: Kind
    amount: int = 0
    sent: float = 0.0
    meta: bytes = b""
    tensors: int = 0


class Header(NamedTuple):
    """A checked header whose meta has not been read yet."""

    kind: Kind
    amount: int
    sent: float
    tensors: int
    meta_bytes: int
    meta_checksum: int

    def frame(self, meta: bytes, edge: str) -> Frame:
        """Join header and meta."""
        if zlib.crc32(meta) != self.meta_checksum:
            raise ProtocolError(f"edge {edge}: the checksum of a message's description is wrong")
        return Frame(self.kind, self.amount, self.sent, meta, self.tensors)


def number(edge: str, run: int) -> int:
    """The number of an edge in headers: tells edges and runs apart."""
    return zlib.crc32(f"{edge}#{run}".encode())


def pack(frame: Frame, edge: int, sequence: int) -> bytes:
    """The bytes of a frame, without its meta."""
    fields = _FIELDS.pack(
        MAGIC,
        VERSION,
        frame.kind,
        frame.tensors,
        edge,
        sequence,
        frame.amount,
        frame.sent,
        len(frame.meta),
        zlib.crc32(frame.meta),
    )
    return fields + _CHECKSUM.pack(zlib.crc32(fields))


def unpack(data: bytes | bytearray | memoryview, edge: int, sequence: int, name: str) -> Header:
    """Check the header `data` of the frame `sequence` of edge number `edge`; `name` is the edge's, for errors.

    Raises:
        ProtocolError: it says which field is wrong, and how.
    """
    magic, version, kind, tensors, edge_, sequence_, amount, sent, meta_bytes, meta_checksum = _FIELDS.unpack_from(data)
    found = (magic, version, *_CHECKSUM.unpack_from(data, _FIELDS.size), edge_, sequence_)
    due = (MAGIC, VERSION, zlib.crc32(data[: _FIELDS.size]), edge, sequence)
    if found != due:
        what, is_, was = next(trio for trio in zip(_CHECKED, found, due, strict=True) if trio[1] != trio[2])
        raise ProtocolError(f"edge {name}: a header has {what} {is_!r} where {was!r} is due")
    if kind not in _KINDS:
        raise ProtocolError(f"edge {name}: a header of unknown kind {kind}")
    if tensors > TENSORS_LIMIT or meta_bytes > META_LIMIT or amount > PAYLOAD_LIMIT:
        announced = (
            ("tensors", tensors, TENSORS_LIMIT),
            ("bytes of description", meta_bytes, META_LIMIT),
            ("bytes of tensors", amount, PAYLOAD_LIMIT),
        )
        what, found, limit = next(one for one in announced if one[1] > one[2])
        raise ProtocolError(f"edge {name}: a header announces {found} {what}, more than the limit of {limit}")
    return Header(_KINDS[kind], amount, sent, tensors, meta_bytes, meta_checksum)


_KINDS = {int(kind): kind for kind in Kind}
_CHECKED = ("magic", "protocol version", "checksum", "edge number", "sequence number")
