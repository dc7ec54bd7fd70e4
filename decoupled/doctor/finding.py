"""A finding: one line of what `decoupled doctor` has seen, how bad it is, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """What was seen.

    Attributes:
        check: what was looked at, e.g. "disk".
        status: "warning": works, but not as well or not everywhere; "problem": something asked for will fail.
        says: what was found, one line.
        remedy: what to do; empty where there is nothing to do.
    """

    check: str
    status: Status
    says: str
    remedy: str = ""


def ok(check: str, says: str) -> Finding:
    return Finding(check, "ok", says)


def warning(check: str, says: str, remedy: str) -> Finding:
    return Finding(check, "warning", says, remedy)


def problem(check: str, says: str, remedy: str) -> Finding:
    return Finding(check, "problem", says, remedy)
