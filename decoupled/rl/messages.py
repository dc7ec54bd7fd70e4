"""What the roles send one another.

replay --Go--> actor i --Experience--> replay --Drawn--> learner --Judged--> replay      learner --Weights--> actors
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from decoupled.messages import Message
from decoupled.transport.codec import register


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel(Message):
    """Tensors without a graph, and how many updates the sender knows of."""

    payload: tuple[Tensor, ...] = ()
    version: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return sum(tensor.nbytes for tensor in self.payload)


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Go(Parcel):
    """Make `steps` steps of every environment, at `random` or by the policy."""

    steps: int
    random: bool


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Experience(Parcel):
    """`steps` environment steps: the rows that are complete, their |td| (by priority only), and episodes that ended."""

    steps: int
    episodes: tuple[tuple[float, int], ...]


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn(Parcel):
    """One update to make: (rows, importance weights, rows for the features), each possibly empty; or only these."""

    kind: str


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Judged(Parcel):
    """An update is finished: the batch's |td|, and the loss of the features (None: not asked for)."""

    auxiliary: float | None


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Weights(Parcel):
    """What acting needs of the agent, as one vector."""
