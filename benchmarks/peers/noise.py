"""How much of the machine others use: a benchmark on shared cores says so, and may wait for a quiet moment."""

from __future__ import annotations

import os
import time
from pathlib import Path

QUIET = 0.1  # cores that others may use in an undisturbed run
_WINDOW = 0.5  # seconds
_STAT = Path("/proc/stat")


def busy_seconds() -> float:
    """Processor seconds that the whole machine has worked since it started; NaN where the system does not say."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, _STAT.read_text().split("\n", 1)[0].split()[1:9])
    except (OSError, ValueError):
        return float("nan")
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def wait_quiet(deadline: float) -> None:
    """Wait until others use less than `QUIET` cores, at most until `deadline` (of time.monotonic)."""
    while time.monotonic() < deadline:
        before = busy_seconds()
        time.sleep(_WINDOW)
        if not busy_seconds() - before > QUIET * _WINDOW:
            return
