"""The source: turns the user's batches into passes and feeds the blocks that read data.

    Whole()     one pass per minibatch
    Split(M)    M micro-batches per minibatch, weighted by their share of the samples (synchronous pipelines)
    Repeat(M)   M inner rounds on the same minibatch (auxiliary variables), of one or more passes each

It runs in the caller's thread, because it iterates the caller's data; bounded ports hold it back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from decoupled.errors import UserError, first_line
from decoupled.messages import Data, End, Message
from decoupled.runtime.contract import Actor, Outcome, Want
from decoupled.sample_losses import Loss, ignored, mass


class Whole:
    """One pass per minibatch.

    Attributes:
        count: passes per minibatch. share: part of the minibatch's samples in each. steps: of an optimizer.
    """

    count: int = 1
    share: float = 1.0
    steps: int = 1

    def passes(self, data: Data, mass: Callable[[Tensor], float] = len) -> Iterator[Data]:
        """The passes of one minibatch; their keys are set by the source.

        Args:
            mass: targets -> how much they count in the mean of a batch (`decoupled.sample_losses.mass`).
        """
        yield data


@dataclass(frozen=True)
class Split(Whole):
    """`parts` micro-batches per minibatch; those without a sample that counts are void, so the order stays the same."""

    parts: int

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise UserError(f"microbatches must be at least 1, got {self.parts}")
        object.__setattr__(self, "count", self.parts)
        object.__setattr__(self, "share", 1 / self.parts)

    def passes(self, data: Data, mass: Callable[[Tensor], float] = len) -> Iterator[Data]:
        assert data.inputs is not None and data.targets is not None
        if self.parts == 1:
            yield data
            return
        inputs, targets = data.inputs.tensor_split(self.parts), data.targets.tensor_split(self.parts)
        none = [None] * self.parts
        indices = none if data.indices is None else data.indices.tensor_split(self.parts)
        weights = none if data.weights is None else data.weights.tensor_split(self.parts)
        total = mass(data.targets)
        for m in range(self.parts):
            share = mass(targets[m]) / total if total else len(inputs[m]) / len(data.inputs)
            yield replace(
                data, round=m, rounds=self.parts, inputs=inputs[m], targets=targets[m], indices=indices[m],
                weights=weights[m], share=share, void=share == 0,
            )  # fmt: skip


@dataclass(frozen=True)
class Repeat(Whole):
    """`rounds` rounds on the same minibatch, each of `passes_per_round` passes that share one optimizer step."""

    rounds: int
    passes_per_round: int = 1

    def __post_init__(self) -> None:
        for name, value in (("rounds", self.rounds), ("passes_per_round", self.passes_per_round)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        object.__setattr__(self, "count", self.rounds * self.passes_per_round)
        object.__setattr__(self, "steps", self.rounds)

    def passes(self, data: Data, mass: Callable[[Tensor], float] = len) -> Iterator[Data]:
        for m in range(self.count):
            yield replace(data, round=m, rounds=self.count, share=1 / self.passes_per_round)


@dataclass(frozen=True)
class Reader:
    """A block that reads data: which parts of it."""

    name: str
    inputs: bool
    targets: bool


class Addressed:
    """Numbers passes, and gives every reader the parts that it reads.

    Args:
        readers: the blocks to send to. start: key of the first pass.
    """

    def __init__(self, readers: Sequence[Reader], start: int) -> None:
        self.key, self._readers = start, readers

    def sends(self, data: Data) -> list[tuple[str, Message]]:
        """The messages of the next pass."""
        sends: list[tuple[str, Message]] = []
        for reader in self._readers:
            inputs, targets = data.inputs if reader.inputs else None, data.targets if reader.targets else None
            sends.append((reader.name, replace(data, key=self.key, inputs=inputs, targets=targets)))
        self.key += 1
        return sends

    def end(self) -> list[tuple[str, Message]]:
        """No more passes."""
        return [(reader.name, End(self.key)) for reader in self._readers]


class Source(Actor):
    """Feeds one run.

    Args:
        batches: yields (inputs, targets) or (inputs, targets, indices); see `unpack`.
        feed: how a minibatch becomes passes.
        readers: the blocks to send to.
        start: key of the first pass. first_batch: number of the first minibatch.
        output: shape of the network's output per sample, classes first, if its loss takes class numbers, to refuse
            others early (positions behind the classes may be more or fewer, in sequences); None: no check.
        on_batch: called with the number of samples after every minibatch.
        loss: says what micro-batches count, and which label stands for none; None: samples, -100.
    """

    name = "source"
    in_caller = True

    def __init__(
        self,
        batches: Iterable[object],
        feed: Whole,
        readers: Sequence[Reader],
        start: int = 0,
        first_batch: int = 0,
        output: tuple[int, ...] | None = None,
        on_batch: Callable[[int], None] | None = None,
        loss: Loss | None = None,
    ) -> None:
        self.batch, self.samples = first_batch, 0
        self._mass, self._ignored = (len, -100) if loss is None else (partial(mass, loss), ignored(loss))
        self._feed, self._addressed, self._output, self._on_batch = feed, Addressed(readers, start), output, on_batch
        self._passes = self._all(batches)
        self._ended = False

    @property
    def key(self) -> int:
        """Of the next pass."""
        return self._addressed.key

    def wants(self) -> Sequence[Want]:
        return () if self._ended else (Want(),)

    def handle(self, want: Want, messages: tuple[Message, ...]) -> Outcome:
        data = next(self._passes, None)
        if data is None:
            self._ended = True
            return Outcome(None, self._addressed.end())
        return Outcome(None, self._addressed.sends(data))

    def _all(self, batches: Iterable[object]) -> Iterator[Data]:
        for item in batches:
            inputs, targets, indices = unpack(item)
            self._check(inputs, targets)
            data = Data(0, batch=self.batch, inputs=inputs, targets=targets, indices=indices)
            yield from self._feed.passes(data, self._mass)
            self.batch, self.samples = self.batch + 1, self.samples + len(inputs)
            if self._on_batch is not None:
                self._on_batch(len(inputs))

    def _check(self, inputs: Tensor, targets: Tensor) -> None:
        if len(inputs) != len(targets):
            raise UserError(f"batch {self.batch}: {len(inputs)} inputs but {len(targets)} targets; give one per sample")
        if not len(inputs):
            raise UserError(f"batch {self.batch} has no samples; leave empty batches out")
        if self._output is None or targets.numel() == 0:
            return
        (classes, *positions), kind = self._output, str(targets.dtype).removeprefix("torch.")
        if targets.is_floating_point():
            if targets.dim() != 1 + len(self._output) or targets.shape[1] != classes:
                raise UserError(
                    f"batch {self.batch}: the loss takes class numbers, or a probability of each of the outputs "
                    f"{self._output}, got {kind} {tuple(targets.shape)}; convert class numbers with .long()"
                )
            return
        if targets.dtype not in (torch.int64, torch.uint8) or targets.dim() != 1 + len(positions):
            shape = ", ".join(["batch", *map(str, positions)])
            raise UserError(
                f"batch {self.batch}: the network's output {self._output} per sample needs class numbers of shape "
                f"({shape}) and type int64, got {kind} {tuple(targets.shape)}; reshape them, or convert with .long()"
            )
        known = targets.long()
        known = known[known != self._ignored]
        if not known.numel():
            return
        low, high = map(int, torch.aminmax(known))
        if high >= classes or low < 0:
            raise UserError(
                f"batch {self.batch}: labels go from {low} to {high}, but the network has {classes} outputs; "
                f"labels must be 0 to {classes - 1}"
            )


def peek(batches: Iterable[Any], when: str) -> tuple[Tensor, Iterator[Any]]:
    """The inputs of the first batch, and all batches.

    Raises:
        UserError: there are none.
    """
    if not (isinstance(batches, Iterable) or hasattr(batches, "__getitem__")):
        kind = type(batches).__name__
        raise UserError(f"{when} has no batches: a {kind} is none; pass a list or a DataLoader")
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise UserError(
            f"{when} has no batches: the loader is empty, or an iterator that was used up; pass a list or a DataLoader"
        )
    return unpack(first)[0], itertools.chain([first], iterator)


def unpack(item: object) -> tuple[Tensor, Tensor, Tensor | None]:
    """Read one batch: (inputs, targets) or (inputs, targets, indices), each a tensor or array.

    Returns:
        inputs (batch, *features), targets (batch, ...), indices (batch,) int64 or None.

    Raises:
        UserError: anything else.
    """
    if not isinstance(item, tuple | list) or len(item) not in (2, 3):
        raise UserError(
            f"a batch must be (inputs, targets) or (inputs, targets, indices), got {type(item).__name__}"
            + (f" of {len(item)}" if isinstance(item, tuple | list) else "")
        )
    try:
        inputs, targets = torch.as_tensor(item[0]), torch.as_tensor(item[1])
        indices = None if len(item) == 2 or item[2] is None else torch.as_tensor(item[2]).long()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"inputs, targets and indices must each be one tensor or array ({first_line(error)})"
        ) from error
    if not inputs.dim() or not targets.dim():
        raise UserError(f"inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)} need a batch dimension")
    return inputs, targets, indices
