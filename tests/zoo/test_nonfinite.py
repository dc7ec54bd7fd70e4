"""A loss that is not finite, policy "skip": the batch is dropped by the blocks that hear this loss, and by no other."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from decoupled.coupling import Coupling, Lower, Place, Upper
from decoupled.errors import NonFiniteError, OperationError
from decoupled.messages import Data
from decoupled.testing import OPTIMIZERS, Case, compare, has_reference, label, point, train, variants

CASE = Case(widths=(4, 5, 3, 4, 5, 3), cuts=(1, 2, 4), sizes=(6, 6, 6, 6, 6, 6, 5))
K, LAST = CASE.K, len(CASE.sizes) - 1
SPECS = [spec for spec in variants() if has_reference(point(spec), K)]


@dataclass(frozen=True)
class Bad(Coupling):
    """Objectives on blocks `at` are constant on minibatch `batch` (None: all), or NaN in its last pass."""

    inner: Coupling
    at: Collection[int]
    batch: int | None
    constant: bool = False

    def lower(self, place: Place) -> Lower:
        half: Any = self.inner.lower(place)
        if place.k in self.at and half.has_objective:
            objective = half.objective
            half.objective = lambda y, data: objective(y, data) * self.factor(data)
        return half

    def upper(self, place: Place) -> Upper:
        return self.inner.upper(place)

    def bottom(self, place: Place) -> Upper:
        return self.inner.bottom(place)

    def front(self, k: int, K: int) -> nn.Module | None:
        return self.inner.front(k, K)

    def factor(self, data: Data) -> float:
        if self.batch not in (None, data.batch) or not (self.constant or data.round == data.rounds - 1):
            return 1.0
        return 0.0 if self.constant else float("nan")


def bad(spec, **how):
    method = point(spec)
    return replace(method, coupling=Bad(method.coupling, **how))


def objectives(spec):
    return sorted({j for k in range(K) for j in point(spec).facts.reach(k, K)})


def hear(spec, j):
    """The blocks that the gradient of J_j passes through, whether they follow it or not."""
    return range(min(k for k in range(K) if j in point(spec).facts.reach(k, K)), j + 1)


@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_the_batch_changes_nothing_in_the_blocks_that_hear_the_loss(spec):
    """As if it had never come, also where only one of its micro-batches is bad; the other blocks are not concerned."""
    how: dict[str, Any] = {"optimizer": OPTIMIZERS["momentum"]}
    shorter = replace(CASE, sizes=CASE.sizes[:-1])
    without, whole = (train(shorter, spec, batches=CASE.batches()[:-1], **how), train(CASE, spec, **how))
    for j in objectives(spec):
        found = train(CASE, bad(spec, at=[j], batch=LAST), on_nonfinite="skip", **how)
        for k in range(K):
            model = without if k in hear(spec, j) else whole
            assert torch.equal(found.weights[k][-1], model.weights[k][-1]), f"J_{j}, block {k}"
            assert found.trainer.statistics()[k].updates == model.trainer.statistics()[k].updates


@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_a_dropped_batch_in_the_middle_is_one_without_a_gradient(spec):
    """Dropping by all blocks that hear it is, under plain SGD, the same as a loss that is constant on this batch."""
    dropped = train(CASE, bad(spec, at=range(K), batch=2), on_nonfinite="skip")
    constant = train(CASE, bad(spec, at=range(K), batch=2, constant=True))
    for mine, theirs in zip(dropped.weights, constant.weights, strict=True):
        assert torch.equal(mine[-1], theirs[-1])
    assert sum(block.skipped for block in dropped.trainer.statistics()) > 0


@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_the_first_batches_may_be_dropped(spec):
    """No decay, no momentum, no tick before the first gradient (F4)."""
    start = [train(replace(CASE, sizes=CASE.sizes[:1]), spec).weights[k][0] for k in range(K)]
    run = train(CASE, bad(spec, at=range(K), batch=None), optimizer=OPTIMIZERS["momentum"], on_nonfinite="skip")
    compare(run.weights, [[weights] for weights in start], tolerance=0.0)
    assert [block.updates for block in run.trainer.statistics()] == [0] * K


@pytest.mark.parametrize("runtime", ["simulated", "threads"])
@pytest.mark.parametrize("spec", variants(), ids=label)
def test_the_policy_stop_names_block_batch_and_operation(spec, runtime):
    if runtime == "threads" and not point(spec).fixed:
        return  # the batch may never reach the top
    top = f"block{K - 1}"
    with pytest.raises(OperationError, match=rf"{top}, operation \w+ \(batch 2\).*NonFiniteError") as caught:
        train(CASE, bad(spec, at=[K - 1], batch=2), runtime=runtime)
    assert caught.value.actor == top
    assert isinstance(caught.value.__cause__, NonFiniteError)
