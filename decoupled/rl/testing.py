"""A small environment for tests: a point on a line, whose episodes end where and when one says."""

from __future__ import annotations

from typing import Any

import numpy as np

from decoupled.rl.environments import gymnasium


class Line:
    """Makes the environment: x' = x + a / 10 + noise, reward -x^2; over at |x| >= `edge`, cut off after `limit` steps.

    Args:
        fail_at: step of an episode at which it raises.
    """

    __name__ = "line"

    def __init__(self, limit: int = 10, edge: float = 10.0, noise: float = 0.01, fail_at: int | None = None) -> None:
        self.options = limit, edge, noise, fail_at

    def __call__(self) -> Any:
        gym, (limit, edge, noise, fail_at) = gymnasium(), self.options

        class Env(gym.Env):
            action_space = gym.spaces.Box(-2.0, 2.0, (1,))
            observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))

            def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
                super().reset(seed=seed)
                self.x, self.t = float(self.np_random.uniform(-1, 1)), 0
                return self._obs(), {}

            def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
                if self.t == fail_at:
                    raise ValueError("the line broke")
                self.x += 0.1 * float(action[0]) + noise * float(self.np_random.normal())
                self.t += 1
                return self._obs(), -(self.x**2), abs(self.x) >= edge, self.t >= limit, {}

            def _obs(self) -> Any:
                return np.array([self.x, self.t / limit], np.float32)

        return Env()
