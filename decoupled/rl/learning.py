"""Learning: the updates of one agent, in the order they are drawn; the actor that does it, and the one loop.

drawn --> features: one update of their own loss, then actor and critics: one update --> judged
every `push` updates the weights, and the statistics of BatchNorm with them, go to all actors
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from decoupled.errors import NonFiniteError, OperationError
from decoupled.messages import End, Message
from decoupled.rl.acting import Acting
from decoupled.rl.agent import Agent, Spaces, packed
from decoupled.rl.memory import Memory
from decoupled.rl.messages import Drawn, Judged, Weights
from decoupled.rl.roles import Roles
from decoupled.rl.steps import batch_of
from decoupled.runtime.contract import Actor, Outcome, Want


class Learning:
    """Makes the updates."""

    def __init__(self, agent: Agent, spaces: Spaces, n_step: int) -> None:
        self.agent, self._spaces, self._n = agent, spaces, n_step

    def update(self, drawn: Drawn) -> tuple[Tensor | None, float | None]:
        """One update: the batch's |td| (None: features only), and the loss of the features (None: there are none).

        Raises:
            NonFiniteError: one of them is not finite.
        """
        *batch, extra = drawn.payload
        auxiliary = self.agent.auxiliary(batch_of(extra, self._spaces, self._n)) if extra.numel() else None
        if auxiliary is not None:
            check("loss of the features", auxiliary, drawn)
        if not batch:
            return None, auxiliary
        rows, weights = batch
        errors = self.agent.learn(batch_of(rows, self._spaces, self._n), weights if weights.numel() else None)
        errors = errors.detach().abs().to("cpu")
        check("mean |td| of the critics", errors.mean().item(), drawn)
        return errors, auxiliary


def check(what: str, value: float, drawn: Drawn) -> None:
    """Refuse a value that is not finite."""
    if not math.isfinite(value):
        number = str(drawn.key).lstrip("-")
        raise NonFiniteError(
            f"the {what} is {value} in update {number} ({drawn.kind}); lower lr, or scale the rewards down"
        )


def operation(drawn: Drawn) -> str:
    """The label of an update."""
    return f"P{-int(str(drawn.key))}" if drawn.kind == "pretrain" else f"S{drawn.key}"


class LearningActor(Actor):
    """Learns what it is given."""

    name = "learner"

    def __init__(self, learning: Learning, roles: Roles, method: str = "") -> None:
        self.learning, self._roles, self._method = learning, roles, method
        self._told, self._ended, self.updates = False, False, 0
        self.bytes_sent = 0

    def begin(self, updates: int) -> None:
        """A new run, after so many updates: begin with sending weights."""
        self._told, self._ended, self.updates = False, False, updates

    def wants(self) -> Sequence[Want]:
        if self._ended:
            return ()
        return (Want(("drawn",)),) if self._told else (Want(),)

    def handle(self, want: Want, messages: tuple[Message, ...]) -> Outcome:
        if not messages:
            self._told = True
            return Outcome(None, [self._weights()])
        (message,) = messages
        if isinstance(message, End):
            self._ended = True
            return Outcome(None, [("weights", message)])
        assert isinstance(message, Drawn)
        label = operation(message)
        try:
            errors, auxiliary = self.learning.update(message)
        except Exception as error:
            raise OperationError(self.name, label, error, self._method) from error
        self.updates += errors is not None
        payload = () if errors is None else (errors,)
        sends: list[tuple[str, Message]] = [("judged", Judged(message.key, payload=payload, auxiliary=auxiliary))]
        if errors is not None and self.updates % self._roles.push == 0:
            sends.append(self._weights())
        return Outcome(label, sends)

    def _weights(self) -> tuple[str, Message]:
        message = Weights(self.updates, payload=(packed(self.learning.agent.shared),), version=self.updates)
        self.bytes_sent += message.nbytes * self._roles.actors
        return "weights", message


class Loop(Actor):
    """Acting, memory and learning in turn: no update waits for a step that it does not need, and the reverse."""

    name = "learner"

    def __init__(self, acting: Acting, memory: Memory, learning: Learning, method: str = "") -> None:
        self.acting, self.memory, self.learning, self._method = acting, memory, learning, method
        self._number, self.bytes_sent = 0, 0

    def begin(self, goal: int) -> None:
        """A new run."""
        self.memory.begin(goal)

    def wants(self) -> Sequence[Want]:
        return () if self.memory.pace.finished else (Want(),)

    def handle(self, want: Want, messages: tuple[Message, ...]) -> Outcome:
        memory, pace, label = self.memory, self.memory.pace, f"E{self._number}"
        try:
            if kind := pace.due():
                draw, drawn = memory.draw(kind)
                label = operation(drawn)
                memory.answer(draw, *self.learning.update(drawn))
                return Outcome(label)
            go = pace.grant(self.acting.envs.count, 1)
            assert go is not None
            self._number += 1
            made = self.acting.make(*go)
            memory.add(made.rows, made.errors, made.steps, pace.updates, made.episodes)
        except Exception as error:
            raise OperationError(self.name, label, error, self._method) from error
        return Outcome(label)
