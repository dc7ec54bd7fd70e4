"""Soft actor-critic: the policy is a squashed Gaussian and is paid for its entropy.

    a = tanh(u),  u ~ N(mean, std),  log pi(a|s) = log N(u) - sum log(1 - a^2 + 1e-6),  log std in [-20, 2]

    form "q"    y = c r + discount (min_i Q'_i(s', a') - alpha log pi(a'|s')),  a' ~ pi(s')
                actor:  mean w (alpha log pi(a|s) - min_i Q_i(s, a)),  a ~ pi(s)
    form "v"    y = c r + discount V'(s')
                value:  mean w (V(s) - (min_i Q_i(s, a) - alpha log pi(a|s)))^2
                actor:  mean w (alpha log pi(a|s) - Q_1(s, a))
    temperature alpha is fixed, or follows  mean -log alpha (log pi + H),  H = -dim(a)

c: reward scale. Q', V': copies that follow slowly.

Sources: Haarnoja et al. 2018 (arXiv 1801.01290, form "v"; 1812.05905, form "q" and the temperature).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled.errors import UserError, unknown
from decoupled.methods.larger_rl.base import ActorCritic, Shape, copy_, make, weighted
from decoupled.methods.larger_rl.networks import Network
from decoupled.rl.agent import Batch, Random, Spaces
from decoupled.steps import MakeOptimizer

LOG_STD = (-20.0, 2.0)


class SAC(ActorCritic):
    """See above.

    Args:
        temperature: alpha; 0: automatic.
        form: "q" or "v". scale: c.
    """

    def __init__(
        self, spaces: Spaces, optimizer: MakeOptimizer, seed: int, shape: Shape, *,
        tau: float = 0.005, temperature: float = 0.0, form: str = "q", scale: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(spaces, optimizer, seed, shape, 2, tau, scale)
        if form not in ("q", "v"):
            raise unknown("form of SAC:", form, ("q", "v"))
        if not 0 <= temperature < math.inf:
            raise UserError(f"temperature must be positive, or 0 for an automatic one; got {temperature}")
        self._form, self._automatic = form, temperature == 0
        self.options = {**self.options, "temperature": float(temperature), "form": form}
        self._entropy = -float(spaces.action)
        alpha = math.log(temperature) if temperature else 0.0
        self.log_alpha = nn.Parameter(torch.tensor([alpha]), requires_grad=self._automatic)
        self.shared["temperature"] = nn.ParameterList([self.log_alpha])
        if self._automatic:
            self.optimizers["temperature"] = make(optimizer, self.shared["temperature"])
        if form == "v":
            draw = torch.Generator().manual_seed(seed + 1)
            shape_of = (1, shape.units, shape.layers, shape.connection, shape.activation, draw)
            self.value, self.targets = (Network(self.features_net.state_width, 1, *shape_of) for _ in range(2))
            copy_(self.targets, self.value)
            self.networks["targets"] = self.targets
            self.shared["value"] = self.value
            self.optimizers["value"] = make(optimizer, self.value)

    def act(self, obs: Tensor, random: Random) -> Tensor:
        z = self.features_net.state(obs)
        if random is None:
            return torch.tanh(self.actor(z)[0].chunk(2, -1)[0])
        return self.sample(z, random)[0]

    def sample(self, z: Tensor, random: Random) -> tuple[Tensor, Tensor]:
        """Actions and their log probability (batch, 1), differentiable in the actor's weights."""
        mean, log_std = self.actor(z)[0].chunk(2, -1)
        log_std = log_std.clamp(*LOG_STD)
        noise = torch.empty_like(mean).normal_(generator=random)
        action = torch.tanh(mean + log_std.exp() * noise)
        gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        return action, (gaussian - (1 - action.square() + 1e-6).log()).sum(-1, keepdim=True)

    def errors(self, batch: Batch, random: Random) -> Tensor:
        with torch.no_grad():
            _, zsa, y = self._constants(batch, self.value if self._form == "v" else self.critics, random)
            return (self.critics(zsa)[0] - y)[:, 0]

    def learn(self, batch: Batch, weights: Tensor | None) -> Tensor:
        with torch.no_grad():
            z, zsa, y = self._constants(batch, self.targets, self.random)
        errors = self.critic_step(zsa, y, weights)
        action, log_pi = self.sample(z, self.random)
        q = self.critics(self.features_net.pair(z, action))  # through the frozen features into the action
        alpha = self.log_alpha.exp().detach()
        best = q.amin(0) if self._form == "q" else q[0]
        self.step("actor", weighted(alpha * log_pi - best, weights).mean(), self.actor)
        if self._form == "v":
            soft = (q.amin(0) - alpha * log_pi).detach()
            losses = F.mse_loss(self.value(z)[0], soft, reduction="none")
            self.step("value", weighted(losses, weights).mean(), self.value)
        if self._automatic:
            loss = -(self.log_alpha * (log_pi.detach() + self._entropy)).mean()
            self.step("temperature", loss, self.shared["temperature"])
        self.follow(self.targets, self.value if self._form == "v" else self.critics)
        return errors

    def _constants(self, batch: Batch, following: nn.Module, random: Random) -> tuple[Tensor, Tensor, Tensor]:
        """z_s, z_sa of the batch's actions, and y (batch, 1)."""
        z, z_next = self.states(batch)
        if self._form == "v":
            zsa, after = self.features_net.pair(z, batch.action), following(z_next)[0]
        else:
            action, log_pi = self.sample(z_next, random)
            zsa, zsa_next = self.pairs(z, batch.action, z_next, action)
            after = following(zsa_next).amin(0) - self.log_alpha.exp() * log_pi
        return z, zsa, self._scale * batch.reward + batch.discount * after
