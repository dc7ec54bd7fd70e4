"""Labels travel with the activation, and every block but the first takes its batches from a buffer.

    block k-1 --(y, target)--> intake k --> block k:  F, B, S, then "ready" to its own intake

Greedy otherwise: J_k = loss(head_k(y_k), target), nothing comes down. The first block meets the data in order, once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from decoupled.coupling import Coupling, LocalHead, Lower, Payload, Place, Upper
from decoupled.intake import Intake
from decoupled.messages import Data, Up


@dataclass(frozen=True)
class Replayed(Coupling):
    """Activation and target up, through a buffer; nothing down."""

    head: str
    slots: int
    uses: int
    up: tuple[str, ...] = field(default=("activation", "target"), init=False)
    down: tuple[str, ...] = field(default=(), init=False)
    lossy: bool = field(default=True, init=False)

    def lower(self, place: Place) -> Lower:
        return Carrying(place, self.head)

    def upper(self, place: Place) -> Upper:
        return Buffered(Intake(place.k, self.slots, self.uses))


class Carrying(LocalHead):
    """A head that passes the targets on."""

    def __init__(self, place: Place, head: str) -> None:
        super().__init__(place, head)
        self.needs_data = place.k == 0  # to the others they come with the activation

    def emit(self, y: Tensor, data: Data | None) -> tuple[Tensor, ...]:
        assert data is not None and data.targets is not None
        return (y.detach(), data.targets)


class Buffered(Upper):
    """Asks its intake for the next batch when it is through with one."""

    replies, differentiates = True, False

    def __init__(self, intake: Intake) -> None:
        self.intake = intake

    def carried(self, message: Up) -> Data | None:
        return Data(message.key, batch=message.batch, indices=message.indices, targets=message.payload[1])

    def reply_with(self, gradient: Tensor | None, x: Tensor, y: Tensor, heard: Payload) -> Payload:
        return ()
