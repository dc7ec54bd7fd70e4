"""OFENet: features that widen the input, learned by predicting the next observation and by nothing else.

    block      x -> [swish(norm(W x + b)), x]                                adds U / L units
    z_s        L blocks on s                       d_s + U
    z_sa       L blocks on [z_s, a]                d_s + U + d_a + U
    L_aux    = mean over batch and dims of ( head(z_sa) - s_{t+1}[:target] )^2

Losses of actor and critic never change it: their optimizers do not list its weights, and their features are constants,
except that z_sa(s, a) is differentiable in the action. BatchNorm uses batch statistics, and moves its running ones,
in the auxiliary step only.

Source: Ota et al. 2020 (arXiv 2003.01629).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled.errors import UserError, unknown
from decoupled.methods.larger_rl.networks import glorot_
from decoupled.specs import positive

NORMS = {
    "batch": partial(nn.BatchNorm1d, eps=1e-3, momentum=0.01),  # Keras: 0.99 of the old, 0.01 of the new
    "layer": nn.LayerNorm,
    "none": lambda units: nn.Identity(),
}


class Features(nn.Module):
    """No features: the observation and the action themselves.

    Attributes:
        state_width, pair_width: of `state` and `pair`.
    """

    learned = False

    def __init__(self, observation: int, action: int) -> None:
        super().__init__()
        self.state_width, self.pair_width = observation, observation + action

    def state(self, obs: Tensor) -> Tensor:
        """z_s."""
        return obs

    def pair(self, z: Tensor, action: Tensor) -> Tensor:
        """z_sa of z_s and an action."""
        return torch.cat([z, action], -1)


class Block(nn.Module):
    """Adds `units` features to `inputs`."""

    def __init__(self, inputs: int, units: int, norm: str, random: torch.Generator) -> None:
        super().__init__()
        self.linear = linear(inputs, units, random)
        self.norm = NORMS[norm](units)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.silu(self.norm(self.linear(x))), x], -1)


class OFENet(Features):
    """The two stacks and the prediction.

    Args:
        target: leading entries of the next observation that are predicted.
        units, layers: U and L of each stack. norm: "batch", "layer" or "none".

    Raises:
        UserError: units that layers do not divide, or an unknown norm.
    """

    learned = True

    def __init__(
        self, observation: int, action: int, target: int, units: int, layers: int, norm: str, random: torch.Generator
    ) -> None:
        super().__init__(observation, action)
        positive("ofenet", units=units, layers=layers)
        if units % layers:
            raise UserError(f"ofenet: {units} units cannot be spread over {layers} layers; take a multiple of {layers}")
        if norm not in NORMS:
            raise unknown("norm of ofenet:", norm, [*NORMS, "off"])
        each = units // layers
        self.target = target
        self.state_width, self.pair_width = observation + units, observation + action + 2 * units
        self.state_blocks = nn.Sequential(*[Block(observation + i * each, each, norm, random) for i in range(layers)])
        start = self.state_width + action
        self.pair_blocks = nn.Sequential(*[Block(start + i * each, each, norm, random) for i in range(layers)])
        self.head = linear(self.pair_width, target, random)
        self.eval()

    def state(self, obs: Tensor) -> Tensor:
        return self.state_blocks(obs)

    def pair(self, z: Tensor, action: Tensor) -> Tensor:
        return self.pair_blocks(torch.cat([z, action], -1))

    def loss(self, obs: Tensor, action: Tensor, after: Tensor) -> Tensor:
        """L_aux with the statistics of this batch; the running ones move."""
        self.train()
        try:
            predicted = self.head(self.pair(self.state(obs), action))
        finally:
            self.eval()
        return F.mse_loss(predicted, after[:, : self.target])


def linear(inputs: int, outputs: int, random: torch.Generator) -> nn.Linear:
    """A linear layer, Glorot uniform with zero bias."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    assert isinstance(layer, nn.Linear)
    glorot_(layer.weight, inputs, outputs, random)
    nn.init.zeros_(layer.bias)
    return layer
