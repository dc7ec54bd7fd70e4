"""Files that are written whole or not at all, and a disk that refuses in one line."""

from __future__ import annotations

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
    try:
        yield
    except BaseException as error:
        if part is not None:
            part.unlink(missing_ok=True)
        refusal = _refusal(error) if isinstance(error, Exception) else None
        if refusal is None:
            raise
        raise UserError(
            f"cannot write {path} ({refusal.strerror or refusal}); make room there, or write elsewhere"
        ) from error


def _refusal(error: BaseException | None) -> OSError | None:
    """The system's own error: torch, closing its archive, raises another one behind it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error
