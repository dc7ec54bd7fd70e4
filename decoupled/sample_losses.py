"""The loss, sample by sample: derived from the mean that the user gives, and told to whom it may concern.

    l_i      cross entropy: of sample i alone, its positions added up; others: the loss of a batch of this one sample
    value    the user's loss, untouched; with weights v: (1/B) sum_i v_i l_i
    T        S / N,  S <- a S + (1-a) sum_i l_i,  N <- a N + (1-a) B,  once per minibatch, from S = N = 0

The l_i are scaled so that their mean is the user's loss, also where positions are ignored or classes have weights.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled.errors import UserError
from decoupled.messages import Data, Losses
from decoupled.passes import Pass

Loss = Callable[[Tensor, Tensor], Tensor]


def each(loss: Loss, output: Tensor, targets: Tensor) -> Tensor:
    """The loss of every sample, (batch,); their mean is `loss(output, targets)` for losses that are means.

    Args:
        loss: (output, target) -> scalar, mean over the batch.
        output: (batch, *outputs), classes second. targets: (batch, ...).

    Example:
        >>> output, targets = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
        >>> each(F.cross_entropy, output, targets).mean() == F.cross_entropy(output, targets)
        tensor(True)
    """
    given = _cross_entropy(loss)
    if given is None:
        return torch.stack([loss(output[i : i + 1], targets[i : i + 1]) for i in range(len(output))])
    losses = F.cross_entropy(output, targets, **given, reduction="none").reshape(len(output), -1)
    if targets.is_floating_point():  # probabilities: torch divides by the number of positions
        return losses.mean(1)
    counts = _counts(given, targets).sum().to(losses.dtype)
    return losses.sum(1) * (len(output) / counts.clamp(min=torch.finfo(losses.dtype).tiny))


def _cross_entropy(loss: Loss) -> dict[str, Any] | None:
    """The options of a mean cross entropy; None: it is another loss."""
    if loss is F.cross_entropy:
        return {"weight": None, "ignore_index": -100, "label_smoothing": 0.0}
    if isinstance(loss, nn.CrossEntropyLoss) and loss.reduction == "mean":
        return {name: getattr(loss, name) for name in ("weight", "ignore_index", "label_smoothing")}
    return None


def ignored(loss: Loss) -> int:
    """The class number that stands for no label."""
    return (_cross_entropy(loss) or {"ignore_index": -100})["ignore_index"]


def mass(loss: Loss, targets: Tensor) -> float:
    """How much these targets count in a mean over a batch: what a cross entropy divides by, else the samples.

    Example:
        >>> mass(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])), torch.tensor([0, 1, -100]))
        4.0
    """
    given = _cross_entropy(loss)
    if given is None or targets.is_floating_point():
        return float(len(targets))
    return float(_counts(given, targets).sum())


def _counts(given: Mapping[str, Any], targets: Tensor) -> Tensor:
    """What a cross entropy with these options counts every label: nothing, or the weight of its class."""
    targets, weight = targets.long(), given["weight"]  # bytes as an index would be a mask
    known = targets != given["ignore_index"]
    return known if weight is None else known * weight.to(targets.device)[targets.where(known, 0)]


def mean(losses: Tensor, data: Data | None) -> Tensor:
    """The mean of (batch, ...), sample i times the weight that a selection gives it."""
    weights = None if data is None else data.weights
    if weights is None:
        return losses.mean()
    return (losses * weights.to(losses).view(-1, *[1] * (losses.dim() - 1))).mean()


class SampleLosses:
    """A loss that is called like the user's, and knows of which pass.

    Args:
        loss: the user's.
        tells: whether `told` says what the losses were.
        alpha: share of the past in the moving average.
    """

    def __init__(self, loss: Loss, tells: bool = False, alpha: float = 0.75) -> None:
        self._loss, self._tells, self._alpha = loss, tells, alpha
        self._data: Data | None = None
        self._found: dict[Hashable, Tensor] = {}  # of passes between their objective and `told`
        self._sum = self._count = 0.0

    def __call__(self, output: Tensor, targets: Tensor) -> Tensor:
        data = self._data
        if data is None:
            return self._loss(output, targets)
        news = self._tells and data.key not in self._found
        if data.weights is None:
            if news:
                with torch.no_grad():
                    self._found[data.key] = each(self._loss, output.detach(), targets)
            return self._loss(output, targets)
        losses = each(self._loss, output, targets)
        if news:
            self._found[data.key] = losses.detach()
        return mean(losses, data)

    @contextmanager
    def of(self, data: Data | None) -> Iterator[None]:
        """Within: calls are about this pass; the first one is what `told` tells of it."""
        self._data = data
        try:
            yield
        finally:
            self._data = None

    def told(self, n: int, state: Pass) -> Losses | None:
        """The message about pass `n`, which has been through; None if it tells nothing."""
        if not self._tells:
            return None
        losses, indices = self._found.pop(n, None), state.indices
        if losses is not None and indices is not None and len(losses) != len(indices):
            raise UserError(
                f"batch {state.batch}: {len(losses)} losses of {len(indices)} samples; a selection needs a boss whose "
                "last block has one output per sample"
            )
        if state.void or losses is None or indices is None or not bool(losses.isfinite().all()):
            return Losses(n, batch=state.batch, round=state.round, void=True)
        past = self._alpha ** (1.0 if state.data is None else state.data.share)
        self._sum = past * self._sum + (1 - past) * float(losses.sum())
        self._count = past * self._count + (1 - past) * len(losses)
        return Losses(
            n, batch=state.batch, round=state.round, indices=indices, losses=losses.float().cpu(),
            threshold=self._sum / self._count,
        )  # fmt: skip

    def clear(self) -> None:
        """Forget passes in flight."""
        self._found.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self._sum, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sum, self._count = float(state["sum"]), float(state["count"])


def asked(losses: SampleLosses | None, data: Data | None) -> AbstractContextManager[None]:
    """Within: an objective is computed on `data`."""
    return nullcontext() if losses is None else losses.of(data)
