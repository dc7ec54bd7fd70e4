"""rho_loss: candidates are sent through the network first, and those are kept whose loss could still be learnt.

    keep   of `pool` batches the `fraction` with the largest l_i - r_i
    l_i    the network's present loss of sample i (a probe)
    r_i    its loss in a model trained on held-out samples, which the boss never trains on; given by file, or else of a
           softmax over the values trained by Adam, or for token sequences, where targets are the next tokens, minus the
           mean log frequency of pairs (with one more of each)

The first epoch takes every sample but the held-out ones, without a probe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from decoupled.errors import UserError
from decoupled.messages import Data
from decoupled.methods.data_selection.plain import indices, numbers, vocabulary
from decoupled.selection import Choice, Chooser, Selection
from decoupled.selector import take

STEPS, RATE = 200, 0.01  # of Adam, full batches


@dataclass(frozen=True, kw_only=True)
class Irreducible(Selection):
    """Those with most loss that could still be learnt."""

    fraction: float
    holdout: float
    known: tuple[float, ...] | None
    scores: bool = True

    def chooser(self, inputs: Tensor, outputs: Sequence[int], seed: int) -> Chooser:
        return Rho(self.fraction, self.holdout, self.known, outputs[0] if outputs else 1, seed)

    @staticmethod
    def read(path: str) -> tuple[float, ...]:
        """Losses by sample index from a file of numpy's (.npy).

        Raises:
            UserError: it is not there, or not a list of numbers.
        """
        try:
            losses = np.load(Path(path), allow_pickle=False).astype(float)
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"rho_loss cannot read irreducible={path!r} ({error}); give a .npy file with a loss per training sample"
            ) from None
        if losses.ndim != 1:
            raise UserError(f"irreducible={path!r} has shape {losses.shape}; give one loss per training sample")
        return tuple(losses.tolist())


class Rho(Chooser):
    """Reducible holdout loss."""

    def __init__(
        self, fraction: float, holdout: float, known: Sequence[float] | None, classes: int, seed: int
    ) -> None:  # fmt: skip
        self._fraction, self._share, self._classes, self._seed = fraction, holdout, classes, seed
        self._known = None if known is None else torch.tensor(known, dtype=torch.float32)
        self._held: list[tuple[Tensor, Tensor]] = []
        self._model: Tensor | None = None  # weights of the softmax with the bias last, or log frequencies of pairs

    def begin(self, epoch: int) -> None:
        self.scores = epoch > 0

    def choose(self, samples: Data, losses: Tensor | None) -> Choice:
        assert samples.inputs is not None and samples.targets is not None
        if self._known is None and _pairs(samples.inputs, samples.targets):
            for tokens in (samples.inputs, samples.targets):
                numbers(tokens, vocabulary((self._classes,)))
        held = self._held_out(indices(samples))
        if losses is None:
            if self._known is None and bool(held.any()):
                kept = take(samples, held.nonzero()[:, 0])
                assert kept.inputs is not None and kept.targets is not None
                self._held.append((kept.inputs.cpu(), kept.targets.cpu()))
            return Choice((~held).nonzero()[:, 0])
        rho = (losses - self._irreducible(samples)).masked_fill(held, -math.inf)
        count = min(math.ceil(self._fraction * len(rho)), int((~held).sum()))
        return Choice(rho.topk(count).indices.sort().values)

    def _held_out(self, index: Tensor) -> Tensor:
        """A share of all indices, by a hash, so that no sample moves."""
        if self._known is not None:
            return torch.zeros(len(index), dtype=torch.bool)
        mixed = ((index + 1 + self._seed) * 2654435761) % 2**32
        return ((mixed ^ (mixed >> 15)) * 2246822519 % 2**32) < self._share * 2**32

    def _irreducible(self, samples: Data) -> Tensor:
        if self._known is not None:
            index = indices(samples)
            if int(index.max()) >= len(self._known):
                raise UserError(
                    f"rho_loss has {len(self._known)} irreducible losses, and the data a sample {int(index.max())}; "
                    "give one per training sample"
                )
            return self._known[index]
        assert samples.inputs is not None and samples.targets is not None
        x, y = samples.inputs.cpu(), samples.targets.cpu()
        if self._model is None and self._held:
            x_held, y_held = (torch.cat(parts) for parts in zip(*self._held, strict=True))
            self._model, self._held = self._learn(x_held, y_held), []
        if self._model is None:
            return torch.zeros(len(x), dtype=torch.float32)
        if _pairs(x, y):
            return -self._model[x, y].mean(1)
        self.flops += 2 * self._model.numel() * len(x)
        return F.cross_entropy(_ones(x) @ self._model, y, reduction="none")

    def _learn(self, x: Tensor, y: Tensor) -> Tensor:
        if _pairs(x, y):
            size = vocabulary((self._classes,))
            counts = torch.ones(size * size, dtype=torch.float32)
            counts.index_add_(0, (x * size + y).flatten(), counts.new_ones(x.numel()))
            return (counts / counts.view(size, size).sum(1).repeat_interleave(size)).log().view(size, size)
        if y.dim() > 1 or y.is_floating_point():
            raise UserError("rho_loss has no model for such targets; give irreducible=FILE.npy, a loss per sample")
        rows = _ones(x)
        model = rows.new_zeros(rows.shape[1], self._classes).requires_grad_()
        adam = torch.optim.Adam([model], RATE)
        for _ in range(STEPS):
            (gradient,) = torch.autograd.grad(F.cross_entropy(rows @ model, y), [model])
            model.grad = gradient
            adam.step()
        self.flops += STEPS * 4 * model.numel() * len(rows)
        return model.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"held": [list(pair) for pair in self._held], "model": self._model}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._held, self._model = [(x, y) for x, y in state["held"]], state["model"]


def _pairs(x: Tensor, y: Tensor) -> bool:
    """Whether targets are the next tokens."""
    return not x.is_floating_point() and x.shape == y.shape


def _ones(x: Tensor) -> Tensor:
    x = x.flatten(1).float()
    return torch.cat([x, x.new_ones(len(x), 1)], 1)
