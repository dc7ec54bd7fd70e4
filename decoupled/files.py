"""Files that are written whole or not at all, and a disk that refuses in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from decoupled.errors import UserError


@contextmanager
def writing(path: Path, part: Path | None = None) -> Iterator[None]:
    """Write `path`; if that fails, nothing is left of `part`, the file that was to become it.

    Raises:
        UserError: the system refuses, e.g. because the disk is full.
    """
    before = sys.exc_info()[1]
    try:
        yield
    except BaseException as error:
        if part is not None:
            part.unlink(missing_ok=True)
        refusal = _refusal(error, before) if isinstance(error, Exception) else None
        if refusal is None:
            raise
        raise UserError(
            f"cannot write {path} ({refusal.strerror or refusal}); make room there, or write elsewhere"
        ) from error


def _refusal(error: BaseException | None, before: BaseException | None) -> OSError | None:
    """The system's own error: torch, closing its archive, raises another one behind it. `before`: is no part of it."""
    while error is not None and error is not before:
        if isinstance(error, OSError):
            return error
        error = error.__context__
    return None


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file: whoever is killed meanwhile leaves the old one or the new one (and perhaps a part, as NAME.new)."""
    new = path.with_name(f"{path.name}.new")
    with writing(path, new):
        new.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(new, path)
