"""Simulation without training agrees with the closed forms and with the real workers' counts."""

from __future__ import annotations

import pytest

from decoupled import methods, registry
from decoupled.errors import UserError
from decoupled.runtime.simulated import Timing
from decoupled.simulate import simulate


@pytest.mark.parametrize("name", methods())
def test_facts_hold_in_simulation(name: str) -> None:
    K = 4
    facts = registry.make(name).facts
    result = simulate(name, K, 64, Timing(jitter=0.5, latency=0.7, seed=3))
    assert [max(late) for late in result.staleness] == [facts.delay(k, K) for k in range(K)]
    assert result.in_flight == [facts.in_flight(k, K) for k in range(K)]
    assert 0 < result.speedup <= K
    assert all(0 < u <= 1 for u in result.utilisation)


def test_synchronous_pipelines_have_their_textbook_utilisation() -> None:
    K, M = 4, 8
    spec = {"name": "gpipe", "microbatches": M}
    assert simulate(spec, K, 1).utilisation == pytest.approx([M / (M + K - 1)] * K)
    assert simulate("backprop", K, 3).speedup == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("K", "latency", "expected"),
    [(4, 0.5, 0.80), (4, 1, 0.67), (4, 2, 0.50), (8, 0.5, 0.77), (8, 1, 0.63), (8, 2, 0.46)],
)
def test_small_delay_costs_latency_tolerance(K: int, latency: float, expected: float) -> None:
    """notes: forward : backward = 1 : 2, one-way latency in forward times, delay K-1-k."""
    result = simulate("pipedream", K, 1500, Timing(latency=latency))
    assert sum(result.utilisation) / K == pytest.approx(expected, abs=0.006)


def test_a_slow_block_sets_the_pace() -> None:
    result = simulate("pipedream", 4, 400, Timing(slow={3: 2.0}))
    assert result.utilisation[3] == pytest.approx(1.0, abs=0.02)
    assert result.utilisation[0] == pytest.approx(0.5, abs=0.02)


def test_the_same_seed_gives_the_same_run() -> None:
    timing = Timing(jitter=0.9, latency=1.3, seed=5)
    one, two = simulate("fdg", 5, 40, timing), simulate("fdg", 5, 40, timing)
    assert one == two
    assert one.time != simulate("fdg", 5, 40, Timing(jitter=0.9, latency=1.3, seed=6)).time


def test_nothing_to_simulate() -> None:
    with pytest.raises(UserError, match="at least 1"):
        simulate("backprop", 0, 4)
