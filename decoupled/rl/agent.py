"""What an algorithm is to the roles: networks, how to act, how to learn. Actions are in [-1, 1] everywhere here.

    actors      act(s)          with a copy of `shared`: policy, feature extractor with its statistics, critics
                errors(batch)   initial priorities
    learner     learn(batch)    one update of actor and critics; returns each sample's TD error
                auxiliary(...)  one update of the feature extractor, if there is one

A batch is made of n-step transitions:  y = reward + discount V(next_obs),  discount = gamma^n, or 0 after a terminal.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Random = torch.Generator | None


class Spaces(NamedTuple):
    """Sizes of an environment: observation, action, and the leading part of an observation that is to be predicted."""

    observation: int
    action: int
    target: int


class Batch(NamedTuple):
    """Transitions: (batch, observation), (batch, action), (batch, 1), (batch, 1), (batch, observation) twice.

    `after` is the observation one step later, `next_obs` the one n steps later (the same for n = 1).
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    discount: Tensor
    next_obs: Tensor
    after: Tensor


class Agent(ABC):
    """One algorithm with its networks and optimizers.

    Attributes:
        networks: all of them. shared: the part that acting needs, a submodule.
        optimizers: by name.
        random: draws the noise of learning.
        options: by name, those that a saved state cannot be put back without.
    """

    networks: nn.ModuleDict
    shared: nn.ModuleDict
    optimizers: dict[str, torch.optim.Optimizer]
    random: torch.Generator
    options: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def act(self, obs: Tensor, random: Random) -> Tensor:
        """Actions for (n, observation); with `random` None the best known ones, without exploration."""

    @abstractmethod
    def errors(self, batch: Batch, random: Random) -> Tensor:
        """(batch,) TD errors by the networks in `shared`."""

    @abstractmethod
    def learn(self, batch: Batch, weights: Tensor | None) -> Tensor:
        """One update; `weights` (batch,) are multiplied into the losses. Returns the (batch,) TD errors before it."""

    @abstractmethod
    def features(self, batch: Batch) -> Tensor:
        """(critics, batch, width): what the last layer of each critic reads."""

    def auxiliary(self, batch: Batch) -> float | None:
        """One update of the features by their own loss; None: there are none to learn."""
        return None

    @property
    def has_auxiliary(self) -> bool:
        """Whether `auxiliary` does anything."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimizers and the state of the noise; what is learned later does not change it."""
        state = {
            "networks": self.networks.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "random": self.random.get_state(),
        }
        return copy.deepcopy(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self.networks.load_state_dict(state["networks"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.random.set_state(state["random"])


def packed(module: nn.Module) -> Tensor:
    """All parameters and buffers (statistics of BatchNorm, too) as one new vector."""
    return torch.cat([value.detach().reshape(-1).to(torch.float32) for value in module.state_dict().values()])


def unpack(module: nn.Module, vector: Tensor) -> None:
    """Put a vector from `packed` into a module of the same form."""
    values = list(module.state_dict().values())
    pieces = vector.split([value.numel() for value in values])
    with torch.no_grad():
        for value, piece in zip(values, pieces, strict=True):
            value.copy_(piece.view_as(value))
