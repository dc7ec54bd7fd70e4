"""A coupling whose Down brings a block's own output back together with its gradient.

    block k --- y ---> block k+1                 y~ = x of block k+1 as its backward has it: kept, or reconstructed
    block k <- y~, d - block k+1

Source: Rivaud et al. 2025 (arXiv 2406.02052), algorithm 1.
"""

from __future__ import annotations

from torch import Tensor

from decoupled.coupling import Coupling, Lower, Payload, Place, Top, Upper


class _Takes(Lower):
    awaits, replies = "B", 1

    def returned(self, payload: tuple[Tensor, ...]) -> Tensor:
        return payload[0]

    def pull(self, payload: tuple[Tensor, ...]) -> Tensor:
        return payload[1]


class _Returns(Upper):
    replies = True

    def reply_with(self, gradient: Tensor | None, x: Tensor, y: Tensor, heard: Payload) -> Payload:
        assert gradient is not None
        return x, gradient


class ReturnOutput(Coupling):
    """Activation up; the activation, as it was or as it was reconstructed, and its gradient down."""

    down = ("activation", "gradient")
    linear = True

    def lower(self, place: Place) -> Lower:
        return Top(place) if place.top else _Takes()

    def upper(self, place: Place) -> Upper:
        return _Returns()
