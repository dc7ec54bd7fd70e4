"""Selection: what stands between the data and the blocks, and decides which samples they train on.

    source --candidates--> selector --batches--> feeder --passes--> blocks
                             ^  ^------- losses of what was trained -------' top block
                             '---------- losses of a probe ----------------' (only where candidates are scored first)

A method declares a `Selection`; it makes a `Chooser`, which sees candidates and says which rows to keep, and with which
weights. What is kept is gathered to batches of the size the data come in. A chooser may hear the losses of what was
trained: matched by batch number and sample index, never by position. `decoupled.selector` has the actors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from decoupled.messages import Data, Losses


class Choice(NamedTuple):
    """Positions of the candidates that are kept (None: all), and a weight for each of them (None: 1)."""

    rows: Tensor | None = None
    weights: Tensor | None = None


class Chooser(ABC):
    """The rule of one run, with what it learns.

    Attributes:
        scores: whether `choose` wants the network's present losses of the candidates.
        consulted: samples that a model of its own was asked about.
        flops: of all its work with models of its own so far.
    """

    scores: bool = False
    consulted: int = 0
    flops: float = 0.0

    def begin(self, epoch: int) -> None:  # noqa: B027
        """An epoch (0, 1, ...) begins; random numbers are a function of seed and epoch."""

    @abstractmethod
    def choose(self, samples: Data, losses: Tensor | None) -> Choice:
        """What to train on; `losses` (batch,) if it `scores`."""

    def hear(self, told: Losses, samples: Data) -> None:  # noqa: B027
        """`samples` were trained on, and `told` says with which losses; row i of both is one sample."""

    def state_dict(self) -> dict[str, Any]:
        """What it goes on with after an epoch."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Counterpart of `state_dict`."""


@dataclass(frozen=True, kw_only=True)
class Selection(ABC):
    """Which samples a method trains on.

    Attributes:
        lag: None: it hears no losses. n > 0: those of batch m are in before batch m + n is chosen, and none is lost.
            0: it takes what has arrived: the boss never waits, and losses that nobody had time for are dropped.
        scores: whether candidates may be scored by a forward of the network first.
        weighs: whether samples get weights.
        pool: batches of candidates that are chosen from together.
        warmup: epochs at the beginning in which all samples are trained on, without weights.
        ready: batches that may wait for the boss.
        packets: messages with losses that may wait for the chooser, where `lag` is 0.
        alpha: share of the past in the moving average of the losses, per batch.
    """

    lag: int | None = None
    scores: bool = False
    weighs: bool = False
    pool: int = 1
    warmup: int = 0
    ready: int = 5
    packets: int = 20
    alpha: float = 0.75

    @abstractmethod
    def chooser(self, inputs: Tensor, outputs: Sequence[int], seed: int) -> Chooser:
        """A fresh rule.

        Args:
            inputs: (batch, *features), some, for shape and type. outputs: shape of the network's output per sample.
            seed: of its weights and draws.
        """

    @property
    def fixed(self) -> bool:
        """Whether the choice does not depend on what arrives when."""
        return self.lag != 0


@dataclass
class Tally:
    """What a selector counts; see `SelectionStatistics`."""

    scanned: int = 0
    trained: int = 0
    scored: int = 0
    batches: int = 0
    packets: int = 0
    dropped: int = 0
    busy_seconds: float = 0.0
    wait_seconds: float = 0.0

    def add_seconds(self, busy: float, wait: float) -> None:
        self.busy_seconds, self.wait_seconds = self.busy_seconds + busy, self.wait_seconds + wait

    def state_dict(self) -> dict[str, Any]:
        counts = ("scanned", "trained", "scored", "batches", "packets", "dropped")
        return {name: getattr(self, name) for name in counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, count in state.items():
            setattr(self, name, count)


@dataclass(frozen=True)
class SelectionStatistics:
    """What stood between the data and the blocks, since the trainer was made.

    Attributes:
        scanned: samples that came from the data. trained: those that went to the blocks.
        scored: samples that were sent through the network to learn their losses first.
        consulted: samples that a model of the selector's own was asked about. flops: of all work with such a model.
        batches: that went to the blocks.
        packets: messages with losses that were used. dropped: those that nobody had time for.
        busy_seconds, wait_seconds: of the selector (0 on the simulator).
    """

    scanned: int
    trained: int
    scored: int
    consulted: int
    flops: float
    batches: int
    packets: int
    dropped: int
    busy_seconds: float
    wait_seconds: float
