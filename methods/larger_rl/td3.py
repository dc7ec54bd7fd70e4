"""TD3: a deterministic policy, twin critics, smoothed targets, and an actor that is updated every other time.

    act       a = tanh(mu(s)),  exploring: a + N(0, 0.1), clipped to [-1, 1]
    target    a' = clip(tanh(mu'(s')) + clip(N(0, 0.2), -0.5, 0.5), -1, 1)
    critic    y = r + discount min_i Q'_i(s', a')
    actor     mean -w Q_1(s, mu(s)), every second update; then all targets follow

Source: Fujimoto et al. 2018 (arXiv 1802.09477).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from decoupled.methods.larger_rl.base import ActorCritic, Shape, copy_, weighted
from decoupled.rl.agent import Batch, Random, Spaces
from decoupled.steps import MakeOptimizer

EXPLORE, SMOOTH, CLIP, DELAY = 0.1, 0.2, 0.5, 2


class TD3(ActorCritic):
    """See above."""

    def __init__(
        self, spaces: Spaces, optimizer: MakeOptimizer, seed: int, shape: Shape, *,
        tau: float = 0.005, scale: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(spaces, optimizer, seed, shape, 1, tau, scale)
        self._updates = 0
        self.target_actor = copy.deepcopy(self.actor)
        copy_(self.target_actor, self.actor)
        self.networks["target_actor"] = self.target_actor

    def act(self, obs: Tensor, random: Random) -> Tensor:
        action = torch.tanh(self.actor(self.features_net.state(obs))[0])
        if random is None:
            return action
        return (action + EXPLORE * torch.empty_like(action).normal_(generator=random)).clamp(-1, 1)

    def errors(self, batch: Batch, random: Random) -> Tensor:
        with torch.no_grad():
            _, zsa, y = self._constants(batch, self.actor, self.critics, random)
            return (self.critics(zsa)[0] - y)[:, 0]

    def learn(self, batch: Batch, weights: Tensor | None) -> Tensor:
        with torch.no_grad():
            z, zsa, y = self._constants(batch, self.target_actor, self.targets, self.random)
        errors = self.critic_step(zsa, y, weights)
        self._updates += 1
        if self._updates % DELAY == 0:
            zsa = self.features_net.pair(z, torch.tanh(self.actor(z)[0]))  # through the frozen features into the action
            self.step("actor", weighted(-self.critics(zsa)[0], weights).mean(), self.actor)
            self.follow(self.targets, self.critics)
            self.follow(self.target_actor, self.actor)
        return errors

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._updates = state["updates"]

    def _constants(
        self, batch: Batch, actor: nn.Module, critics: nn.Module, random: Random
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z_s, z_sa of the batch's actions, and y (batch, 1)."""
        z, z_next = self.states(batch)
        action = torch.tanh(actor(z_next)[0])
        noise = (SMOOTH * torch.empty_like(action).normal_(generator=random)).clamp(-CLIP, CLIP)
        zsa, zsa_next = self.pairs(z, batch.action, z_next, (action + noise).clamp(-1, 1))
        return z, zsa, self._scale * batch.reward + batch.discount * critics(zsa_next).amin(0)
