"""Operations and plans: what one block does next, and when it has done everything.

A fixed plan walks the operations of an order and leaves out what lies behind the last pass; a free plan decides by
what has arrived. Both answer `options()` (what may come next, best first) and are told `done(op)` and `end(batches)`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from decoupled.errors import UserError

KINDS = "FBIWSEA"
ANY = -1


class Op(NamedTuple):
    """One operation; `batch` is the pass number (0 for S), or ANY where a free order leaves the choice open."""

    kind: str
    batch: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "S" else f"{self.kind}{'*' if self.batch == ANY else self.batch}"


S = Op("S")


def parse(text: str) -> list[Op]:
    """Read ``"F0 F1 B0 S"`` back into operations.

    Raises:
        UserError: a word is not an operation.
    """
    ops = []
    for word in text.split():
        match = re.fullmatch(rf"([{KINDS}])(\d*)", word)
        if match is None or (match[1] == "S") != (match[2] == ""):
            raise UserError(f"{word!r} is not an operation: use F, B, I, W, E or A with a pass number, or S")
        ops.append(Op(match[1], int(match[2] or 0)))
    return ops


class FixedPlan:
    """Walks fixed operations up to the last pass: what a block does next, one choice at a time."""

    def __init__(self, operations: Iterator[Op]) -> None:
        self._operations = operations
        self._end: int | None = None
        self._next: Op | None = next(operations, None)
        self._owed = False  # gradients since the last S
        self._closed = 0

    @property
    def finished(self) -> bool:
        return self._next is None

    def options(self) -> tuple[Op, ...]:
        """The operations that may come next, best first (exactly one here)."""
        return () if self._next is None else (self._next,)

    def done(self, op: Op) -> None:
        """`op` was carried out."""
        if op.kind in "BW":
            self._owed, self._closed = True, self._closed + 1
        elif op.kind == "S":
            self._owed = False
        self._next = next(self._operations, None)
        self._skip()

    def end(self, batches: int) -> None:
        """Only passes below `batches` exist; operations on later ones are left out."""
        self._end = batches
        self._skip()

    def _skip(self) -> None:
        while self._next is not None and self._end is not None:
            if self._next.kind == "S":
                if self._owed:
                    return
            elif self._next.batch < self._end:
                return
            elif self._closed >= self._end:
                self._next = S if self._owed else None
                return
            self._next = next(self._operations, None)


class FreePlan:
    """Takes what has arrived: an answer first, then new work while fewer than `credit` passes are unanswered."""

    def __init__(self, credit: int) -> None:
        if credit < 1:
            raise UserError(f"a free order needs a credit of at least 1, got {credit}")
        self._credit, self._open, self._owed = credit, 0, False
        self._taken, self._end = 0, math.inf  # the end may be announced before the last passes have come

    @property
    def finished(self) -> bool:
        return self._taken >= self._end and not self._open and not self._owed

    def options(self) -> tuple[Op, ...]:
        if self._owed:
            return (S,)
        back = (Op("B", ANY),) if self._open else ()
        fore = (Op("F", ANY),) if self._open < self._credit and self._taken < self._end else ()
        return back + fore

    def done(self, op: Op) -> None:
        self._open += {"F": 1, "B": -1}.get(op.kind, 0)
        self._taken += op.kind == "F"
        self._owed = op.kind == "B"

    def end(self, batches: int) -> None:
        self._end = batches


def walk(plan: FixedPlan | FreePlan) -> Iterator[Op]:
    """Carry out a plan whose operations never wait, yielding each."""
    while options := plan.options():
        yield options[0]
        plan.done(options[0])


def versions(operations: Iterable[Op], batch: int) -> tuple[int, int]:
    """(own updates before F of `batch`, own updates before its B or W), counted from the operations alone."""
    steps = forward = 0
    for op in operations:
        if op.kind == "S":
            steps += 1
        elif op.batch == batch and op.kind == "F":
            forward = steps
        elif op.batch == batch and op.kind in "BW":
            return forward, steps
    raise ValueError(f"the operations hold no backward of pass {batch}")
