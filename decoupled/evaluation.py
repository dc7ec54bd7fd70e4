"""Evaluation: the held-out metric of the forward network, the only thing all methods are compared by.

    source --inputs--> block 0 --up--> block 1 --up--> ... block K-1 <--targets-- source

It is a graph like training, so it runs where the blocks live, and batches follow one another through them.
`evaluate` does it in the caller, for networks outside the library. `update_bn` and `update_blocks` run the same way, to
estimate running statistics again: of methods whose blocks are trained on something else than the forward network gives
them (`Coupling.substitutes`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from decoupled.block import Block
from decoupled.coupling import Loss
from decoupled.errors import OperationError, UserError
from decoupled.messages import Data, End, Message, Up
from decoupled.runtime.contract import Actor, Edge, Graph, Outcome, Runtime, Want
from decoupled.sample_losses import ignored, mass
from decoupled.source import Reader, Source, Whole, unpack

AHEAD = 2  # batches that may wait on an edge


@dataclass
class Score:
    """Sums over samples; `mass` is what their losses count, `decisions` are the class numbers that were decided."""

    total: float = 0.0
    mass: float = 0.0
    correct: int = 0
    decisions: int = 0
    samples: int = 0

    def add(self, output: Tensor, targets: Tensor, loss: Loss) -> None:
        """Count one batch: output (batch, ...), targets (batch, ...)."""
        targets = targets.to(output.device)
        if output.dtype in (torch.bfloat16, torch.float16):  # of autocast; sums of losses are not for them
            output = output.float()
        if counts := mass(loss, targets):
            self.total += float(loss(output, targets)) * counts
        self.mass += counts
        self.samples += len(output)
        classes_second = output.dim() > 1 and output.shape[:1] + output.shape[2:] == targets.shape
        if classes_second and not targets.is_floating_point():
            known = targets.long() != ignored(loss)
            self.correct += int(((output.argmax(1) == targets) & known).sum())
            self.decisions += int(known.sum())

    def means(self) -> dict[str, float]:
        """loss and accuracy; see `evaluate`.

        Raises:
            UserError: nothing was counted.
        """
        if not self.samples:
            raise UserError("there is nothing to evaluate: the loader is empty")
        accuracy = self.correct / self.decisions if self.decisions else float("nan")
        return {"loss": self.total / self.mass if self.mass else float("nan"), "accuracy": accuracy}


class Stage(Actor):
    """One block of the forward network, in the mode it is in.

    Args:
        block: the block. k, K: its number, and how many there are.
        loss: (output, target) -> scalar batch mean; None: nothing is scored, and no targets are read.

    Attributes:
        score: of the last block.
    """

    def __init__(self, block: Block, k: int, K: int, loss: Loss | None) -> None:
        self.name, self.device, self.score = block.name, block.device, Score()
        self._block, self._loss = block, loss
        self._ports = ("data",) if k == 0 else ("up",)
        self._last = k == K - 1
        if self._last and k and loss is not None:
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
            what = "update_bn with" if self._loss is None else "evaluation of"
            raise OperationError(self.name, f"{what} batch {messages[0].key}", error) from error

    def _run(self, messages: tuple[Message, ...]) -> Outcome:
        given, data = messages[0], messages[-1]
        x = given.inputs if isinstance(given, Data) else given.payload[0] if isinstance(given, Up) else None
        assert x is not None
        y = self._block.infer(x.to(self.device))
        if not self._last:
            up = Up(given.key, batch=0, round=0, indices=None, version=self._block.version, payload=(y,))
            return Outcome(f"F{given.key}", [("up", up)])
        if self._loss is not None:
            assert isinstance(data, Data) and data.targets is not None
            with torch.no_grad():
                self.score.add(y, data.targets, self._loss)
        return Outcome(f"F{given.key}")


def evaluate_blocks(
    blocks: Sequence[Block], batches: Iterable[Any], loss: Loss, runtime: Runtime, output: tuple[int, ...] | None
) -> dict[str, float]:
    """The same as `evaluate`, on the runtime where the blocks live; `output`: refuse labels that do not fit it."""
    with evaluating([block.module for block in blocks]):
        return _forward(blocks, batches, loss, runtime, output).means()


def update_blocks(blocks: Sequence[Block], batches: Iterable[Any], runtime: Runtime) -> None:
    """The same as `update_bn`, on the runtime where the blocks live."""
    with averaging([block.module for block in blocks]):
        _forward(blocks, batches, None, runtime, None)


def _forward(
    blocks: Sequence[Block],
    batches: Iterable[Any],
    loss: Loss | None,
    runtime: Runtime,
    output: tuple[int, ...] | None,
) -> Score:
    """Run batches through the blocks; the score of the last one."""
    stages = [Stage(block, k, len(blocks), loss) for k, block in enumerate(blocks)]
    first, last = stages[0].name, stages[-1].name
    reading = dict.fromkeys((first, last) if loss is not None else (first,))
    readers = [Reader(name, name == first, loss is not None and name == last) for name in reading]
    ahead = AHEAD * (len(stages) + 1)  # targets wait until their inputs have come through
    edges = [Edge("source", reader.name, reader.name, "data", ahead) for reader in readers]
    edges += [Edge(below.name, "up", above.name, "up", AHEAD) for below, above in itertools.pairwise(stages)]
    runtime.run(Graph([Source(batches, Whole(), readers, output=output, loss=loss), *stages], edges))
    return runtime.agree(stages[-1].score, of=last)


def evaluate(units: Sequence[nn.Module], batches: Iterable[Any], loss: Loss) -> dict[str, float]:
    """Run a network in evaluation mode without gradients, in the caller; its training mode is put back afterwards.

    Args:
        units: the network in order; each may live on its own device.
        batches: (inputs, targets) or (inputs, targets, indices).
        loss: (output, target) -> scalar batch mean.

    Returns:
        loss: mean over samples, or over what a cross entropy divides by. accuracy: share of correct classes among those
        that it does not ignore; NaN where targets are no class numbers, or classes not the output's second dimension.
    """
    score = Score()
    with evaluating(units), torch.no_grad():
        for item in batches:
            x, targets, _ = unpack(item)
            score.add(_through(units, x), targets, loss)
    return score.means()


def update_bn(units: Sequence[nn.Module], batches: Iterable[Any]) -> None:
    """Estimate running statistics again in the caller; see `Trainer.update_bn`. Arguments as of `evaluate`."""
    with averaging(units), torch.no_grad():
        for item in batches:
            _through(units, unpack(item)[0])


def normalising(units: Iterable[nn.Module]) -> list[_BatchNorm]:
    """The layers that have running statistics."""
    layers = {layer: None for unit in units for layer in unit.modules() if isinstance(layer, _BatchNorm)}
    return [layer for layer in layers if layer.running_mean is not None]


def _through(units: Sequence[nn.Module], x: Tensor) -> Tensor:
    for unit in units:
        reference = next(unit.parameters(), None)
        x = unit(x if reference is None else x.to(reference.device))
    return x


def frozen(units: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules that somebody has put into evaluation mode; none, if all are in it."""
    modes = {module: module.training for unit in units for module in unit.modules()}
    return [module for module, training in modes.items() if not training] if any(modes.values()) else []


def train_unless_mixed(units: Sequence[nn.Module], keep: Sequence[nn.Module] = ()) -> None:
    """Training mode, where all modules are in one mode, but for those of `keep`; who has mixed them wants them so."""
    if len({module.training for unit in units for module in unit.modules()}) == 1:
        for unit in units:
            unit.train()  # which a unit may have overridden
        for module in keep:
            module.training = False


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


class averaging(evaluating):
    """Within, running statistics become plain means over the batches that come, and nothing else trains.

    Afterwards modes and momentum are the former ones; after an exception the statistics, too.
    """

    def __init__(self, units: Sequence[nn.Module]) -> None:
        super().__init__(units)
        self._layers = normalising(units)
        self._momentum = [layer.momentum for layer in self._layers]
        self._former = [[buffer.clone() for buffer in layer.buffers()] for layer in self._layers]

    def __enter__(self) -> None:
        super().__enter__()
        for layer in self._layers:
            layer.reset_running_stats()
            layer.momentum, layer.training = None, True  # type: ignore[assignment]

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        for layer, momentum, former in zip(self._layers, self._momentum, self._former, strict=True):
            layer.momentum = momentum
            if exception[0] is not None:
                for buffer, value in zip(layer.buffers(), former, strict=True):
                    buffer.copy_(value)
