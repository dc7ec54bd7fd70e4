"""Simulation without training agrees with the closed forms and with the real workers' counts."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import decoupled
from decoupled import methods, registry
from decoupled.errors import UserError
from decoupled.runtime.contract import Observer
from decoupled.runtime.timing import Timing
from decoupled.simulate import Load, simulate
from decoupled.simulate.path import CriticalPath
from decoupled.testing import Tap, point


def trainer_of(layers: Sequence[nn.Module], method: Any) -> decoupled.Trainer:
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.01)  # noqa: E731
    return decoupled.Trainer(layers, method, loss=nn.functional.cross_entropy, optimizer=sgd, runtime="simulated")


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


@pytest.mark.parametrize(("K", "n"), [(2, 2), (4, 3), (8, 2), (8, 3), (8, 4), (8, 6), (8, 20)])
@pytest.mark.parametrize("backward", [1.0, 2.0])
def test_blocks_that_admit_n_passes_work_as_often_as_those_come_by(K: int, n: int, backward: float) -> None:
    result = simulate({"name": "pipedream", "admission": n}, K, 1000, Timing(forward=1.0, backward=backward))
    assert result.utilisation == pytest.approx([1 / math.ceil(K / n)] * K, rel=0.02)


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


@pytest.mark.parametrize("name", [name for name in methods() if registry.make(name).facts.bubble])
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("backward", [1.0, 2.0])
def test_bubbles_have_their_closed_forms(name: str, K: int, backward: float) -> None:
    result = simulate(name, K, 3, Timing(backward=backward))
    assert result.closed_form is not None, "the default of 4 micro-batches is enough for 4 blocks"
    assert result.bubble == pytest.approx(result.closed_form)
    assert simulate(name, K, 3, Timing(latency=1.0)).closed_form is None


def test_a_zero_bubble_is_a_part_of_that_of_1f1b() -> None:
    K, M = 4, 8
    bubbles = {
        n: simulate({"name": n, "microbatches": M}, K, 5).bubble for n in ("gpipe", "one_f_one_b", "zero_bubble")
    }
    flush, zero = (K - 1) / (M + K - 1), (K - 1) / (3 * M + K - 1)
    assert bubbles == pytest.approx({"gpipe": flush, "one_f_one_b": flush, "zero_bubble": zero})


def test_messages_share_the_bandwidth_of_a_link() -> None:
    """An activation of 6 at 2 per time takes 3: longer than forward and backward of 1, so it sets the pace."""
    timing = Timing(forward=0.5, backward=0.5, bandwidth=2.0)
    result = simulate("greedy_local", 2, 100, timing, load=Load(activation=[6.0, 0.0]))
    assert result.time == pytest.approx(0.5 + 100 * 3.0 + 1.0)
    assert result.bytes_up == [6.0, 0.0] and result.bytes_down == [0.0, 0.0]
    assert simulate("greedy_local", 2, 100, Timing(forward=0.5, backward=0.5)).time == pytest.approx(100.5)


def test_the_critical_path_adds_up() -> None:
    slow = simulate("pipedream", 4, 50, Timing(slow={2: 3.0}))
    assert slow.critical_path["blocks"].index(max(slow.critical_path["blocks"])) == 2
    for name, timing in (("backprop", Timing(latency=0.5)), ("pipedream", Timing(latency=2.0)), ("gpipe", Timing())):
        one = simulate(name, 3, 6, timing)
        path = one.critical_path
        assert sum(path["blocks"]) + path["messages"] == pytest.approx(one.time) and path["room"] == pytest.approx(0)
    one = simulate("backprop", 3, 6, Timing(latency=0.5))
    assert one.critical_path == {"blocks": [18.0, 18.0, 18.0], "messages": 6 * 4 * 0.5, "room": 0.0}


def test_a_replay_that_the_caller_asks_for_is_paid_for() -> None:
    plain, again = (simulate("pipedream", 3, 30, Timing(recompute=r)).time for r in (False, True))
    assert again == plain * 4 / 3  # forward 1, backward 2


def test_a_device_that_is_too_small_is_named() -> None:
    """pipedream holds K-k graphs over as many copies; beside them weights, gradients and the optimizer's copy."""
    result = simulate("pipedream", 3, 20, load=Load(graph=10.0, weights=2.0, memory=30.0))
    assert result.held == [3 * 12.0, 2 * 12.0, 10.0]
    assert result.memory == [42.0, 30.0, 16.0] and result.too_small == {0: 42.0}
    replayed = simulate("features_replay", 3, 20, load=Load(activation=1.0, graph=10.0, weights=2.0, memory=30.0))
    assert replayed.held == [3.0, 2.0, 10.0] and not replayed.too_small


@pytest.mark.parametrize("name", [n for n in registry.methods() if point(n).fixed and point(n).selection is None])
def test_messages_are_those_of_the_real_workers(name: str) -> None:
    K, batch, count, widths = 4, 8, 6, (3, 5, 2, 7, 4)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    batches = [(torch.randn(batch, 3), torch.randint(4, (batch,)), torch.arange(batch)) for _ in range(count)]
    with trainer_of(layers, name) as trainer:
        trainer.fit(batches)
        real = trainer.statistics()
    found = simulate(name, K, count, load=Load(activation=[batch * width * 4 for width in widths[1:]]))
    assert found.bytes_up == pytest.approx([block.bytes_up / count for block in real])
    if point(name).coupling.linear:  # others may leave messages without content
        assert found.bytes_down == pytest.approx([block.bytes_down / count for block in real])


@pytest.mark.parametrize(("name", "rows"), [("greedy_local", [1, 1, 1]), ("sigprop", [2, 2, 1]), ("dtp", [1, 2, 1])])
def test_a_block_of_several_streams_takes_as_many_times_as_long(name: str, rows: list[int]) -> None:
    timeline = Tap()
    simulate(name, 3, 4, Timing(forward=[1.0, 10.0, 100.0], backward=1.0), observers=[timeline])
    forwards = {actor: end - start for actor, kind, start, end in timeline.operations if kind[0] == "F"}
    assert forwards == {"block0": rows[0] * 1.0, "block1": rows[1] * 10.0, "block2": rows[2] * 100.0}


@pytest.mark.parametrize(
    "name",
    [
        "pipedream", "ddg", "fdg", "features_replay", "gpipe", "one_f_one_b", "pipedream_2bw", "spectrain",
        {"name": "spectrain", "stash": True}, "async_nesterov", "pipeoptim", "pipelined_backprop",
        {"name": "pipedream", "corrections": ["linear_prediction"]}, {"name": "ddg", "recompute": True},
    ],
    ids=str,
)  # fmt: skip
def test_held_memory_is_what_the_real_workers_hold(name: Any) -> None:
    K, batch, width = 3, 8, 5
    layers = [nn.Linear(width, width) for _ in range(K)]
    batches = [(torch.randn(batch, width), torch.randint(width, (batch,))) for _ in range(12)]
    with trainer_of(layers, name) as trainer:
        trainer.fit(batches)
        real = [block.peak_held_bytes for block in trainer.statistics()]
    graph = 2 * batch * width * 4  # input and output of a linear layer
    load = Load(activation=batch * width * 4, graph=graph, weights=4 * width * (width + 1))
    assert simulate(name, K, 12, load=load).held == pytest.approx(real)


def test_the_garbage_collector_is_left_as_it_was_and_alone_where_somebody_looks_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool] = []

    class Looking(Observer):
        def operation(self, actor: str, operation: str, start: float, end: float) -> None:
            seen.append(gc.isenabled())

    class Path(CriticalPath):
        def operation(self, actor: str, operation: str, start: float, end: float) -> None:
            seen.append(gc.isenabled())

    simulate("pipedream", 2, 2, observers=[Looking()])
    assert set(seen) == {True}
    seen.clear()
    monkeypatch.setattr("decoupled.simulate.CriticalPath", Path)
    simulate("pipedream", 2, 2)
    assert set(seen) == {False} and gc.isenabled()
    gc.disable()
    try:
        simulate("pipedream", 2, 2)
        assert not gc.isenabled()
    finally:
        gc.enable()
