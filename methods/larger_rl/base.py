"""What SAC and TD3 share: features, twin critics with a target copy, and updates that touch nothing else.

z = phi_s(s),  z_sa = phi_sa(z, a)                  constants, but for dz_sa/da in the actor's loss
critic    mean_b w_b (Q_i(z_sa) - y)^2, both
target    theta' <- theta' + tau (theta - theta')
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from decoupled.errors import UserError
from decoupled.methods.larger_rl.networks import Network
from decoupled.methods.larger_rl.ofenet import Features, OFENet
from decoupled.rl.agent import Agent, Batch, Spaces
from decoupled.steps import MakeOptimizer


@dataclass(frozen=True)
class Shape:
    """The networks: see `Network`, `OFENet`; `ofenet` is its norm, or "off"."""

    connection: str = "mlp"
    units: int = 256
    layers: int = 2
    activation: str = "relu"
    ofenet: str = "off"
    ofe_units: int = 240
    ofe_layers: int = 8


class ActorCritic(Agent):
    """Features, actor and twin critics; an algorithm adds how to act and what to learn.

    Args:
        outputs: of the actor per dimension of the action.
        optimizer: called for features, actor and critics, each with its own parameters.
        scale: of the rewards.
    """

    def __init__(
        self, spaces: Spaces, optimizer: MakeOptimizer, seed: int, shape: Shape, outputs: int, tau: float, scale: float
    ) -> None:
        if not 0 < scale < math.inf:
            raise UserError(f"reward_scale must be a positive number, got {scale}")
        self.random, draw = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
        s, a, target = spaces
        off = shape.ofenet == "off"
        self.features_net = (
            Features(s, a) if off else OFENet(s, a, target, shape.ofe_units, shape.ofe_layers, shape.ofenet, draw)
        )
        z, zsa = self.features_net.state_width, self.features_net.pair_width
        form = (shape.units, shape.layers, shape.connection, shape.activation, draw)
        self.actor = Network(z, outputs * a, 1, *form)
        self.critics = Network(zsa, 1, 2, *form)
        self.targets: nn.Module = Network(zsa, 1, 2, *form)
        copy_(self.targets, self.critics)
        self.shared = nn.ModuleDict({"features": self.features_net, "actor": self.actor, "critics": self.critics})
        self.networks = nn.ModuleDict({"shared": self.shared, "targets": self.targets})
        self.optimizers = {"actor": make(optimizer, self.actor), "critics": make(optimizer, self.critics)}
        if not off:
            self.optimizers["features"] = make(optimizer, self.features_net)
        self._tau, self._scale = tau, scale
        self.options = {"algorithm": type(self).__name__.lower(), **asdict(shape)}

    @property
    def has_auxiliary(self) -> bool:
        return self.features_net.learned

    def auxiliary(self, batch: Batch) -> float | None:
        if not isinstance(self.features_net, OFENet):
            return None
        loss = self.features_net.loss(batch.obs, batch.action, batch.after)
        self.step("features", loss, self.features_net)
        return loss.item()

    def features(self, batch: Batch) -> Tensor:
        net = self.features_net
        return self.critics.hidden(net.pair(net.state(batch.obs), batch.action))

    def states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """z_s of the observations and of the next ones, in one call."""
        z, z_next = self.features_net.state(torch.cat([batch.obs, batch.next_obs])).chunk(2)
        return z, z_next

    def pairs(self, z: Tensor, action: Tensor, z_next: Tensor, next_action: Tensor) -> tuple[Tensor, Tensor]:
        """z_sa of both, in one call."""
        zsa, zsa_next = self.features_net.pair(torch.cat([z, z_next]), torch.cat([action, next_action])).chunk(2)
        return zsa, zsa_next

    def step(self, name: str, loss: Tensor, *modules: nn.Module) -> None:
        """One update of these modules, and of nothing else that the loss depends on."""
        parameters = [p for module in modules for p in module.parameters()]
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self.optimizers[name].step()

    def critic_step(self, zsa: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
        """One update of both critics; returns Q_1 - y before it."""
        errors = self.critics(zsa) - y
        self.step("critics", weighted(errors.square(), weights).mean((1, 2)).sum(), self.critics)
        return errors[0, :, 0].detach()

    def follow(self, target: nn.Module, source: nn.Module) -> None:
        """Move a target network towards its source."""
        with torch.no_grad():
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                list(target.parameters()), list(source.parameters()), self._tau
            )


def weighted(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Losses (..., batch, 1), each times the weight of its sample."""
    return losses if weights is None else losses * weights[:, None]


def make(optimizer: MakeOptimizer, *modules: nn.Module) -> torch.optim.Optimizer:
    """An optimizer for the parameters of modules."""
    parameters: Sequence[nn.Parameter] = [p for module in modules for p in module.parameters()]
    return optimizer(list(parameters))


def copy_(target: nn.Module, source: nn.Module) -> None:
    """Make `target` equal to `source`; it is never learned."""
    target.load_state_dict(source.state_dict())
    target.requires_grad_(False)
