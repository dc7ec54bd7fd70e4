"""Every error a user can meet: what went wrong, where, and what to do about it.

`UserError` is a mistake in what was asked (exit code 2 on the command line); the others are failures of a run (exit
code 1) and name block, batch and operation.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input; the message is one line and ends with the remedy."""


class WrongType(UserError, TypeError):
    """Wrong input of a wrong type."""


class OperationError(RuntimeError):
    """An operation of an actor failed; `__cause__` is the original exception with its traceback.

    Attributes:
        actor: name of the actor, e.g. ``"block1"``.
        operation: the operation, e.g. ``"B3"`` (backward of batch 3).
    """

    def __init__(self, actor: str, operation: str, cause: BaseException, method: str = "") -> None:
        by = f" (method {method!r})" if method else ""
        super().__init__(f"{actor}, operation {operation}{by}: {type(cause).__name__}: {cause}")
        self.actor, self.operation, self.method, self.__cause__ = actor, operation, method, cause

    def __reduce__(self) -> tuple[type, tuple]:  # it may have to travel to another process
        return OperationError, (self.actor, self.operation, self.__cause__, self.method)


class NonFiniteError(RuntimeError):
    """A loss, or what an environment gives, became NaN or infinite."""


class ProtocolError(RuntimeError):
    """A message arrived that the protocol does not allow (wrong batch, wrong number of tensors, a live graph)."""


class PeerLost(RuntimeError):
    """Another process of the run has died, hangs, or has left; names rank, blocks, edges and the last batch."""


class RemoteError(RuntimeError):
    """An exception of another process that cannot itself be brought here; its traceback is a note."""


class StallError(RuntimeError):
    """Every actor waits and no message is under way: the wiring or an order is wrong."""


class Stopped(BaseException):
    """Raised inside an actor's thread to unwind it after another actor failed; never reaches the user."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name closest to `name`, or an empty string."""
    folded = {one.casefold(): one for one in known}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)
    return f" Did you mean {folded[close[0]]!r}?" if close else ""


def unknown(kind: str, name: object, known: Iterable[str]) -> UserError:
    """Build the error for an unknown `kind` of thing called `name`, with the nearest and all known names."""
    known = sorted(known)
    return UserError(f"unknown {kind} {name!r}.{nearest(str(name), known)} Known: {', '.join(known) or 'none'}.")
