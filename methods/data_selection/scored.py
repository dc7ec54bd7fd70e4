"""Choosers that first send the candidates through the network (a probe), to learn their present losses l_i.

    selective_backprop      keep if u < F(l_i)^beta, F the distribution of the latest 1024 losses that were seen.
                            stale = n: a probe in every n-th epoch only, between them the loss last seen of i
    online_batch_selection  of `pool` batches draw `fraction`, without replacement, with p_i ~ s^(-rank_i / N),
                            rank 0 the largest loss, N candidates
    rho_loss                of `pool` batches the `fraction` with the largest l_i - r_i
                            r_i: loss of i in a model trained on held-out samples, which the boss never trains on

All take every sample in the first epoch (rho_loss: but the held-out ones), without a probe.

r_i, if not given: a softmax over the values trained by Adam, or for token sequences, where targets are the next
tokens, the relative frequency of pairs (with one more of each).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from decoupled.errors import UserError
from decoupled.messages import Data, Losses
from decoupled.methods.data_selection.plain import Table, draws, indices
from decoupled.selection import Choice, Chooser, Selection
from decoupled.selector import take

HISTORY = 1024
STEPS, RATE = 200, 0.01  # of Adam, full batches


@dataclass(frozen=True, kw_only=True)
class Selective(Selection):
    """The likelier the larger the loss is among the latest ones."""

    beta: float
    stale: int
    lag: int | None = 4
    scores: bool = True
    warmup: int = 1

    def chooser(self, inputs: Tensor, outputs: Sequence[int], seed: int) -> Chooser:
        return Selector(self.beta, self.stale, seed)


class Selector(Chooser):
    """Selective backprop. In the first epoch it hears the losses of what is trained, later those of the probes."""

    def __init__(self, beta: float, stale: int, seed: int) -> None:
        self._beta, self._stale, self._seed = beta, stale, seed
        self._history: deque[float] = deque(maxlen=HISTORY)
        self._last = Table(unknown=math.inf)

    def begin(self, epoch: int) -> None:
        self._epoch, self._draws = epoch, draws(self._seed, epoch)
        self.scores = epoch > 0 and (epoch - 1) % self._stale == 0

    def choose(self, samples: Data, losses: Tensor | None) -> Choice:
        if self._epoch == 0:
            return Choice()
        index = indices(samples)
        if losses is not None:
            self._see(index, losses)
        history = torch.tensor(sorted(self._history))
        share = torch.searchsorted(history, self._last[index], right=True) / max(1, len(history))
        kept = torch.rand(len(index), generator=self._draws) < share**self._beta
        return Choice() if bool(kept.all()) else Choice(kept.nonzero()[:, 0])

    def hear(self, told: Losses, samples: Data) -> None:
        if self._epoch == 0:
            assert told.losses is not None
            self._see(indices(samples), told.losses)

    def _see(self, index: Tensor, losses: Tensor) -> None:
        self._history.extend(losses.tolist())
        self._last[index] = losses

    def state_dict(self) -> dict[str, Any]:
        return {"history": list(self._history), "last": self._last.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._history.clear()
        self._history.extend(state["history"])
        self._last.values = state["last"]


@dataclass(frozen=True, kw_only=True)
class Ranked(Selection):
    """The likelier the higher the loss ranks in its pool."""

    fraction: float
    pressure: float
    scores: bool = True
    warmup: int = 1

    def chooser(self, inputs: Tensor, outputs: Sequence[int], seed: int) -> Chooser:
        return Ranks(self.fraction, self.pressure, seed)


class Ranks(Chooser):
    """Online batch selection within a pool."""

    def __init__(self, fraction: float, pressure: float, seed: int) -> None:
        self._fraction, self._pressure, self._seed = fraction, pressure, seed

    def begin(self, epoch: int) -> None:
        self.scores, self._draws = epoch > 0, draws(self._seed, epoch)

    def choose(self, samples: Data, losses: Tensor | None) -> Choice:
        if losses is None:
            return Choice()
        rank = losses.argsort(descending=True, stable=True).argsort()
        # the largest of log p + Gumbel noise are a draw without replacement
        noise = -torch.log(-torch.log(torch.rand(len(rank), generator=self._draws).clamp(1e-7, 1 - 1e-7)))
        keys = noise - math.log(self._pressure) * rank / len(rank)
        return Choice(keys.topk(math.ceil(self._fraction * len(rank))).indices.sort().values)


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
        self._known = None if known is None else torch.tensor(known)
        self._held: list[tuple[Tensor, Tensor]] = []
        self._model: Tensor | None = None  # weights of the softmax with the bias last, or log frequencies of pairs

    def begin(self, epoch: int) -> None:
        self.scores = epoch > 0

    def choose(self, samples: Data, losses: Tensor | None) -> Choice:
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
            return torch.zeros(len(x))
        if _pairs(x, y):
            return -self._model[x, y].mean(1)
        self.flops += 2 * self._model.numel() * len(x)
        return F.cross_entropy(_ones(x) @ self._model, y, reduction="none")

    def _learn(self, x: Tensor, y: Tensor) -> Tensor:
        if _pairs(x, y):
            size = max(256, self._classes)
            counts = torch.ones(size * size).index_add_(0, (x * size + y).flatten(), torch.ones(x.numel()))
            return (counts / counts.view(size, size).sum(1).repeat_interleave(size)).log().view(size, size)
        if y.dim() > 1 or y.is_floating_point():
            raise UserError("rho_loss has no model for such targets; give irreducible=FILE.npy, a loss per sample")
        rows = _ones(x)
        model = torch.zeros(rows.shape[1], self._classes, requires_grad=True)
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
    return torch.cat([x.flatten(1).float(), torch.ones(len(x), 1)], 1)
