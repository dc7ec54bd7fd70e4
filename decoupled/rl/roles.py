"""Roles: who acts, remembers and learns, and how fast; what a method for environments consists of.

actors = 0      one loop does all in turn: step, then the updates that this allows (synchronous, deterministic)
actors = N      N actors beside replay and learner, which only messages join
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from decoupled.errors import UserError
from decoupled.rl.agent import Agent, Spaces
from decoupled.specs import positive
from decoupled.steps import MakeOptimizer

MakeAgent = Callable[[Spaces, MakeOptimizer, int], Agent]  # sizes, optimizers, seed


@dataclass(frozen=True)
class Roles:
    """An algorithm and how its roles are spread.

    Attributes:
        agent: makes the algorithm.
        actors: that run apart; 0: one loop. envs: environments of each.
        ratio: updates per environment step. n_step, gamma: of the returns.
        warmup: random steps first. pretrain: auxiliary updates after these.
        capacity: of the replay. prioritized, alpha, beta: see `decoupled.rl.replay`.
        push: updates between two copies of the weights sent to the actors.
        chunk: steps of each environment per message. ahead: batches drawn before the learner asks.
    """

    agent: MakeAgent
    actors: int = 0
    envs: int = 1
    ratio: float = 1.0
    n_step: int = 1
    gamma: float = 0.99
    warmup: int = 1000
    pretrain: int = 0
    capacity: int = 1_000_000
    prioritized: bool = False
    alpha: float = 0.6
    beta: float = 0.4
    push: int = 100
    chunk: int = 8
    ahead: int = 2
    name: str = ""

    trains: ClassVar[str] = "policies in environments (env=NAME, no data and model)"

    def __post_init__(self) -> None:
        positive(
            "roles", envs=self.envs, n_step=self.n_step, capacity=self.capacity, push=self.push, chunk=self.chunk,
            ahead=self.ahead, warmup=self.warmup,
        )  # fmt: skip
        if self.actors < 0 or self.pretrain < 0:
            raise UserError(f"actors and pretrain must be 0 or more, got {self.actors} and {self.pretrain}")
        if not 0 < self.ratio < float("inf"):
            raise UserError(f"ratio must be a positive number of updates per environment step, got {self.ratio}")
        if not 0 < self.gamma <= 1:
            raise UserError(f"gamma must lie in (0, 1], got {self.gamma}")
        if self.alpha < 0 or not 0 <= self.beta <= 1:
            raise UserError(f"alpha must be 0 or more and beta in [0, 1], got {self.alpha} and {self.beta}")

    @property
    def lead(self) -> int:
        """Environment steps that acting may be ahead and still be granted a message of more.

        Two messages of every actor, and what drawn batches stand for.
        """
        return int(2 * max(1, self.actors) * self.chunk * self.envs + self.ahead / self.ratio) if self.actors else 0

    def check(self, batch_size: int) -> None:
        """Refuse a batch that the replay cannot hold.

        Raises:
            UserError: says which numbers.
        """
        positive("recipe", batch_size=batch_size)
        if self.capacity < batch_size:
            raise UserError(
                f"a replay of {self.capacity} transitions is smaller than a batch of {batch_size}; raise capacity, or "
                "lower batch_size"
            )
        if self.warmup < batch_size + self.n_step * self.envs * max(1, self.actors):
            raise UserError(
                f"after warmup={self.warmup} steps the replay may hold fewer transitions than a batch of {batch_size}; "
                "raise warmup, or lower batch_size"
            )

    def describe(self, K: int) -> dict[str, Any]:
        """Its facts, as plain data; `K` changes none of them."""
        return {
            "up": ["transitions, priorities"] if self.prioritized else ["transitions"],
            "down": [f"weights and statistics, every {self.push} updates"],
            "order": "one loop" if not self.actors else f"{self.actors} actors, replay and learner run apart",
            "updates per environment step": self.ratio,
            "steps ahead": self.lead,
            "locks removed": ["acting waits for learning", "learning waits for acting"] if self.actors else [],
        }
