"""Pace: so many updates per environment step, and neither acting nor learning runs far ahead of the other.

    learn    once `warmup` steps are there and `pretrain` auxiliary updates done:   updates <= ratio (steps - warmup)
    act      while granted < warmup + answered / ratio + lead                       granted: steps that actors may make

A message grants several steps at once, so acting ends less than one message beyond that bound.
`answered` are updates that are finished. With lead >= 1 / ratio one of the two is always possible until the end, which
is when `goal` steps have been made and every update they allow is finished; so whoever runs apart, the counts are the
same in the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SLACK = 1e-9  # rounding of ratio (steps - warmup)


class Pace:
    """Counts, and says what may happen next.

    Args:
        ratio: updates per environment step. warmup: random steps before all else.
        pretrain: auxiliary updates after these. lead: environment steps that acting may be ahead and
            still be granted a message of more.

    Attributes:
        goal: steps to reach in this run.
        granted, steps: environment steps allowed, and made. pretrained, updates: begun. answered: updates finished.
    """

    def __init__(self, ratio: float, warmup: int, pretrain: int, lead: int) -> None:
        self.ratio, self.warmup, self.pretrain = ratio, warmup, pretrain
        self.lead = max(lead, math.ceil(1 / ratio))
        self.goal = self.granted = self.steps = self.pretrained = self.updates = self.answered = 0

    def due(self) -> str | None:
        """The update that may begin: "pretrain", "train" or None."""
        if self.steps < self.warmup:
            return None
        if self.pretrained < self.pretrain:
            return "pretrain"
        return "train" if self.updates + 1 <= self.ratio * (self.steps - self.warmup) + SLACK else None

    def grant(self, envs: int, most: int) -> tuple[int, bool] | None:
        """Steps that `envs` environments may make each, at most `most`, and whether at random; None: not now."""
        random = self.granted < self.warmup
        limit = self.warmup if random else self.warmup + self.answered / self.ratio + self.lead
        if self.granted >= min(limit, self.goal):
            return None
        until = min(self.goal, self.warmup) if random else self.goal
        steps = min(most, math.ceil((until - self.granted) / envs))
        self.granted += steps * envs
        return steps, random

    @property
    def behind(self) -> float:
        """Updates that the steps made allow and that are not finished."""
        return max(0.0, self.ratio * (self.steps - self.warmup) - self.answered)

    @property
    def finished(self) -> bool:
        """All steps made, and no update may begin."""
        return self.granted >= self.goal and self.steps == self.granted and self.due() is None

    def state_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("granted", "steps", "pretrained", "updates", "answered")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, int(value))
