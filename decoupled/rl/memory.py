"""Memory: the replay together with the pace; it decides who may go on. And the actor that is asked and told.

experience --> into the replay                     draw --> learner (at most `ahead` unanswered)
judged ------> new priorities, one update done     go ----> the actor with the fewest unanswered
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoupled.errors import OperationError
from decoupled.messages import End, Message
from decoupled.rl.messages import Drawn, Experience, Go, Judged
from decoupled.rl.pace import Pace
from decoupled.rl.replay import Draw, Replay
from decoupled.rl.roles import Roles
from decoupled.runtime.contract import Actor, Outcome, Want

Floats = NDArray[np.float32]
UNANSWERED = 2  # messages to one actor: it has the next one when it is through with one


@dataclass
class Tally:
    """What one run has seen: ages and lags of what was drawn, errors, auxiliary losses, and episodes."""

    age: list[float] = field(default_factory=list)
    lag: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    auxiliary: list[float] = field(default_factory=list)
    episodes: list[tuple[float, int]] = field(default_factory=list)
    drift: float = 0.0  # most updates that a run was behind what its steps allow

    def means(self) -> dict[str, float | None]:
        """Means; None where there was nothing."""
        lists = {"age": self.age, "lag": self.lag, "error": self.error, "auxiliary": self.auxiliary}
        found = {name: fmean(values) if values else None for name, values in lists.items()}
        return found | {"train_return": fmean([r for r, _ in self.episodes]) if self.episodes else None}


class Memory:
    """Replay, pace and tally.

    Args:
        features: whether updates take rows for the features, too.
        on_steps: called with the number of environment steps that came in, and with 0 when an update that only
            pretrains the features begins.
    """

    def __init__(
        self, roles: Roles, replay: Replay, batch_size: int, features: bool,
        on_steps: Callable[[int], None] = lambda steps: None,
    ) -> None:  # fmt: skip
        pretrain = roles.pretrain if features else 0
        self.pace = Pace(roles.ratio, roles.warmup, pretrain, roles.lead)
        self.replay, self.tally = replay, Tally()
        self._batch_size, self._features, self._on_steps = batch_size, features, on_steps

    def begin(self, goal: int) -> None:
        """A new run, until `goal` environment steps in all."""
        self.pace.goal, self.tally = goal, Tally()

    def add(self, rows: Floats, errors: Floats | None, steps: int, version: int, episodes: Sequence[Any]) -> None:
        """Experience has come in."""
        self.replay.add(rows, errors, version)
        self.pace.steps += steps
        self.tally.episodes += [(float(total), int(length)) for total, length in episodes]
        self.tally.drift = max(self.tally.drift, self.pace.behind)
        self._on_steps(steps)

    def draw(self, kind: str) -> tuple[Draw | None, Drawn]:
        """Begin an update of this kind: what was drawn by priority, and the message for the learner."""
        pace, replay = self.pace, self.replay
        extra = replay.draw(self._batch_size, uniform=True).rows if self._features else torch.empty(0)
        if kind == "pretrain":
            pace.pretrained += 1
            self._on_steps(0)
            return None, Drawn(-pace.pretrained, payload=(extra,), version=pace.updates, kind=kind)
        draw = replay.draw(self._batch_size)
        self.tally.age.append(replay.age(draw))
        self.tally.lag.append(replay.lag(draw, pace.updates))
        pace.updates += 1
        weights = draw.weights if draw.weights is not None else torch.empty(0)
        payload = (draw.rows, weights, extra)
        return draw, Drawn(pace.updates, payload=payload, version=pace.updates, kind=kind)

    def answer(self, draw: Draw | None, errors: Tensor | None, auxiliary: float | None) -> None:
        """An update is finished."""
        if auxiliary is not None:
            self.tally.auxiliary.append(auxiliary)
        if draw is not None and errors is not None:
            self.replay.judge(draw, errors.numpy())
            self.tally.error.append(float(errors.mean()))
            self.pace.answered += 1

    def state_dict(self) -> dict[str, Any]:
        return {"pace": self.pace.state_dict(), "replay": self.replay.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.pace.load_state_dict(state["pace"])
        self.replay.load_state_dict(state["replay"])


class MemoryActor(Actor):
    """The memory between actors and learner. It never waits for room: what is under way is bounded by answers."""

    name = "replay"

    def __init__(self, memory: Memory, actors: Sequence[str], roles: Roles, beside: str, method: str = "") -> None:
        self.memory, self._roles, self._method, self.beside = memory, roles, method, beside
        self._unanswered = dict.fromkeys(actors, 0)
        self._draws: dict[Any, Draw | None] = {}
        self._number, self._ended = 0, False
        self._next: tuple[Any, ...] | None = None
        self.bytes_sent = 0

    def begin(self, goal: int) -> None:
        """A new run."""
        self.memory.begin(goal)
        self._ended = False
        self._next = self._plan()

    def wants(self) -> Sequence[Want]:
        if self._ended:
            return ()
        mail = (Want(("judged",)), Want(("experience",)))
        return (*mail, Want()) if self._next else mail

    def handle(self, want: Want, messages: tuple[Message, ...]) -> Outcome:
        label = f"A{self._number}"
        try:
            outcome = self._take(messages[0]) if messages else self._go_on(label)
        except Exception as error:
            raise OperationError(self.name, label, error, self._method) from error
        if messages and self._next:  # decided already
            return outcome
        self._next = self._plan()
        return outcome

    def _take(self, message: Message) -> Outcome:
        memory = self.memory
        if isinstance(message, Judged):
            draw = self._draws.pop(message.key)
            memory.answer(draw, message.payload[0] if message.payload else None, message.auxiliary)
        else:
            assert isinstance(message, Experience)
            source: Any = message.key
            rows, *errors = message.payload
            self._unanswered[source[0]] -= 1
            memory.add(
                rows.numpy(), errors[0].numpy() if errors else None, message.steps, message.version, message.episodes
            )
        return Outcome()

    def _plan(self) -> tuple[Any, ...] | None:
        """What to do next without being told."""
        pace = self.memory.pace
        if len(self._draws) < self._roles.ahead and (kind := pace.due()):
            return "draw", kind
        idle = min(self._unanswered, key=lambda name: self._unanswered[name])
        if self._unanswered[idle] < UNANSWERED and (go := pace.grant(self._roles.envs, self._roles.chunk)):
            return "go", idle, *go
        return ("end",) if pace.finished and not self._draws else None

    def _go_on(self, label: str) -> Outcome:
        assert self._next is not None
        what, *more = self._next
        self._number += 1
        if what == "end":
            self._ended = True
            return Outcome(None, [("drawn", End(self._number))])
        if what == "go":
            name, steps, random = more
            self._unanswered[name] += 1
            return Outcome(None, [(f"go.{name}", Go(self._number, steps=steps, random=random))])
        draw, drawn = self.memory.draw(more[0])
        self._draws[drawn.key] = draw
        self.bytes_sent += drawn.nbytes
        return Outcome(label, [("drawn", drawn)])
