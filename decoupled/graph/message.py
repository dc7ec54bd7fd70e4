"""What workers of a graph send one another: signals between nodes, and what a loss found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from decoupled.graph.node import Key, State
from decoupled.messages import Message
from decoupled.transport.codec import register


@register
@dataclass(frozen=True, slots=True)
class Signal(Message):
    """A message between two nodes; its key is the state.

    Attributes:
        back: whether it is an answer, on its way back.
        node, port: where it goes: an input of the node, or for an answer one of its outputs.
        payload: a tensor without a graph; None in an answer without a gradient.
        about: what state functions look up; see `Key`.
        version: number of updates of the sender's weights.
    """

    back: bool
    node: str
    port: int
    payload: Tensor | None
    about: Any
    version: int

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return 0 if self.payload is None else self.payload.nbytes

    @property
    def state(self) -> State:
        """The key, with the instance as a `Key` (messages from another process carry its plain number)."""
        key: Any = self.key
        return key if type(key[0]) is Key else (Key(key[0], self.about), *key[1:])


@register
@dataclass(frozen=True, slots=True)
class Found(Message):
    """See `decoupled.graph.node.Result`; its key is the state."""

    loss: float
    score: float
    samples: int
