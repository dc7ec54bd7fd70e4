"""Oracle 3, truncation: every update is the gradient of the objectives in the declared reach, and of nothing else.

The reference of `decoupled.testing` predicts every weight after every update; perturbations show bit for bit that what
lies outside the reach does not matter, and that what lies inside does; a block alone with its recorded messages
repeats its trajectory, so nothing but messages crosses.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn import functional as F

from decoupled.build import Recipe, chain
from decoupled.coupling import Coupling, Lower, Place, Upper
from decoupled.messages import Boundary, Down, Up
from decoupled.runtime.contract import Actor, Edge, Graph, Outcome, Want
from decoupled.runtime.simulated import Simulated
from decoupled.testing import (
    OPTIMIZERS,
    Case,
    Tap,
    cases,
    compare,
    flat,
    has_reference,
    label,
    point,
    reference,
    train,
    variants,
)

CASE = Case(widths=(4, 5, 3, 4, 5, 3), cuts=(1, 2, 4), sizes=(6, 6, 6, 6, 6, 6, 6, 5))
K = CASE.K
PREDICTED = [spec for spec in variants() if has_reference(point(spec), K)]
BOUNDED = [spec for spec in PREDICTED if max(point(spec).facts.reach(0, K), default=0) < K - 1]
ANSWERING = [spec for spec in variants() if "A0" in point(spec).order.text(0, K, 1)]


# --- every weight after every update ------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", PREDICTED, ids=label)
@settings(max_examples=5)
@given(case=cases(batches=(4, 10)))
def test_updates_equal_autograd_on_the_whole_network_with_detach(spec, case):
    compare(train(case, spec, epochs=2).weights, reference(case, spec, epochs=2))


@pytest.mark.costly
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("spec", PREDICTED, ids=label)
def test_so_they_do_with_other_optimizers(spec, optimizer):
    found = train(CASE, spec, optimizer=OPTIMIZERS[optimizer], epochs=2)
    compare(found.weights, reference(CASE, spec, optimizer=OPTIMIZERS[optimizer], epochs=2))


# --- perturbations ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Altered(Coupling):
    """A coupling whose block `at` has another objective, or whose halves from block `above` on start elsewhere."""

    inner: Coupling
    at: int | None = None
    above: int | None = None

    def lower(self, place: Place) -> Lower:
        half: Any = self.inner.lower(place)
        if place.k == self.at and half.has_objective:
            objective = half.objective
            half.objective = lambda y, data: 3 * objective(y, data)
        if self.above is not None and place.k > self.above and half.module is not None:
            disturb(half.module)
        return half

    def upper(self, place: Place) -> Upper:
        return self.inner.upper(place)

    def bottom(self, place: Place) -> Upper:
        return self.inner.bottom(place)

    def front(self, k: int, K: int) -> nn.Module | None:
        return self.inner.front(k, K)


def altered(spec, **how):
    method = point(spec)
    return replace(method, coupling=Altered(method.coupling, **how))


def disturb(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5).add_(0.3)


def same(mine, theirs):
    return len(mine) == len(theirs) and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("spec", PREDICTED, ids=label)
def test_an_objective_moves_exactly_the_blocks_it_is_declared_to_reach(spec):
    """Later losses and earlier ones: the first update of block k changes iff J_j is in its reach (E1, E2)."""
    first = replace(CASE, sizes=CASE.sizes[:1])
    base = train(first, spec).weights
    for j in range(K):
        other = train(first, altered(spec, at=j)).weights
        moved = [k for k in range(K) if not same(base[k], other[k])]
        assert moved == [k for k in range(K) if j in point(spec).facts.reach(k, K)]


DIRECT = [spec for spec in variants() if spec not in PREDICTED and not point(spec).coupling.substitutes]


@pytest.mark.parametrize("spec", DIRECT, ids=label)
def test_so_it_does_where_no_reference_predicts_the_weights(spec):
    """Surrogates too: what is learned in the place of a gradient may hear the objective later than the first update."""
    method = point(spec)
    base = train(CASE, spec, epochs=method.epochs).weights
    for j in range(K):
        other = train(CASE, altered(spec, at=j), epochs=method.epochs).weights
        first = {k for k in range(K) if not same(base[k][:2], other[k][:2])}
        ever = {k for k in range(K) if not same(base[k], other[k])}
        declared = {k for k in range(K) if j in method.facts.reach(k, K)}
        assert first <= declared <= (ever if method.facts.surrogate else first)


def heard_by(spec, k, ever):
    """The last block whose weights matter to the first update of block k, or `ever` to any of its updates."""
    reach = point(spec).facts.reach
    last = max(reach(k, K), default=-1)  # nothing reaches a block that is not trained
    while ever and (further := max((max(reach(i, K), default=-1) for i in range(last + 1)), default=-1)) > last:
        last = further
    return last


@pytest.mark.parametrize("ever", [False, True], ids=["first update", "trajectory"])
@pytest.mark.parametrize("spec", BOUNDED, ids=label)
def test_no_weight_above_the_reach_changes_one_bit(spec, ever):
    case = CASE if ever else replace(CASE, sizes=CASE.sizes[:1])
    base = train(case, spec).weights
    for last in range(K - 1):  # the blocks above it, and their heads, start elsewhere
        blocks = case.blocks()
        for block in blocks[last + 1 :]:
            disturb(block)
        other = train(case, altered(spec, above=last), blocks=blocks).weights
        unmoved = [k for k in range(last + 1) if same(base[k], other[k])]
        assert unmoved == [k for k in range(last + 1) if heard_by(spec, k, ever) <= last]


def test_the_zoo_has_methods_of_bounded_and_of_global_reach():
    assert BOUNDED
    assert len(BOUNDED) < len(PREDICTED)


# --- nothing but messages -----------------------------------------------------------------------------------------


class Player(Actor):
    """Sends recorded messages, and nothing else, to one block."""

    name = "player"

    def __init__(self, sends):
        self._sends = list(sends)

    def wants(self):
        return (Want(),) if self._sends else ()

    def handle(self, want, messages):
        return Outcome(None, [self._sends.pop(0)])


def recorded(spec) -> Any:
    """A run that meets every sample K times, so that news from the top reach the bottom, and what blocks received."""
    tap = Tap()
    run = train(CASE, spec, optimizer=OPTIMIZERS["momentum"], observers=[tap], batches=CASE.batches()[-2:] * K)
    received = [[(e.port, m) for e, m in tap.messages if e.target == f"block{k}"] for k in range(K)]
    return run, received


def alone(spec, k, received):
    """The weights of block k after it has heard `received` in a network whose other blocks are all different."""
    blocks = CASE.blocks()
    for other in [*blocks[:k], *blocks[k + 1 :]]:
        disturb(other)
    recipe = Recipe(point(spec), F.cross_entropy, OPTIMIZERS["momentum"], None, [torch.device("cpu")], 0, "stop")
    worker = chain(blocks, range(1, K), CASE.batches()[0][0], recipe)[k]
    worker.begin(0)
    edges = [Edge("player", port, worker.name, port, 999) for port in {"data", "up", "down"} | {p for p, _ in received}]
    Simulated().run(Graph([Player(received), worker], edges))
    return flat(blocks[k])


@pytest.mark.parametrize("spec", variants(), ids=label)
def test_a_block_knows_nothing_but_its_messages(spec):
    run, received = recorded(spec)
    for k in range(K):
        assert torch.equal(alone(spec, k, received[k]), run.weights[k][-1])


@pytest.mark.costly
@pytest.mark.parametrize("spec", variants(), ids=label)
def test_and_every_message_matters(spec):
    """The control of the test above: other payloads give other weights, to blocks that learn at all."""
    run, received = recorded(spec)
    for kind in (Up, Down):
        for k in range(K):
            louder = [(port, shouted(m) if isinstance(m, kind) else m) for port, m in received[k]]
            if not any(isinstance(m, kind) for _, m in received[k]):
                continue
            learns = not torch.equal(run.weights[k][0], run.weights[k][-1])
            assert torch.equal(alone(spec, k, louder), run.weights[k][-1]) != learns


def shouted(message: Boundary) -> Boundary:
    return replace(message, payload=tuple(map(other, message.payload)))


def other(t: torch.Tensor) -> torch.Tensor:
    """Other numbers; integers (labels, signs) stay between the least and the greatest of them, mirrored."""
    if t.is_floating_point():
        return 2 * t + 0.1
    return ~t if t.dtype is torch.bool else t.min() + t.max() - t


def test_other_numbers_are_other_ones_of_the_same_kind():
    for t in (torch.tensor([0.0, 1.0]), torch.tensor([0, 2, 1, 2]), torch.tensor([-1, 1, 1]).to(torch.int8)):
        assert not torch.equal(other(t), t)
        assert other(t).dtype is t.dtype
    assert set(other(torch.tensor([3, 5, 5])).tolist()) == {3, 5}
    assert other(torch.tensor([True, False])).tolist() == [False, True]


@pytest.mark.parametrize("spec", ANSWERING, ids=label)
def test_an_update_never_waits_for_the_answer_of_its_own_pass_if_its_objective_is_all_it_hears(spec):
    """With all it received before held fixed, the last Down of a block in a Jacobi order comes too late to matter."""
    method = point(spec)
    text = method.order.text(0, K, 1).split()
    run, received = recorded(spec)
    for k in range(K - 1):
        assert set(method.facts.reach(k, K)) == {k}
        downs = [m for _, m in received[k] if isinstance(m, Down)]
        if not downs:  # this block hears nothing from above
            continue
        final = downs[-1]
        if final.void:  # the block above has had nothing to learn from, ever
            assert len(run.weights[k + 1]) == 1
            continue
        louder = [(p, shouted(m) if m is final else m) for p, m in received[k]]
        unchanged = torch.equal(alone(spec, k, louder), run.weights[k][-1])
        assert unchanged == (text.index("B0") < text.index("A0"))
