"""AutoAssist: a linear assistant predicts which samples the boss still has much loss on.

p      sigmoid(w . features(x, y))
keep   if u < gamma, else if (u - gamma) / (1 - gamma) < p(x, y): P(keep) = gamma + (1 - gamma) p.  The assistant is
       asked in the second case only; with `gate`, gamma is max(gamma, 1 - c)
weight 1, or with `unbiased` (mean of P) / P(keep), so that the mean over what is kept is expected to be that over all
z      1 if the boss's loss > T, T its moving average when it trained on the sample (shipped with the losses)
learn  g = p - z;   w -= (lr / B) (sum_i g_i features_i + l2 w)
c      0.95 c + 0.05 (share of the batch with (p > 1/2) = z), from 0

features   images, vectors   the values, and a scalar per class              lr 0.01, l2 1e-3
           token sequences   presence / distinct tokens, TF-IDF, distinct tokens / 10, 1      lr 0.5, l2 0.1
           TF-IDF of token t: log(documents / max(1, those with t)) * count / length, documents: what was scanned
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decoupled.messages import Data, Losses
from decoupled.methods.data_selection.plain import are_tokens, draws, numbers, uniforms, vocabulary
from decoupled.selection import Choice, Chooser, Selection
from decoupled.selector import take


class Features(ABC):
    """What an assistant looks at.

    Attributes:
        width: numbers per sample. lr, l2, scale: of the learning, and of the initial weights.
    """

    width: int
    lr: float
    l2: float
    scale: float

    @abstractmethod
    def __call__(self, samples: Data) -> Tensor:
        """(batch, width), float32 on the CPU."""

    def scan(self, samples: Data) -> None:  # noqa: B027
        """These samples came by."""

    def decays(self, features: Tensor) -> Tensor | float:
        """How often each weight decays in a step."""
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Counterpart of `state_dict`."""


class Values(Features):
    """The input's values, and a scalar per class; a target of many positions counts with its share of each class."""

    lr, l2, scale = 0.01, 1e-3, 1e-3

    def __init__(self, inputs: Tensor, classes: int) -> None:
        self._values = inputs[0].numel()
        self._classes, self.width = classes, self._values + classes

    def __call__(self, samples: Data) -> Tensor:
        assert samples.inputs is not None and samples.targets is not None
        x, y = samples.inputs.flatten(1).float().cpu(), samples.targets.cpu()
        if y.is_floating_point():  # a target that is no class
            return torch.cat([x, x.new_zeros(len(x), self._classes)], 1)
        counts = x.new_zeros(len(x), self._classes)
        y = y.reshape(len(x), -1).long()
        known = (y >= 0).float()
        counts.scatter_add_(1, y.clamp(min=0), known)
        return torch.cat([x, counts / known.sum(1, keepdim=True).clamp(min=1)], 1)

    def decays(self, features: Tensor) -> Tensor:
        """A class's scalar decays once per sample of the class, all others once per batch."""
        counts = features.new_ones(self.width)
        counts[self._values :] = features[:, self._values :].sum(0)
        return counts


class Tokens(Features):
    """Presence, TF-IDF and number of distinct tokens of a sequence."""

    lr, l2, scale = 0.5, 0.1, 1e-4

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary, self.width = vocabulary, 2 * vocabulary + 2
        self._documents, self._having = 0, torch.zeros(vocabulary, dtype=torch.float32)

    def _counts(self, samples: Data) -> Tensor:
        assert samples.inputs is not None
        tokens = numbers(samples.inputs, self._vocabulary)
        counts = torch.zeros(len(tokens), self._vocabulary, dtype=torch.float32)
        return counts.scatter_add_(1, tokens, counts.new_ones(tokens.shape))

    def scan(self, samples: Data) -> None:
        counts = self._counts(samples)
        self._documents += len(counts)
        self._having += (counts > 0).sum(0)

    def __call__(self, samples: Data) -> Tensor:
        counts = self._counts(samples)
        present = (counts > 0).float()
        distinct = present.sum(1, keepdim=True)
        rarity = torch.log(max(1, self._documents) / self._having.clamp(min=1))
        tfidf = rarity * counts / counts.sum(1, keepdim=True)
        return torch.cat([present / distinct, tfidf, distinct / 10, torch.ones_like(distinct)], 1)

    def state_dict(self) -> dict[str, Any]:
        return {"documents": self._documents, "having": self._having}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._documents, self._having = state["documents"], state["having"]


@dataclass(frozen=True, kw_only=True)
class Assisted(Selection):
    """What the assistant holds to be hard, and `gamma` of the rest; with weights it is `unbiased`."""

    gamma: float
    gate: bool
    warmup: int = 1

    def chooser(self, inputs: Tensor, outputs: Sequence[int], seed: int) -> Chooser:
        classes = outputs[0] if outputs else 1
        features = Tokens(vocabulary(outputs)) if are_tokens(inputs) else Values(inputs, classes)
        return Assistant(features, self.gamma, self.gate, seed, self.weighs)


class Assistant(Chooser):
    """Logistic regression, and the rule that asks it."""

    def __init__(self, features: Features, gamma: float, gate: bool, seed: int, unbiased: bool = False) -> None:
        self._features, self._gamma, self._gate, self._seed = features, gamma, gate, seed
        self._unbiased = unbiased
        self._weights = features.scale * torch.randn(features.width, generator=draws(seed, 0, 1), dtype=torch.float32)
        self._confidence = 0.0

    def begin(self, epoch: int) -> None:
        self._draws, self._warm = draws(self._seed, epoch), epoch == 0

    def choose(self, samples: Data, losses: Tensor | None) -> Choice:
        self._features.scan(samples)
        base = max(self._gamma, 1 - self._confidence) if self._gate else self._gamma
        if self._warm or base >= 1:
            return Choice()
        assert samples.indices is not None
        u = uniforms(len(samples.indices), self._draws)
        p, kept = torch.ones_like(u), u < base
        asked = torch.arange(len(u)) if self._unbiased else (~kept).nonzero()[:, 0]
        if len(asked):
            self.consulted += len(asked)
            p[asked] = self._probability(self._features(take(samples, asked)))
            kept |= (u - base) / (1 - base) < p
        rows = torch.arange(len(u)) if bool(kept.all()) else kept.nonzero()[:, 0]
        chance = base + (1 - base) * p
        weights = (chance.mean() / chance)[rows] if self._unbiased else None
        return Choice(None if len(rows) == len(u) else rows, weights)

    def hear(self, told: Losses, samples: Data) -> None:
        assert told.losses is not None
        features = self._features(samples)
        z = (told.losses > told.threshold).float()
        p = self._probability(features)
        self._confidence = 0.95 * self._confidence + 0.05 * float(((p > 0.5) == (z > 0.5)).float().mean())
        decay = self._features.l2 * self._features.decays(features) * self._weights
        self._weights = self._weights - self._features.lr / len(z) * (features.T @ (p - z) + decay)
        self.flops += 2 * features.numel() + 4 * self._features.width

    def _probability(self, features: Tensor) -> Tensor:
        self.flops += 2 * features.numel()
        return torch.sigmoid(features @ self._weights)

    def state_dict(self) -> dict[str, Any]:
        state = {"weights": self._weights, "confidence": self._confidence}
        return {**state, "features": self._features.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._weights, self._confidence = state["weights"], state["confidence"]
        self._features.load_state_dict(state["features"])
