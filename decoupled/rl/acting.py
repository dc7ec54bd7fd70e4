"""Acting: environments, a policy, and n-step transitions with their initial priorities; and the actor that does it.

weights ----> copy of the agent's shared part
go ---------> so many steps of every environment ----> experience
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from decoupled.errors import OperationError
from decoupled.messages import End, Message
from decoupled.rl.agent import Agent, Spaces, unpack
from decoupled.rl.environments import Environments, Spec
from decoupled.rl.messages import Experience, Go, Weights
from decoupled.rl.replay import restore
from decoupled.rl.roles import Roles
from decoupled.rl.steps import Window, batch_of, width
from decoupled.runtime.contract import Actor, Outcome, Want

Floats = NDArray[np.float32]


class Made(NamedTuple):
    """Some steps: the rows that are complete, their |td| (None: not asked for), and episodes that ended."""

    rows: Floats
    errors: Floats | None
    steps: int
    episodes: list[tuple[float, int]]


class Acting:
    """Steps environments.

    Args:
        agent: acts, and judges new transitions if `roles.prioritized`.
        seed: of the environments and of exploration.
    """

    def __init__(self, env: Spec, spaces: Spaces, roles: Roles, agent: Agent, seed: int) -> None:
        self.agent, self._spaces, self._roles = agent, spaces, roles
        self.envs = Environments(env, roles.envs, seed)
        self._windows = [Window(roles.n_step, roles.gamma) for _ in range(roles.envs)]
        self._noise = torch.Generator().manual_seed(seed + 1)
        self._random = np.random.Generator(np.random.PCG64(seed + 2))

    def make(self, steps: int, random: bool) -> Made:
        """Make `steps` steps of every environment."""
        rows: list[Floats] = []
        for _ in range(steps):
            obs = self.envs.obs
            actions = self.envs.random_actions(self._random) if random else self._policy(obs)
            after, reward, over, cut = self.envs.step(actions)
            for i, window in enumerate(self._windows):
                rows += window.push(obs[i], actions[i], float(reward[i]), after[i], bool(over[i]), bool(cut[i]))
        table = np.stack(rows) if rows else np.empty((0, width(self._spaces, self._roles.n_step)), np.float32)
        errors = self._errors(table) if self._roles.prioritized else None
        return Made(table, errors, steps * self.envs.count, self.envs.take_finished())

    def _policy(self, obs: Floats) -> Floats:
        with torch.no_grad():
            return self.agent.act(torch.from_numpy(obs), self._noise).numpy()

    def _errors(self, rows: Floats) -> Floats:
        if not len(rows):
            return np.empty(0, np.float32)
        with torch.no_grad():
            batch = batch_of(torch.from_numpy(rows), self._spaces, self._roles.n_step)
            return self.agent.errors(batch, self._noise).abs().numpy()

    def state_dict(self) -> dict[str, Any]:
        """Environments, unfinished transitions and noise."""
        return {
            "envs": self.envs.state_dict(), "windows": [window.state_dict() for window in self._windows],
            "noise": self._noise.get_state(), "random": repr(self._random.bit_generator.state),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self.envs.load_state_dict(state["envs"])
        for window, saved in zip(self._windows, state["windows"], strict=True):
            window.load_state_dict(saved)
        self._noise.set_state(state["noise"])
        restore(self._random, state["random"])


class ActingActor(Actor):
    """Acts when it is told to, with the newest weights that have come.

    Args:
        make: makes the `Acting`, in the process that this actor lives in.
    """

    def __init__(self, name: str, make: Callable[[], Acting], method: str = "") -> None:
        self.name, self._make, self._method = name, make, method
        self._made: Acting | None = None
        self._version, self._number, self._ready, self._ended = 0, 0, False, False
        self.bytes_sent = 0

    @property
    def acting(self) -> Acting:
        """What it steps; made when first asked for."""
        self._made = self._made or self._make()
        return self._made

    def begin(self) -> None:
        """A new run: wait for weights first."""
        self._ready = self._ended = False

    def wants(self) -> Sequence[Want]:
        if self._ended:
            return ()
        return (Want(("weights",)), Want(("go",))) if self._ready else (Want(("weights",)),)

    def handle(self, want: Want, messages: tuple[Message, ...]) -> Outcome:
        (message,) = messages
        if isinstance(message, End):
            self._ended = True
            return Outcome()
        label = f"E{self._number}"
        try:
            if isinstance(message, Weights):
                unpack(self.acting.agent.shared, message.payload[0])
                self._version, self._ready = message.version, True
                return Outcome()
            assert isinstance(message, Go)
            made = self.acting.make(message.steps, message.random)
        except Exception as error:
            raise OperationError(self.name, label, error, self._method) from error
        payload = tuple(torch.from_numpy(x) for x in (made.rows, made.errors) if x is not None)
        key, episodes = (self.name, self._number), tuple(made.episodes)
        found = Experience(key, payload=payload, version=self._version, steps=made.steps, episodes=episodes)
        self._number += 1
        self.bytes_sent += found.nbytes
        return Outcome(label, [("experience", found)])

    def close(self) -> None:
        """End the environments, if there are any."""
        if self._made is not None:
            self._made.envs.close()
