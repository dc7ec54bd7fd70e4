"""Memory: what a block has held at most is what its retention keeps per pass, times the passes its order holds (F2),
and what its half of the edge above keeps by itself."""

import gc
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F

from decoupled.correction import hooks
from decoupled.coupling import Gradient, Lower, Place
from decoupled.messages import Data
from decoupled.plan import parse
from decoupled.retention import KeepGraph, KeepInput, KeepInputAndWeights, KeepLiveGraph, KeepNothing
from decoupled.reversible import Reconstruct
from decoupled.testing import OPTIMIZERS, Case, cases, label, point, train, variants, workers
from decoupled.trainer import Trainer

NUMBER = 8  # bytes, float64
DEFAULTS = [spec for spec in variants() if set(spec) == {"name"}]
LONG = Case(widths=(4, 5, 3, 4), cuts=(1, 2), sizes=(6,) * 8)
SMALL = Case(widths=(2, 2, 2), cuts=(1,), sizes=(2,))
GRAPHS, INPUTS = (KeepGraph, KeepLiveGraph, KeepNothing), (KeepInput, KeepInputAndWeights)


def plain(method):
    """Whether the formula below is the whole truth: one tensor up, no weights for the future, no tensors in graphs."""
    more = any("recording" in hooks(part) for worker in workers(SMALL, method) for part in worker.corrections.parts)
    every = method.selection is None
    return method.coupling.up == ("activation",) and method.order.rule and not method.order.sees and every and not more


def rows(case, method):
    """Samples of every pass."""
    for x, y, indices in case.batches():
        for one in method.feed.passes(Data(0, batch=0, inputs=x, targets=y, indices=indices)):
            yield len(one.inputs)


def formula(case: Case, method, k: int, worker) -> int:
    """Most bytes at block k: every pass in flight its input or its graph, every weight version in flight a copy.

    A row is a sample, or one of several that the block is given for it. A layer with tanh saves its input and its
    output; the output of one is the input of the next. A block that no objective reaches has no graph: it keeps its
    input and its output.
    """
    edges = [0, *case.cuts, len(case.widths) - 1]
    widths = case.widths[edges[k] : edges[k + 1] + 1]
    if not method.facts.reach(k, case.K):
        widths = (widths[0], widths[-1])
    late, kind = method.order.delay(k, case.K) > 0, method.retention
    if kind is Reconstruct:
        kind = KeepInput  # nothing in these networks can be reversed
    hooked = set().union(*(hooks(part) for part in worker.corrections.parts))
    changed = {"forward", "backward"} & hooked
    if kind in INPUTS and method.at_once(k, case.K) and method.facts.reach(k, case.K) and not changed:
        kind = KeepLiveGraph  # no copies
    per_row = NUMBER * (sum(widths) if kind in GRAPHS else widths[0]) * worker.upper.streams
    weights = NUMBER * sum(a * b + b for a, b in itertools.pairwise(widths))
    frozen = kind in (KeepGraph, KeepInputAndWeights) and (late or "forward" in hooked)
    held: dict[int, tuple[int, int]] = {}  # pass -> samples, version
    most = step = 0
    count = list(rows(case, method))
    for op in parse(method.order.text(k, case.K, len(count))):
        step += op.kind == "S"
        if op.kind == "F":
            held[op.batch] = count[op.batch], step
            copies = len({version for _, version in held.values()}) if frozen else 0
            most = max(most, per_row * sum(n for n, _ in held.values()) + copies * weights)
        elif op.kind in "BW":
            del held[op.batch]
    return most


SPECS = [spec for spec in variants() if plain(point(spec))]


def test_most_of_the_zoo_is_measured():
    """Those with variables, streams or buffers have tests of their own; a selection changes nothing that is held."""
    assert len(SPECS) > 0.6 * sum(point(spec).selection is None for spec in variants())


@pytest.mark.parametrize("spec", SPECS, ids=label)
@settings(max_examples=3)
@given(case=cases(blocks=(1, 6), batches=(14, 16), size=(5, 6)))
def test_memory_held_follows_the_formula(spec, case):
    """Exactly, where the cards ask for 5 %."""
    compare(case, point(spec))


def compare(case, method):
    trainer = train(case, method).trainer
    for k, (block, worker) in enumerate(zip(trainer.statistics(), trainer.workers, strict=True)):
        assert block.peak_held_bytes == formula(case, method, k, worker) + worker.lower.held_bytes


class Keeping(Gradient):
    """Gradients, and halves that keep something of their own from pass to pass."""

    def lower(self, place: Place) -> Lower:
        made = super().lower(place)
        made.__class__ = type("Keeps", (type(made),), {"held_bytes": 24})
        return made


def test_what_halves_declare_to_keep_is_held_as_well():
    """The control of the test above: bytes of its own do not make a method wrong."""
    late = next(
        method for method in map(point, SPECS) if type(method.coupling) is Gradient and method.facts.delay(0, 2)
    )
    method = replace(late, coupling=Keeping())
    compare(Case(widths=(3, 4, 3), cuts=(1,), sizes=(4,) * 6), method)


def live_bytes():
    """Of all tensors that Python holds."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    return sum(tensor.nbytes for tensor in tensors if tensor.layout is torch.strided)


@pytest.mark.slow
@pytest.mark.parametrize("spec", DEFAULTS, ids=label)
def test_nothing_is_hoarded(spec):
    """What a run holds does not grow from epoch to epoch, once everything there is to remember has been met."""
    given = {"loss": F.cross_entropy, "optimizer": OPTIMIZERS["momentum"], "runtime": "simulated"}
    with Trainer(LONG.blocks(), spec, **given) as trainer:
        trainer.fit(LONG.batches(), point(spec).epochs + 2)
        before = live_bytes()
        trainer.fit(LONG.batches(), 2 * point(spec).epochs)
        assert live_bytes() <= before
