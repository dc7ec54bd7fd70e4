"""Oracle 4, runtime equivalence: a fixed order gives the same bits on every runtime, at any speed, however jittery."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoupled.runtime.simulated import Simulated
from decoupled.runtime.timing import Timing
from decoupled.testing import OPTIMIZERS, Case, cases, compare, label, point, timings, train, variants

CASE = Case(widths=(4, 5, 3, 4, 5, 3), cuts=(1, 2, 4), sizes=(6,) * 7 + (5,))
FIXED = [spec for spec in variants() if point(spec).fixed]
DEFAULTS = [spec for spec in FIXED if set(spec) == {"name"}]
SECONDS = {"busy_seconds": 0.0, "wait_seconds": 0.0}


def agree(mine, theirs):
    """Weights after every update, history and every count agree; only seconds may differ."""
    compare(mine.weights, theirs.weights, tolerance=0.0)
    losses = [[repr(row["loss"]) for row in run.history] for run in (mine, theirs)]  # NaN: nothing was let through
    assert losses[0] == losses[1]
    counts, others = ([replace(s, **SECONDS) for s in run.trainer.statistics()] for run in (mine, theirs))
    assert counts == others


@pytest.mark.costly
@pytest.mark.parametrize("spec", FIXED, ids=label)
@settings(max_examples=3)
@given(case=cases(blocks=(2, 5), batches=(2, 8)))
def test_threads_equal_the_simulator(spec, case):
    agree(*(train(case, spec, optimizer=OPTIMIZERS["momentum"], epochs=2, runtime=r) for r in ("threads", "simulated")))


@pytest.mark.costly
@pytest.mark.parametrize("spec", FIXED, ids=label)
@settings(max_examples=4)
@given(data=st.data())
def test_speed_latency_and_jitter_change_nothing_but_seconds(spec, data):
    """Delays injected anywhere move no message to another operation (F3)."""
    case = data.draw(cases(blocks=(2, 4), batches=(2, 6)))
    slow = Simulated(data.draw(timings(case.K)))
    agree(train(case, spec, epochs=2, runtime=slow), train(case, spec, epochs=2))


def test_the_timings_drawn_do_change_the_seconds():
    """The control of the test above."""
    plain, slow = (train(CASE, FIXED[0], runtime=Simulated(t)) for t in (Timing(), Timing(latency=3.0, jitter=1.0)))
    assert plain.trainer.statistics()[0].wait_seconds < slow.trainer.statistics()[0].wait_seconds


@pytest.mark.parametrize("spec", DEFAULTS, ids=label)
def test_a_run_is_a_pure_function_of_its_arguments(spec):
    """Its simulated seconds, too."""
    one, two = (train(CASE, spec, runtime=Simulated(Timing(latency=1.0, jitter=2.0, seed=3))) for _ in range(2))
    agree(one, two)
    assert one.trainer.statistics() == two.trainer.statistics()
