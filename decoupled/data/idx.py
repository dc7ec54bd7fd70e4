"""Reading IDX, the format of MNIST and its relatives.

::

    byte 0, 1   zero
    byte 2      type of the entries; 0x08 = unsigned byte, the only one image sets use
    byte 3      number of dimensions d
    4 d bytes   the sizes, big-endian 32-bit
    the rest    the entries, last index fastest
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from decoupled.errors import UserError

_UNSIGNED_BYTE = 0x08
_REMEDY = "replace the file by a fresh copy"


def _content(path: Path) -> bytes:
    """Return the bytes of a file, unpacked if it begins like a gzip file, whatever its name ends in."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"IDX file {path} does not exist; check the path") from None
    except OSError as error:
        raise UserError(f"IDX file {path} cannot be read ({error.strerror}); check its permissions") from error
    if raw[:2] != b"\x1f\x8b":
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"IDX file {path} is truncated or damaged ({error}); {_REMEDY}") from error


def read_idx(path: str | Path, dimensions: int | None = None) -> np.ndarray:
    """Read one IDX file of unsigned bytes, plain or gzip-compressed.

    Args:
        path: the file.
        dimensions: how many dimensions it must have: 3 for images, 1 for labels; None accepts any number.

    Returns:
        A new array of dtype uint8.

    Raises:
        UserError: the file is missing, not an IDX file of unsigned bytes, of another number of dimensions, or shorter
            or longer than its header says. The message names the file and what to do.
    """
    path = Path(path)
    content = _content(path)
    if len(content) < 4:
        raise UserError(f"IDX file {path} is truncated: {len(content)} bytes, not even a header; {_REMEDY}")
    if content[:2] != b"\x00\x00" or content[2] != _UNSIGNED_BYTE:
        raise UserError(
            f"{path} is not an IDX file of unsigned bytes: it begins with 0x{content[:4].hex()}, "
            f"expected 0x000008 and the number of dimensions; check that it is the right file"
        )
    rank = content[3]
    if dimensions is not None and rank != dimensions:
        raise UserError(
            f"IDX file {path} has {rank} dimensions, expected {dimensions}; "
            f"check that images and labels are not swapped"
        )
    start = 4 + 4 * rank
    if len(content) < start:
        raise UserError(f"IDX file {path} is truncated inside its header of {start} bytes; {_REMEDY}")
    shape = struct.unpack(f">{rank}I", content[4:start])
    expected = math.prod(shape)
    if len(content) - start != expected:
        state = "truncated" if len(content) - start < expected else "too long"
        raise UserError(
            f"IDX file {path} is {state}: {len(content) - start} entries, its header says "
            f"{' x '.join(map(str, shape))} = {expected}; {_REMEDY}"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy()
