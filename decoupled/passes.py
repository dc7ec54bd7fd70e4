"""What a worker knows of one pass between its first operation and its backward."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from decoupled.messages import Data, Up
from decoupled.scaling import Scaled


@dataclass(slots=True)
class Pass:
    """One pass through one block."""

    replies: int  # Down messages still to come
    sent: int = 0  # Down messages sent
    data: Data | None = None
    batch: int = 0
    round: int = 0
    indices: Tensor | None = None
    version: int = 0  # of the weights in the forward
    offered: bool = False  # Up was sent before the forward
    own: bool = False  # the own objective has been taken
    hops: int = 0  # blocks between the objective behind the latest gradient and the block below
    total: Scaled | None = None  # sum of the gradients for the output
    void: bool = False

    def enter(self, message: Data | Up) -> None:
        """Note which pass it is, from a message that it begins with."""
        self.batch, self.round, self.indices = message.batch, message.round, message.indices
        self.void = self.void or message.void


def on(data: Data, device: torch.device) -> Data:
    """`data` with its targets on that device."""
    targets = None if data.targets is None else data.targets.to(device)
    return data if targets is data.targets else replace(data, targets=targets)
