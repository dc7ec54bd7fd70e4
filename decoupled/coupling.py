"""Coupling: one edge k -> k+1. What goes up, what comes down, and the objective J_k that block k minimises.

        block k                         edge                          block k+1
    y --> Lower.emit    ------------ Up(payload) ------------>  Upper.receive --> x
          Lower.objective(y) = J_k  (local head, penalty, ...)
    g <-- Lower.pull    <----------- Down(payload) -----------  Upper.reply  <-- dJ/dx

The lower half lives with block k, the upper half with block k+1; each may own parameters (`module`) with an optimizer
of their own. The objective and the replies alone decide which losses reach which parameters. The top block's lower half
is the end of the network (`Top`); the bottom block's upper half is the data (`Bottom`).

    coupling       up           down                J_k (k < K-1)
    Gradient       activation   gradient            none: block k follows the gradient from above
    LocalObjective activation   nothing             loss(head_k(y), targets)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from decoupled import heads
from decoupled.intake import Intake
from decoupled.messages import Data, Up
from decoupled.scaling import loss_of
from decoupled.steps import MakeOptimizer

Loss = Callable[[Tensor, Tensor], Tensor]
Payload = tuple[Tensor, ...]


@dataclass(frozen=True)
class Place:
    """Where a half is built: block `k` of `K`, with what it needs to know about the network around it.

    Attributes:
        k, K: the block (lower half: below the edge, upper half: above it) and the number of blocks.
        loss: (output, target) -> scalar batch mean.
        shapes: output shape of every block without the batch dimension.
        inputs: shape of the network's input without the batch dimension.
        modules: every block, its children being the units it was cut from; to build others like them, never to call.
    """

    k: int
    K: int
    loss: Loss
    shapes: tuple[tuple[int, ...], ...]
    inputs: tuple[int, ...] = ()
    modules: tuple[nn.Module, ...] = ()

    @property
    def top(self) -> bool:
        return self.k == self.K - 1


class Half:
    """What the two halves of an edge have in common: each hears the other, and may own parameters.

    Attributes:
        awaits: kind of the operation that takes what the other half sends, "" if nothing comes (or nobody takes it).
            "A": an answer, for which no pass through the block waits.
        learns_from_answers: whether `answer` leaves gradients in its parameters, which are stepped on at once.
        needs_data: whether it reads sample indices, and what else the class says.
        module: parameters of its own (dropped when the network is used), or None.
        optimizer: makes the optimizer of those parameters; None: they have one as the block.
    """

    awaits: str = ""
    learns_from_answers: bool = False
    needs_data: bool = False
    module: nn.Module | None = None
    optimizer: MakeOptimizer | None = None

    def begin(self, epoch: int) -> None:
        """An epoch (0, 1, ...) begins: the hook of methods whose `Order.phases` change what a half does."""

    def answer(self, payload: Payload | None) -> None:
        """Take, in an operation A, what the other half has sent; None if its pass was dropped there."""

    def clear(self) -> None:
        """Forget passes in flight (after a failure, or at a drained point)."""


class Lower(Half):
    """The half that lives with block k; it awaits Down in B (also I and W), or in A. Of the data it reads the targets.

    Attributes:
        replies: Down messages per pass.
        has_objective: whether J_k exists here.
        needs_inputs: whether it reads the raw batch as well.
        remedy: what to do about an objective that is not finite.
        relays: whether gradients that I takes are only passed on: weights follow what B or W takes alone, not the sum.
    """

    replies: int = 0
    has_objective: bool = False
    needs_inputs: bool = False
    remedy: str = "lower the learning rate, or train with on_nonfinite='skip'"
    relays: bool = False

    @property
    def held_bytes(self) -> int:
        """Bytes kept from pass to pass beside parameters (auxiliary variables)."""
        return 0

    def figures(self) -> Mapping[str, float]:
        """What it has measured about its edge in this run, by name (residuals), for the statistics."""
        return {}

    def offer(self, data: Data) -> Payload | None:
        """Payload of an operation E, before the block has run; None if only `emit` can make it."""
        return None

    def emit(self, y: Tensor, data: Data | None) -> Payload:
        """Payload of Up, called at every forward; sent unless `offer` has sent one. `y`: (batch, *features)."""
        return (y.detach(),)

    def objective(self, y: Tensor, data: Data | None) -> Tensor | None:
        """J_k, a scalar; `y` is a leaf that requires grad. None: there is nothing to learn from this pass yet."""
        raise NotImplementedError(f"{type(self).__name__} has no objective")

    def pull(self, payload: Payload) -> Tensor:
        """The cotangent for `y` that a Down stands for."""
        return payload[0]

    def returned(self, payload: Payload) -> Tensor | None:
        """The block's own output as a Down brings it back, or None if it brings none."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """State beside the parameters of `module`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Counterpart of `state_dict`."""


class Upper(Half):
    """The half that lives with block k+1; it awaits Up in F, or in A. Of the data it reads the raw batch.

    Attributes:
        replies: whether it sends a Down.
        differentiates: whether that needs the gradient for the block's input.
        streams: rows of the block's input per sample.
        intake: the buffer that Up comes through; its Down, without a payload, then asks for the next.
    """

    awaits = "F"
    replies: bool = False
    differentiates: bool = True
    streams: int = 1
    intake: Intake | None = None

    def carried(self, message: Up) -> Data | None:
        """What came along with the activation in place of a Data message (labels), or None."""
        return None

    def receive(self, payload: Payload, data: Data | None) -> Tensor:
        """The block's input, from an Up that the forward has waited for (else the payload is empty)."""
        return payload[0]

    def reply(self, gradient: Tensor) -> Payload:
        """Payload of Down, from the gradient for the block's input."""
        return (gradient,)

    def reply_with(self, gradient: Tensor | None, x: Tensor, y: Tensor, heard: Payload) -> Payload:
        """As `reply`, for couplings that send something else.

        Args:
            gradient: for the block's input; None unless it `differentiates`.
            x, y: the block's input and output, as the backward has them.
            heard: payload of the Down just taken; at the top dJ/dy (scaled only if the coupling is `linear`).
        """
        assert gradient is not None
        return self.reply(gradient)


class Bottom(Upper):
    """Below block 0: the data."""

    needs_data = True
    awaits = ""

    def receive(self, payload: Payload, data: Data | None) -> Tensor:
        assert data is not None and data.inputs is not None
        return data.inputs


class Top(Lower):
    """Above the last block: the loss of the network."""

    has_objective = True
    needs_data = True

    def __init__(self, place: Place) -> None:
        self._loss = place.loss

    def objective(self, y: Tensor, data: Data | None) -> Tensor:
        return loss_of(self._loss, y, data)


class Coupling(ABC):
    """Builds the halves of every edge.

    Attributes:
        up, down: names of the payload tensors, in order.
        down_like_up: whether tensors that go down have the shape of what went up.
        lossy: whether a block takes what is there, so that batches are dropped or used again as arrivals decide.
        linear: whether what comes down is linear in the gradient and only handed on as one, so that a loss scale may
            stay in it; else it is divided by the scale before it is sent.
        substitutes: whether blocks are trained on other inputs than the forward network gives them, so that running
            statistics of BatchNorm do not fit it; `Trainer.update_bn` makes them fit before a test.
    """

    up: tuple[str, ...] = ("activation",)
    down: tuple[str, ...] = ()
    down_like_up: bool = True
    lossy: bool = False
    linear: bool = False
    substitutes: bool = False

    @abstractmethod
    def lower(self, place: Place) -> Lower:
        """Half above block `place.k` (for the last block: the end of the network)."""

    @abstractmethod
    def upper(self, place: Place) -> Upper:
        """Half below block `place.k` > 0."""

    def bottom(self, place: Place) -> Upper:
        """Half below block 0."""
        return Bottom()

    def front(self, k: int, K: int) -> nn.Module | None:
        """A layer without weights that block `k` begins with, in training and whenever the network is used."""
        return None


class _PullGradient(Lower):
    awaits, replies = "B", 1


class _PushGradient(Upper):
    replies = True


class Gradient(Coupling):
    """Activation up, gradient down: one loss at the top reaches every block."""

    down = ("gradient",)
    linear = True

    def lower(self, place: Place) -> Lower:
        return Top(place) if place.top else _PullGradient()

    def upper(self, place: Place) -> Upper:
        return _PushGradient()


class LocalHead(Lower):
    """J_k = loss(head(y), targets), with the head's own parameters; optionally gradients from above as well.

    Args:
        place: where.
        head: which auxiliary head, see `decoupled.heads`.
        own: whether J_k exists (False: only gradients from above).
        replies: Down messages per pass.
    """

    needs_data = True

    def __init__(self, place: Place, head: str, own: bool = True, replies: int = 0) -> None:
        self._loss = place.loss
        self.has_objective, self.replies = own, replies
        self.awaits = "B" if replies else ""
        if own and not place.top:
            self.module = heads.build(head, place.shapes[place.k], place.shapes[-1])

    def objective(self, y: Tensor, data: Data | None) -> Tensor:
        return loss_of(self._loss, y if self.module is None else self.module(y), data)


@dataclass(frozen=True)
class LocalObjective(Coupling):
    """Activation up, nothing down: every block follows its own loss."""

    head: str = "auto"
    down: tuple[str, ...] = field(default=(), init=False)

    def lower(self, place: Place) -> Lower:
        return LocalHead(place, self.head)

    def upper(self, place: Place) -> Upper:
        return Upper()
