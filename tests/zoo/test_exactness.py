"""Oracle 1, exactness: methods that declare it equal an autograd loop on the same minibatches (A1-A5 of the notes)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn import functional as F

from decoupled.correction import Shrink
from decoupled.messages import Data, Up
from decoupled.order import sync
from decoupled.retention import KeepGraph, KeepInput, KeepInputAndWeights, KeepNothing
from decoupled.source import Repeat, Split
from decoupled.testing import OPTIMIZERS, Case, Tap, cases, compare, flat, label, point, train, variants, workers

EXACT = [spec for spec in variants() if point(spec).facts.exact]
TRUE = [spec for spec in variants() if not point(spec).facts.surrogate and point(spec).selection is None]
GLOBAL = [spec for spec in TRUE if all(set(point(spec).facts.reach(k, 4)) == {3} for k in range(4))]
CASE = Case(widths=(4, 5, 3, 4, 5, 3), cuts=(1, 2, 4), sizes=(6, 6, 6, 6, 6, 6, 6, 5))


def plain(case, optimizer, epochs=1, repeat=1):
    """The loop that everybody writes, and every block's weights after each step."""
    blocks = case.blocks()
    network = nn.Sequential(*blocks)
    made = optimizer(list(network.parameters()))
    weights = [[flat(block)] for block in blocks]
    for _ in range(epochs):
        for x, y, _ in [batch for batch in case.batches() for _ in range(repeat)]:
            made.zero_grad()
            F.cross_entropy(network(x), y).backward()
            made.step()
            for versions, block in zip(weights, blocks, strict=True):
                versions.append(flat(block))
    return weights


def test_the_zoo_has_exact_and_inexact_methods():
    assert 0 < len(EXACT) < len(variants())


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("spec", EXACT, ids=label)
@settings(max_examples=10)
@given(case=cases())
def test_exact_methods_equal_plain_autograd(spec, optimizer, case):
    found = train(case, spec, optimizer=optimizer, epochs=2)
    compare(found.weights, plain(case, optimizer, epochs=2))


@pytest.mark.parametrize("spec", [s for s in variants() if not point(s).facts.exact], ids=label)
def test_methods_that_are_not_declared_exact_differ(spec):
    """The claim is as strong as it can be: nothing exact goes undeclared."""
    repeat, epochs = getattr(point(spec).feed, "rounds", 1), point(spec).epochs
    with pytest.raises(AssertionError, match=r"differs by|updates instead of"):
        compare(train(CASE, spec, epochs=epochs).weights, plain(CASE, OPTIMIZERS["sgd"], epochs, repeat))


def takes_all(spec):
    """Whether every sample is trained on, with weight 1, in the first epoch."""
    selection = point(spec).selection
    return selection is None or selection.warmup > 0


@pytest.mark.parametrize("spec", [s for s in variants() if takes_all(s)], ids=label)
@settings(max_examples=5)
@given(case=cases(blocks=(1, 1)))
def test_one_block_is_backpropagation_bit_for_bit(spec, case):
    feed = point(spec).feed
    expected = plain(case, OPTIMIZERS["momentum"], repeat=feed.rounds if isinstance(feed, Repeat) else 1)
    found = train(case, spec, optimizer=OPTIMIZERS["momentum"])
    compare(found.weights, expected, tolerance=1e-12 if isinstance(feed, Split) else 0.0)


@pytest.mark.parametrize("retention", [KeepGraph, KeepInput, KeepInputAndWeights, KeepNothing])
@pytest.mark.parametrize("spec", [s for s in GLOBAL if not isinstance(point(s).feed, Split)], ids=label)
def test_any_method_with_one_loss_is_exact_in_the_sync_order(spec, retention):
    """Delay, and nothing else, is what makes a global method inexact: whatever it keeps (A3)."""
    locked = replace(point(spec), order=sync, retention=retention, corrections=())
    compare(train(CASE, locked, epochs=2).weights, plain(CASE, OPTIMIZERS["sgd"], epochs=2))


@pytest.mark.parametrize("spec", GLOBAL, ids=label)
def test_frozen_weights_give_the_gradients_of_backpropagation(spec):
    """At learning rate 0 no delay and no stash policy matters (A2)."""
    seen = [[] for _ in CASE.cuts] + [[]]

    def recording(parameters):
        made = torch.optim.SGD(parameters, lr=0.0)
        k = next(k for k, block in enumerate(blocks) if next(block.parameters()) is parameters[0])
        made.register_step_pre_hook(lambda *_: seen[k].append([p.grad.clone() for p in parameters]))
        return made

    blocks, method = CASE.blocks(), point(spec)
    scaling = tuple(c for c in method.corrections if isinstance(c, Shrink))  # changes gradients whatever the delay
    method = replace(method, corrections=tuple(c for c in method.corrections if c not in scaling))
    train(CASE, method, optimizer=recording, blocks=blocks, epochs=2)
    network = nn.Sequential(*CASE.blocks())
    for n, (x, y, _) in enumerate(CASE.batches() * 2):
        network.zero_grad()
        F.cross_entropy(network(x), y).backward()
        expected = [[p.grad for p in block.parameters()] for block in network]
        torch.testing.assert_close([grads[n] for grads in seen], expected, rtol=0, atol=1e-14)


def plain_at_the_top(spec):
    """Whether the method leaves the top block alone: it runs on what comes up, neither late nor corrected."""
    top = workers(CASE, spec)[-1]
    return top.upper.awaits == "F" and not top.corrections.parts and not point(spec).facts.delay(CASE.K - 1, CASE.K)


def test_most_methods_leave_the_top_block_alone():
    assert sum(map(plain_at_the_top, variants())) > 0.8 * len(variants())


@pytest.mark.parametrize("spec", [s for s in variants() if plain_at_the_top(s)], ids=label)
def test_the_top_block_follows_plain_autograd_on_the_inputs_it_receives(spec):
    """Whatever happens below, a top block that is not late is never inexact (A4)."""
    if getattr(point(spec).coupling, "output", False):
        pytest.skip("the loss is a function of a variable, not of the output")
    tap, blocks, top = Tap(), CASE.blocks(), CASE.K - 1
    found = train(CASE, spec, optimizer=OPTIMIZERS["momentum"], observers=[tap], blocks=blocks)
    heard: list[Any] = [m for e, m in tap.messages if e.target == f"block{top}"]
    inputs = {m.key: m.payload[0] for m in heard if isinstance(m, Up) and not m.void}
    front = point(spec).coupling.front(top, CASE.K)
    block = nn.Sequential(*([] if front is None else [front]), CASE.blocks()[top])
    made = OPTIMIZERS["momentum"](list(block.parameters()))
    expected = [flat(block)]
    data: list[Any] = [m for m in heard if isinstance(m, Data) and not m.void]
    carried: list[Any] = [
        found.trainer.workers[top].upper.carried(m) for m in heard if isinstance(m, Up) and not m.void
    ]
    for message in data or carried:
        (mean(block(inputs[message.key]), message) * message.share).backward()
        if (message.round + 1) % (message.rounds // point(spec).feed.steps) == 0:
            made.step()
            made.zero_grad()
            expected.append(flat(block))
    several = found.trainer.workers[top].upper.streams > 1  # a product with more rows is rounded in another way
    compare([found.weights[top]], [expected], tolerance=1e-15 if several else 0.0)


# --- what a selection lets through --------------------------------------------------------------------------------


def mean(output, data):
    """The loss of a pass, with its weights."""
    if data.weights is None:
        return F.cross_entropy(output, data.targets)
    return (F.cross_entropy(output, data.targets, reduction="none") * data.weights).mean()


SELECTING = [spec for spec in variants() if point(spec).selection is not None]


@pytest.mark.parametrize("spec", SELECTING, ids=label)
def test_what_a_selection_lets_through_is_trained_on_as_if_there_were_nothing_else(spec):
    """Plain autograd on the recorded batches with their weights gives the same trajectory; no sample is new."""
    tap = Tap()
    found = train(CASE, spec, optimizer=OPTIMIZERS["momentum"], observers=[tap], epochs=3)
    given: dict[Any, Any] = {m.key: m for e, m in tap.messages if e.target == "block0" and isinstance(m, Data)}
    top = f"block{CASE.K - 1}"
    targets: dict[Any, Any] = {m.key: m for e, m in tap.messages if e.target == top and isinstance(m, Data)}
    blocks = CASE.blocks()
    network, x, y = nn.Sequential(*blocks), *(torch.cat(part) for part in list(zip(*CASE.batches(), strict=True))[:2])
    made, expected = OPTIMIZERS["momentum"](list(network.parameters())), [[flat(block)] for block in blocks]
    for key, data in given.items():
        assert data.inputs.equal(x[data.indices])
        assert targets[key].targets.equal(y[data.indices])
        mean(network(data.inputs), targets[key]).backward()
        made.step()
        made.zero_grad()
        for versions, block in zip(expected, blocks, strict=True):
            versions.append(flat(block))
    compare(found.weights, expected)


@pytest.mark.parametrize("spec", SELECTING, ids=label)
def test_a_selection_counts_what_it_does(spec):
    tap = Tap()
    run = train(CASE, spec, observers=[tap], epochs=3)
    given: list[Any] = [m for e, m in tap.messages if e.target == "block0" and isinstance(m, Data)]
    counted: Any = run.trainer.selected()
    selection: Any = point(spec).selection
    assert counted.scanned == 3 * sum(CASE.sizes)
    assert counted.trained == sum(len(m.indices) for m in given) == run.trainer.statistics()[0].samples
    assert counted.batches == len(given) == run.trainer.statistics()[-1].updates
    assert counted.packets + counted.dropped == (len(given) if selection.lag is not None else 0)
    changed = counted.trained < counted.scanned or any(m.weights is not None for m in given)
    assert changed
