"""Oracle 2, facts: staleness, passes in flight, messages and bytes are what the method declares, at any speed."""

import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoupled.block import Block
from decoupled.correction import hooks
from decoupled.errors import OperationError, UserError
from decoupled.messages import Boundary, Data, Down, Up
from decoupled.runtime.contract import Edge
from decoupled.runtime.simulated import Simulated
from decoupled.runtime.timing import Timing
from decoupled.simulate import tensors_up
from decoupled.testing import OPTIMIZERS, Case, Tap, cases, label, point, sends_gradients, timings, train, variants

CASE = Case(widths=(4, 5, 3, 4, 5, 3), cuts=(1, 2, 4), sizes=(6,) * 11 + (5,))


def fixed(specs):
    return [spec for spec in specs if point(spec).fixed]


def payload_shapes(case):
    """Features that leave each block."""
    return [case.widths[cut] for cut in (*case.cuts, len(case.widths) - 1)]


def real_messages(tap, kind) -> list[tuple[Edge, Any]]:
    return [(edge, m) for edge, m in tap.messages if isinstance(m, kind) and not m.void]


def drawn(data, **bounds):
    """A case, and a runtime of any speeds for it."""
    case = data.draw(cases(**bounds))
    return case, Simulated(data.draw(timings(case.K)))


@pytest.mark.costly
@pytest.mark.parametrize("spec", fixed(variants()), ids=label)
@settings(max_examples=3)
@given(data=st.data())
def test_staleness_and_passes_in_flight_are_as_declared_at_any_speed(spec, data):
    case, runtime = drawn(data, batches=(18, 20), size=(5, 6))  # more than any pipeline holds
    facts, K = point(spec).facts, case.K
    blocks = train(case, spec, runtime=runtime).trainer.statistics()
    for k, block in enumerate(blocks):
        late = [backward - forward for _, forward, backward in block.versions]
        settled = [backward - forward for _, forward, backward in block.versions if forward]
        most = facts.delay(k, K)
        least = facts.least_delay(k, K) if facts.least_delay else most
        assert {least, most} <= set(settled) <= {*range(least, most + 1)} or block.updates <= most + 2
        assert bool(settled) == (block.updates > most + 1) or least < most
        assert max(late) <= most
        assert block.peak_in_flight == facts.in_flight(k, K)


@pytest.mark.parametrize("spec", fixed(variants()), ids=label)
def test_the_order_promises_the_same_delay_and_room(spec):
    """What is declared, what is measured and what the order says of itself (it sizes the channels) are one thing."""
    method = point(spec)
    for K in range(1, 7):
        for k in range(K):
            assert method.order.delay(k, K) == method.facts.delay(k, K)
            assert min(method.order.delays(k, K)) == (method.facts.least_delay or method.facts.delay)(k, K)
            assert method.order.in_flight(k, K) == method.facts.in_flight(k, K)


@pytest.mark.parametrize("spec", variants(), ids=label)
@settings(max_examples=4)
@given(data=st.data())
def test_messages_and_bytes_follow_from_the_shapes(spec, data):
    case, runtime = drawn(data, batches=(3, 4), size=(1, 6))
    method, K, tap = point(spec), case.K, Tap()
    run = train(case, spec, runtime=runtime, observers=[tap])
    blocks, streams = run.trainer.statistics(), [worker.upper.streams for worker in run.trainer.workers]
    repeat, features = round(method.feed.count * method.feed.share), payload_shapes(case)
    up, down = (sent(tap, kind, K) for kind in (Up, Down))
    for k, block in enumerate(blocks):
        some = (method.coupling.lossy and k) or method.selection is not None
        met = block.samples if some else repeat * sum(case.sizes)
        assert block.samples == met > 0
        assert block.bytes_up == sum(m.nbytes for m in up[k])
        assert block.bytes_down == sum(m.nbytes for m in down[k])
        assert rows(up[k]) == (met if k < K - 1 else 0)
        if sends_gradients(method, K):
            assert rows(down[k]) == answers(method, k, K) * sum(case.sizes)
        above = run.trainer.workers[min(k + 1, K - 1)].upper
        for message in up[k]:
            assert len(message.payload) == tensors_up(method, streams)[k] > 0
            carried = above.carried(message)
            for t in message.payload:
                label = carried is not None and t is carried.targets
                assert t.shape[1:] == (() if label else (features[k],))
        for message in down[k]:
            assert len(message.payload) == len(method.coupling.down)
            for t in message.payload:
                if t.dim() == 1 and not method.coupling.down_like_up:  # weights, whatever the samples
                    assert len(t) <= block.parameters
                else:
                    assert t.shape[1:] == (features[k - 1 if method.coupling.down_like_up else -1],)


def sent(tap, kind, K):
    """The messages of one kind, by the block that sent them."""
    return [[m for edge, m in real_messages(tap, kind) if edge.source == f"block{k}"] for k in range(K)]


def rows(messages):
    """Samples in the messages; each tensor of a payload has one row per sample."""
    for message in messages:
        row = sum(t[0].numel() * t.element_size() for t in message.payload)
        assert message.nbytes == row * len(message.indices)
    return sum(len(message.indices) for message in messages)


def answers(method, k, K):
    """Gradients that block k sends down per pass: one per objective that a block below hears."""
    return len({j for below in range(k) for j in method.facts.reach(below, K) if j >= k})


@pytest.mark.parametrize("spec", variants(), ids=label)
def test_only_plain_data_crosses_a_block(spec):
    """No tensor received has a graph or asks for one; labels travel with the number of their batch (E6)."""
    tap = Tap()
    train(CASE, spec, observers=[tap])
    batches, chosen = CASE.batches(), point(spec).selection is not None
    ups = real_messages(tap, Up)
    assert len(ups) >= (CASE.K - 1) * (1 if chosen else len(CASE.sizes))
    every_x, every_y = (torch.cat(part) for part in list(zip(*batches, strict=True))[:2])
    for _, message in real_messages(tap, Boundary):
        assert not any(t.requires_grad or t.grad_fn is not None for t in message.payload)
    for _, message in real_messages(tap, Data):
        assert message.inputs is None or message.inputs.equal(every_x[message.indices])
        assert message.targets is None or message.targets.equal(every_y[message.indices])
        assert chosen or set(message.indices.tolist()) <= set(batches[message.batch][2].tolist())
    for _, message in ups:
        assert chosen or message.indices.min() >= batches[message.batch][2][0]
        assert chosen or message.indices.max() <= batches[message.batch][2][-1]
        assert len(message.payload[0]) == len(message.indices)


@pytest.mark.costly
@pytest.mark.parametrize("spec", [s for s in variants() if not point(s).coupling.lossy], ids=label)
@pytest.mark.parametrize("slow", [0, CASE.K - 1], ids=["slow bottom", "slow top"])
def test_nobody_floods_a_slow_neighbour(spec, slow):
    """What a block may be ahead of the next one is bounded by the method, never by the length of the data."""
    tap, method, K = Tap(), point(spec), CASE.K
    train(CASE, spec, runtime=Simulated(Timing(slow={slow: 1000.0})), observers=[tap], batches=CASE.batches() * 2)
    done = [0] * K
    for actor, operation, *_ in sorted(tap.operations, key=lambda row: row[2]):
        if not actor.startswith("block"):
            continue
        k = int(actor.removeprefix("block"))
        done[k] += operation[0] == "F"
        if k < K - 1:
            room = max(method.channel, method.facts.in_flight(k, K) + 1)
            assert done[k] - done[k + 1] <= room + 1  # waiting on the edge, and one in the hand


@pytest.mark.parametrize("spec", variants(), ids=label)
def test_no_step_and_no_tick_without_a_gradient_and_none_left_behind(spec):
    """Warm-up decays nothing (F4); a finished epoch leaves all blocks equally far (F5)."""
    steps = []

    def optimizer(parameters):
        made = OPTIMIZERS["momentum"](parameters)
        made.register_step_pre_hook(lambda *_: steps.append(all(p.grad is not None for p in parameters)))
        return made

    def scheduler(made):
        return torch.optim.lr_scheduler.StepLR(made, step_size=3, gamma=0.5)

    run = train(CASE, spec, optimizer=optimizer, scheduler=scheduler, epochs=2)
    assert steps
    assert all(steps)
    updates = [block.updates for block in run.trainer.statistics()]
    if sends_gradients(point(spec), CASE.K):
        trained = [bool(point(spec).facts.reach(k, CASE.K)) for k in range(CASE.K)]
        assert updates == [2 * len(CASE.sizes) * learns for learns in trained]
    for worker, count in zip(run.trainer.workers, updates, strict=True):
        assert {s.last_epoch for s in worker.steps.schedulers} == {count}
        for made in worker.steps.optimizers:
            assert made.param_groups[0]["lr"] == pytest.approx(made.defaults["lr"] * 0.5 ** (count // 3))


@pytest.mark.parametrize("spec", variants(), ids=label)
def test_the_locks_removed_are_three_and_are_told_where(spec):
    """A lock by its name, and behind it a place, if it is not removed everywhere."""
    locks = point(spec).facts.locks
    assert [lock for lock in locks if not re.fullmatch(r"(forward|backward|update)(,? \w.*)?", lock)] == []
    assert len({lock.split(" ")[0].rstrip(",") for lock in locks}) == len(locks)


@pytest.mark.parametrize("spec", variants(), ids=label)
def test_who_reads_indices_fails_without_them_and_nobody_else(spec):
    batches, method = [(x, y) for x, y, _ in CASE.batches()], point(spec)
    with (
        pytest.raises(UserError, match=r"indices|addressed by sample") if method.facts.reads_indices else nullcontext()
    ):
        try:
            train(CASE, spec, batches=batches, epochs=method.epochs)
        except OperationError as error:
            raise error.__cause__ or error from error


def runs_on_other_weights(worker):
    return any({"forward", "backward"} & hooks(part) for part in worker.corrections.parts)


@pytest.mark.parametrize("spec", fixed(variants()), ids=label)
def test_backwards_go_through_the_weights_that_are_declared(spec, monkeypatch):
    """Those of the forward, as late as the pass, or today's; where corrections move weights, it cannot be seen."""
    met, walking, facts, K = [], Block.walking, point(spec).facts, CASE.K

    def noted(self, weights):
        met.append((self.name, self.version, torch.cat([w.detach().flatten() for w in weights])))
        return walking(self, weights)

    late = any(facts.delay(k, K) for k in range(K))
    assert facts.backward_weights in (("forward", "current", "mixed") if late else ("none",))
    monkeypatch.setattr(Block, "walking", noted)
    run = train(CASE, spec, epochs=point(spec).epochs)
    for k, worker in enumerate(run.trainer.workers):
        seen = [(version, weights) for name, version, weights in met if name == worker.name]
        if runs_on_other_weights(worker) or not seen:
            continue
        ages = [version - known(run.weights[k][: version + 1], weights) for version, weights in seen]
        stashed = facts.backward_weights == "forward"
        assert max(ages) == (facts.delay(k, K) if stashed else 0)


def known(versions, weights):
    """The last version with these weights."""
    return max(v for v, one in enumerate(versions) if torch.equal(one, weights))
