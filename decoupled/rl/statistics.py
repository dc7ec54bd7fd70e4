"""What roles count, as frozen records a user gets; what a run of `fit` returns; and the usual optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from decoupled.rl.memory import Tally
from decoupled.rl.pace import Pace


def adam(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The default: Adam, 3e-4, all parameters in one call."""
    return torch.optim.Adam(parameters, 3e-4, fused=True)


@dataclass(frozen=True)
class RoleStatistics:
    """One role since the trainer was made; also readable as a mapping.

    Attributes:
        role: its name. rank: of its process.
        busy_seconds, wait_seconds: in operations; waiting for messages or room (virtual in `simulated`).
        bytes_sent: payload bytes of its messages.
    """

    role: str
    rank: int
    busy_seconds: float
    wait_seconds: float
    bytes_sent: int

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


def record(pace: Pace, tally: Tally, before: tuple[int, int], seconds: float) -> dict[str, Any]:
    """What one run of `fit` did; `before`: steps and updates when it began."""
    steps, updates = pace.steps - before[0], pace.updates - before[1]
    return {
        "steps": pace.steps, "updates": pace.updates, "steps_done": steps, "updates_done": updates, "seconds": seconds,
        "steps_per_second": steps / seconds, "updates_per_second": updates / seconds,
        "ratio": pace.updates / max(1, pace.steps - pace.warmup), "drift": tally.drift, **tally.means(),
    }  # fmt: skip
