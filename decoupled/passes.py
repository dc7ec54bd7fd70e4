"""What a worker knows of one pass between its first operation and its backward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from decoupled.messages import Data


@dataclass(slots=True)
class Pass:
    """One pass at one block."""

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
    total: Tensor | None = None  # sum of the gradients for the output
    void: bool = False
