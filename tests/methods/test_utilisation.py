"""Speed: what the simulator measures is what the closed forms of the notes say (methods.md 0.6 and 1.2, F10)."""

import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled import Trainer
from decoupled.coupling import Gradient
from decoupled.method import Facts, Method, top
from decoupled.order import lockstep, one_f_one_b, tick, tick_backward_first
from decoupled.runtime.simulated import Simulated
from decoupled.runtime.timing import Timing
from decoupled.testing import Case, Tap, train

ORDERS = {"lockstep": lockstep, "one_f_one_b": one_f_one_b, "tick": tick, "tick_backward_first": tick_backward_first}


def case(K, batches):
    return Case(widths=(2,) * (K + 1), cuts=tuple(range(1, K)), sizes=(4,) * batches)


def period(order, K, timing, settled=40):
    """Virtual seconds per minibatch in the steady state, at block 0 over a few round trips of all passes in flight."""
    tap, measured = Tap(), 4 * order.in_flight(0, K)
    method = Method(Gradient(), order, Facts(exact=False, reach=top, in_flight=order.in_flight))
    train(case(K, settled + measured + 2 * K), method, runtime=Simulated(timing), observers=[tap])
    starts = {op: start for actor, op, start, _ in tap.operations if actor == "block0"}
    return (starts[f"B{settled + measured}"] - starts[f"B{settled}"]) / measured


def closed_form(n, K, f, b, c):
    """Share of the time that a block works: n passes in flight, a round trip of K (f + b) + 2 (K - 1) c for each."""
    return min(1.0, n * (f + b) / (K * (f + b) + 2 * (K - 1) * c))


@pytest.mark.parametrize(
    ("name", "K", "c", "expected"),
    [
        ("one_f_one_b", 4, 0.5, 0.80), ("one_f_one_b", 4, 1.0, 0.67), ("one_f_one_b", 4, 2.0, 0.50),
        ("one_f_one_b", 8, 0.5, 0.77), ("one_f_one_b", 8, 1.0, 0.63), ("one_f_one_b", 8, 2.0, 0.46),
        ("tick", 4, 0.5, 1.00), ("tick", 4, 1.0, 1.00), ("tick", 4, 2.0, 0.87),
        ("tick", 8, 0.5, 1.00), ("tick", 8, 1.0, 1.00), ("tick", 8, 2.0, 0.87),
    ],
)  # fmt: skip
def test_smaller_delay_costs_latency_tolerance(name, K, c, expected):
    """The table of methods.md 0.6: forward 1, backward 2, one-way latency c."""
    order = ORDERS[name]
    found = 3.0 / period(order, K, Timing(forward=1.0, backward=2.0, latency=c))
    assert found == pytest.approx(expected, abs=0.02)
    assert found == pytest.approx(closed_form(order.in_flight(0, K), K, 1.0, 2.0, c), abs=1e-9)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("K", [2, 3, 5])
@pytest.mark.parametrize("backward", [0.5, 1.0, 2.0, 3.0])
def test_without_latency_asynchronous_orders_are_always_busy(name, K, backward):
    assert period(ORDERS[name], K, Timing(forward=1.0, backward=backward)) == pytest.approx(1.0 + backward, abs=1e-9)


@pytest.mark.parametrize("name", ["one_f_one_b", "tick"])
def test_the_slowest_block_sets_the_pace(name):
    assert period(ORDERS[name], 4, Timing(slow={2: 3.0})) == pytest.approx(9.0, abs=1e-9)


@pytest.mark.parametrize("name", ["gpipe", "one_f_one_b"])
@pytest.mark.parametrize("M", [1, 2, 4, 7])
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("backward", [1.0, 2.0, 2.5])
def test_a_flush_costs_the_bubble_of_gpipe(name, M, K, backward):
    """M / (M + K - 1), whatever forward and backward cost, for every block and minibatch."""
    one = Case(widths=(2,) * (K + 1), cuts=tuple(range(1, K)), sizes=(8,))
    spec = {"name": name, "microbatches": M}
    runtime = Simulated(Timing(forward=1.0, backward=backward))
    for block in train(one, spec, runtime=runtime, epochs=2).trainer.statistics():
        total = block.busy_seconds + block.wait_seconds
        assert total == pytest.approx(2 * (M + K - 1) * (1.0 + backward))
        assert block.busy_seconds / total == pytest.approx(M / (M + K - 1))


@pytest.mark.parametrize("M", [1, 2, 4, 8])
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize(("forward", "half"), [(1.0, 1.0), (1.0, 0.75), (1.0, 0.5)])
def test_a_split_backward_leaves_a_third_of_the_bubble(M, K, forward, half):
    """M (f + i + w) + (K-1)(f + i - w) with w <= f: a third of 1F1B's bubble at f = i = w, for M >= K (Qi et al.)."""
    one = Case(widths=(2,) * (K + 1), cuts=tuple(range(1, K)), sizes=(8,))
    runtime = Simulated(Timing(forward=forward, backward=2 * half))
    run = train(one, {"name": "zero_bubble", "microbatches": M}, runtime=runtime)
    total = max(block.busy_seconds + block.wait_seconds for block in run.trainer.statistics())
    work, bubble = M * (forward + 2 * half), (K - 1) * forward
    if M >= K:
        assert total == pytest.approx(work + bubble)
    flush = train(one, {"name": "one_f_one_b", "microbatches": M}, runtime=runtime)
    slower = max(block.busy_seconds + block.wait_seconds for block in flush.trainer.statistics())
    assert total <= slower == pytest.approx(work + (K - 1) * (forward + 2 * half))


@pytest.mark.parametrize("K", [1, 2, 5])
def test_backpropagation_uses_one_block_at_a_time(K):
    for block in train(case(K, 6), "backprop").trainer.statistics():
        assert block.busy_seconds / (block.busy_seconds + block.wait_seconds) == pytest.approx(1 / K)


@pytest.mark.parametrize("K", [2, 4])
def test_greedy_blocks_wait_only_for_their_first_input(K):
    """Busy for N (f + b) of N (f + b) + (K - 1) f; latency is paid once, not per batch."""
    for latency in (0.0, 5.0):
        runtime = Simulated(Timing(forward=1.0, backward=2.0, latency=latency))
        for block in train(case(K, 30), "greedy_local", runtime=runtime).trainer.statistics():
            assert block.busy_seconds == pytest.approx(30 * 3.0)
            assert block.busy_seconds + block.wait_seconds == pytest.approx(30 * 3.0 + (K - 1) * (1.0 + latency))


@pytest.mark.parametrize("reach", [2, 3])
def test_recomputing_is_paid_for_in_the_backward(reach):
    timing = Timing(forward=1.0, backward=2.0, recompute=True)
    assert period(one_f_one_b, reach, timing) == pytest.approx(4.0)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        time.sleep(NAP)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        time.sleep(NAP)
        return gradient


class Sleepy(nn.Module):
    """A block that takes `NAP` seconds in either direction, and no processor."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return _Sleep.apply(self.linear(x))


NAP, PASSES = 0.03, 16


@pytest.mark.parametrize("runtime", ["threads", {"name": "processes", "processes": 2}], ids=str)
@pytest.mark.parametrize(("method", "together"), [("pipedream", True), ("greedy_local", True), ("backprop", False)])
def test_two_blocks_work_at_the_same_time_in_reality(method, together, runtime):
    """F10 by the clock, with blocks that sleep; the control cannot overlap anything."""
    batches = [(torch.randn(2, 4), torch.randint(4, (2,)))] * PASSES
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.01)  # noqa: E731
    with Trainer([Sleepy(), Sleepy()], method, loss=F.cross_entropy, optimizer=sgd, runtime=runtime) as trainer:
        trainer.fit(batches[:2])  # starts what has to be started
        begun = time.perf_counter()
        trainer.fit(batches)
        seconds = time.perf_counter() - begun
    alone = 2 * NAP * PASSES  # of one block
    assert seconds > alone
    assert (seconds < 1.4 * alone) == together, seconds / alone
