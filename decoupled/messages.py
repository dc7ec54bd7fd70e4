"""The records that cross block boundaries - the only thing that does.

    source --Data--> block k        what to train on (inputs for block 0, targets and sample indices where needed)
    top block --Losses--> selector  how it went, sample by sample (see `decoupled.selection`)
    selector --Probe--> block k     what would it say to these? A forward without training, from block to block
    block k --Up--> block k+1       what the coupling sends towards the output
    block k+1 --Down--> block k     what the coupling sends back (a gradient, a target, nothing)
    End                             "no batch with this number or a later one will come", on every port

`key` numbers the messages of a run: one key per pass through the network (a batch, a micro-batch of it, or an inner
round on it), and matching is by key, never by order of arrival. Tensors in a payload carry no autograd graph.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from decoupled.errors import ProtocolError


@dataclass(frozen=True, slots=True)
class Message:
    """Anything an actor can send: `key` is what it is matched by (a pass number; for other wirings any state)."""

    key: Hashable


@dataclass(frozen=True, slots=True)
class End(Message):
    """No message with this key or a later one will come on this port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Data(Message):
    """One pass of one batch, from the source to a block.

    Attributes:
        batch: number of the minibatch since the trainer was made.
        round: number of the micro-batch or inner round within the minibatch.
        rounds: how many passes this minibatch makes.
        indices: (batch,) sample numbers in the data set, or None when the data does not say.
        inputs: (batch, *features), None for blocks that do not read them.
        targets: (batch, ...), None for blocks that do not read them.
        share: weight of this pass in the minibatch mean (micro-batches: their share of the samples).
        weights: (batch,) factors of the samples' losses in every objective, or None: all 1.
        void: an empty pass that keeps the order intact; nothing is computed on it.
    """

    batch: int
    round: int = 0
    rounds: int = 1
    indices: Tensor | None = None
    inputs: Tensor | None = None
    targets: Tensor | None = None
    share: float = 1.0
    weights: Tensor | None = None
    void: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses(Message):
    """The loss of every sample of one pass.

    Attributes:
        batch, round, indices: as in the `Data` it is about.
        losses: (batch,), before weights.
        threshold: moving average of the losses at that moment.
        void: there are none: the pass was dropped, or its losses were not finite.
    """

    batch: int
    round: int = 0
    indices: Tensor | None = None
    losses: Tensor | None = None
    threshold: float = 0.0
    void: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe(Message):
    """Samples on their way through the network, to learn their losses; to be taken before pass `key` is begun.

    Attributes:
        batch, indices, targets: as in `Data`.
        x: input of the block that receives it.
    """

    batch: int
    x: Tensor
    targets: Tensor
    indices: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary(Message):
    """What `Up` and `Down` have in common.

    Attributes:
        batch, round, indices: as in `Data`.
        version: number of updates of the sender's weights that the payload was computed with.
        payload: tensors in the order the coupling declares; no graph is attached.
        void: the pass was dropped (empty micro-batch, or a non-finite loss under the policy "skip").
        news: numbers that corrections of the sender tell those of the receiver.
    """

    batch: int
    round: int
    indices: Tensor | None
    version: int
    payload: tuple[Tensor, ...]
    void: bool = False
    news: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for tensor in self.payload:
            if tensor.grad_fn is not None or tensor.requires_grad:
                raise ProtocolError(
                    f"batch {self.batch}: a payload tensor still carries an autograd graph; send tensor.detach()"
                )

    @property
    def nbytes(self) -> int:
        """Bytes of the payload tensors."""
        return sum(t.numel() * t.element_size() for t in self.payload)


@dataclass(frozen=True, slots=True, kw_only=True)
class Up(Boundary):
    """From block k to block k+1; `overflow`: news of gradients that were not finite, see `decoupled.scaling`."""

    overflow: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Down(Boundary):
    """From block k+1 to block k.

    Attributes:
        hops: blocks between the objective it comes from and the receiver.
        scale: by how much the gradient in the payload is too large: the loss scale of when its objective was taken.
    """

    hops: int = 1
    scale: float = 1.0
