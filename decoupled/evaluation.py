"""Evaluation: the held-out metric of the forward network, the only thing all methods are compared by.

    source --inputs--> block 0 --up--> block 1 --up--> ... block K-1 <--targets-- source

It is a graph like training, so it runs where the blocks live, and batches follow one another through them.
`evaluate` does it in the caller, for networks outside the library.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decoupled.block import Block
from decoupled.coupling import Loss
from decoupled.errors import OperationError, UserError
from decoupled.messages import Data, End, Message, Up
from decoupled.runtime.contract import Actor, Edge, Graph, Outcome, Runtime, Want
from decoupled.source import Reader, Source, Whole, unpack

AHEAD = 2  # batches that may wait on an edge


@dataclass
class Score:
    """Sums over samples; `decisions` counts the class numbers that were decided."""

    total: float = 0.0
    correct: int = 0
    decisions: int = 0
    samples: int = 0

    def add(self, output: Tensor, targets: Tensor, loss: Loss) -> None:
        """Count one batch: output (batch, ...), targets (batch, ...)."""
        targets = targets.to(output.device)
        self.total += float(loss(output, targets)) * len(output)
        self.samples += len(output)
        if not targets.is_floating_point() and output.dim() == targets.dim() + 1:
            self.correct += int((output.argmax(1) == targets).sum())
            self.decisions += targets.numel()

    def means(self) -> dict[str, float]:
        """loss and accuracy; see `evaluate`.

        Raises:
            UserError: nothing was counted.
        """
        if not self.samples:
            raise UserError("there is nothing to evaluate: the loader is empty")
        accuracy = self.correct / self.decisions if self.decisions else float("nan")
        return {"loss": self.total / self.samples, "accuracy": accuracy}


class Stage(Actor):
    """One block of the forward network, in evaluation mode.

    Args:
        block: the block. k, K: its number, and how many there are.
        loss: (output, target) -> scalar batch mean.

    Attributes:
        score: of the last block.
    """

    def __init__(self, block: Block, k: int, K: int, loss: Loss) -> None:
        self.name, self.device, self.score = block.name, block.device, Score()
        self._block, self._loss = block, loss
        self._ports = ("data",) if k == 0 else ("up",)
        self._last = k == K - 1
        if self._last and k:
            self._ports += ("data",)
        self._ended = False

    def wants(self) -> Sequence[Want]:
        return () if self._ended else (Want(self._ports),)

    def handle(self, want: Want, messages: tuple[Message, ...]) -> Outcome:
        if isinstance(messages[0], End):
            self._ended = True
            return Outcome(None, [("up", messages[0])])
        try:
            return self._run(messages)
        except Exception as error:
            raise OperationError(self.name, f"evaluation of batch {messages[0].key}", error) from error

    def _run(self, messages: tuple[Message, ...]) -> Outcome:
        given, data = messages[0], messages[-1]
        x = given.inputs if isinstance(given, Data) else given.payload[0] if isinstance(given, Up) else None
        assert x is not None
        y = self._block.infer(x.to(self.device))
        if not self._last:
            up = Up(given.key, batch=0, round=0, indices=None, version=self._block.version, payload=(y,))
            return Outcome(f"F{given.key}", [("up", up)])
        assert isinstance(data, Data) and data.targets is not None
        with torch.no_grad():
            self.score.add(y, data.targets, self._loss)
        return Outcome(f"F{given.key}")


def evaluate_blocks(
    blocks: Sequence[Block], batches: Iterable[Any], loss: Loss, runtime: Runtime, output: tuple[int, ...] | None
) -> dict[str, float]:
    """The same as `evaluate`, on the runtime where the blocks live; `output`: refuse labels that do not fit it."""
    stages = [Stage(block, k, len(blocks), loss) for k, block in enumerate(blocks)]
    first, last = stages[0].name, stages[-1].name
    readers = [Reader(name, inputs=name == first, targets=name == last) for name in dict.fromkeys((first, last))]
    ahead = AHEAD * (len(stages) + 1)  # targets wait until their inputs have come through
    edges = [Edge("source", reader.name, reader.name, "data", ahead) for reader in readers]
    edges += [Edge(below.name, "up", above.name, "up", AHEAD) for below, above in itertools.pairwise(stages)]
    with evaluating([block.module for block in blocks]):
        runtime.run(Graph([Source(batches, Whole(), readers, output=output), *stages], edges))
    return runtime.agree(stages[-1].score, of=last).means()


def evaluate(units: Sequence[nn.Module], batches: Iterable[Any], loss: Loss) -> dict[str, float]:
    """Run a network in evaluation mode without gradients, in the caller; its training mode is put back afterwards.

    Args:
        units: the network in order; each may live on its own device.
        batches: (inputs, targets) or (inputs, targets, indices).
        loss: (output, target) -> scalar batch mean.

    Returns:
        loss: mean over samples. accuracy: share of correct classes; NaN where targets are not class numbers.
    """
    score = Score()
    with evaluating(units), torch.no_grad():
        for item in batches:
            x, targets, _ = unpack(item)
            for unit in units:
                reference = next(unit.parameters(), None)
                x = unit(x if reference is None else x.to(reference.device))
            score.add(x, targets, loss)
    return score.means()


class evaluating:
    """Evaluation mode within, the former modes afterwards."""

    def __init__(self, units: Iterable[nn.Module]) -> None:
        self._modes = [(module, module.training) for unit in units for module in unit.modules()]

    def __enter__(self) -> None:
        for module, _ in self._modes:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module, mode in self._modes:
            module.training = mode
