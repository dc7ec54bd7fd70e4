"""Choosers that first send the candidates through the network (a probe), to learn their present losses l_i.

    selective_backprop      keep if u < F(l_i)^beta, F the distribution of the latest 1024 losses that were seen.
                            stale = n: a probe in every n-th epoch only, between them the loss last seen of i
    online_batch_selection  of `pool` batches draw `fraction`, without replacement, with p_i ~ s^(-rank_i / N),
                            rank 0 the largest loss, N candidates

Both take every sample in the first epoch, without a probe; `rho_loss`, in irreducible.py, needs one, too.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decoupled.messages import Data, Losses
from decoupled.methods.data_selection.plain import Table, draws, indices, uniforms
from decoupled.selection import Choice, Chooser, Selection

HISTORY = 1024


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
        history = torch.tensor(sorted(self._history), dtype=torch.float32)
        share = torch.searchsorted(history, self._last[index], right=True) / max(1, len(history))
        kept = uniforms(len(index), self._draws) < share**self._beta
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
        noise = -torch.log(-torch.log(uniforms(len(rank), self._draws).clamp(1e-7, 1 - 1e-7)))
        keys = noise - math.log(self._pressure) * rank / len(rank)
        return Choice(keys.topk(math.ceil(self._fraction * len(rank))).indices.sort().values)
