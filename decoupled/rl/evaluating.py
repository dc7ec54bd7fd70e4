"""Evaluation apart from training: an actor with environments of its own gets weights, and plays whole episodes.

learner --Weights--> evaluator: the best known action, no exploration --> returns and lengths
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from decoupled.errors import NonFiniteError, OperationError
from decoupled.messages import Message
from decoupled.rl.agent import Agent, packed, unpack
from decoupled.rl.environments import Environments, Floats, Spec, play
from decoupled.rl.messages import Weights
from decoupled.runtime.contract import Actor, Outcome, Want


class Sender(Actor):
    """The learner's part in an evaluation: it sends its weights once."""

    name = "learner"

    def __init__(self, agent: Agent) -> None:
        self._agent, self._sent = agent, False

    def wants(self) -> Sequence[Want]:
        return () if self._sent else (Want(),)

    def handle(self, want: Want, messages: tuple[Message, ...]) -> Outcome:
        self._sent = True
        return Outcome(None, [("weights", Weights(0, payload=(packed(self._agent.shared),)))])


class Evaluator(Actor):
    """Plays one episode in each of `episodes` environments.

    Args:
        make: makes an agent, in the process that this actor lives in.
        beside: the actor that it shares a process with.

    Attributes:
        found: (return, length) of the latest episodes.
    """

    name = "evaluator"

    def __init__(self, env: Spec, make: Callable[[], Agent], beside: str, method: str = "") -> None:
        self._env, self._make, self.beside, self._method = env, make, beside, method
        self._agent: Agent | None = None
        self._envs: Environments | None = None
        self._episodes = self._seed = 0
        self._done = True
        self.found: list[tuple[float, int]] = []

    def begin(self, episodes: int, seed: int) -> None:
        """A new evaluation."""
        self._episodes, self._seed, self._done = episodes, seed, False

    def wants(self) -> Sequence[Want]:
        return () if self._done else (Want(("weights",)),)

    def handle(self, want: Want, messages: tuple[Message, ...]) -> Outcome:
        (message,) = messages
        assert isinstance(message, Weights)
        try:
            self._agent = self._agent or self._make()
            unpack(self._agent.shared, message.payload[0])
            if self._envs is None or self._envs.count != self._episodes:
                self.close()
                self._envs = Environments(self._env, self._episodes, self._seed)
            self._envs.start(self._seed)
            self.found = play(self._envs, self._best)
            if not math.isfinite(total := sum(total for total, _ in self.found)):
                raise NonFiniteError(f"the returns add up to {total}: the policy has diverged; lower lr")
        except Exception as error:
            raise OperationError(self.name, "evaluation", error, self._method) from error
        self._done = True
        return Outcome("evaluation")

    def close(self) -> None:
        """End the environments, if there are any."""
        if self._envs is not None:
            self._envs.close()

    def _best(self, obs: Floats) -> Floats:
        assert self._agent is not None
        with torch.no_grad():
            return self._agent.act(torch.from_numpy(obs), None).numpy()
