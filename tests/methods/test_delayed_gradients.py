"""Delayed gradients: which weights each gradient belongs to, and which methods are the same one (B1-B5, B8, B9)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from decoupled import OperationError, Trainer, UserError
from decoupled.messages import Data
from decoupled.methods.delayed_gradients.horizon import scaled
from decoupled.retention import KeepGraph
from decoupled.testing import OPTIMIZERS, Case, cases, compare, flat, point, reference, train

CASE = Case(widths=(4, 5, 3, 4, 5, 3), cuts=(1, 2, 4), sizes=(6,) * 11 + (4,))
K = CASE.K


TICK = ("dsp", "pipelined_backprop", "petra")


def golden(name, k, blocks):
    """Updates between forward and backward (notes/methods.md, 1.2)."""
    if name in TICK:
        return 2 * (blocks - 1 - k)
    return max(0, 2 * (blocks - 1 - k) - 1) if name == "fdg" else blocks - 1 - k


def with_gradients(spec, case: Any = CASE, **options):
    """A run, and every gradient that a block's optimizer has been given: [block][update], one vector each."""
    blocks = case.blocks()
    gradients = [[] for _ in blocks]

    def optimizer(parameters):
        made = options.get("optimizer", OPTIMIZERS["sgd"])(parameters)
        k = next(k for k, block in enumerate(blocks) if next(block.parameters()) is parameters[0])
        made.register_step_pre_hook(lambda *_: gradients[k].append(torch.cat([p.grad.flatten() for p in parameters])))
        return made

    return train(case, spec, blocks=blocks, **{**options, "optimizer": optimizer}), gradients


def gradient_at(weights, x, y, case=CASE):
    """The gradient of the whole network's loss at these weights (one vector per block), by plain autograd."""
    leaves, state = [w.clone().requires_grad_() for w in weights], {}
    for k, (block, vector) in enumerate(zip(case.blocks(), leaves, strict=True)):
        shapes = {name: p.shape for name, p in block.named_parameters()}
        parts = vector.split([shape.numel() for shape in shapes.values()])
        state |= {f"{k}.{name}": part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    output = functional_call(nn.Sequential(*case.blocks()), state, (x,))
    return torch.autograd.grad(F.cross_entropy(output, y), leaves)


@pytest.mark.parametrize("name", ["ddg", "pipedream"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_late_gradients_are_exact_for_the_weights_their_batch_has_met(name, optimizer):
    """g_k of batch m is the gradient at (w_0[m-K+1], ..., w_{K-1}[m]), one moment of the lock-step (B1, B2)."""
    run, gradients = with_gradients(name, optimizer=optimizer)
    for m, (x, y, _) in enumerate(CASE.batches()):
        met = [run.weights[j][max(0, m - (K - 1 - j))] for j in range(K)]
        for k, expected in enumerate(gradient_at(met, x, y)):
            torch.testing.assert_close(gradients[k][m], expected, rtol=0, atol=1e-12)


def test_the_gradients_of_fdg_are_exact_for_later_weights_and_shrink_at_every_hop():
    run, gradients = with_gradients({"name": "fdg", "beta": 0.5})
    for m, (x, y, _) in enumerate(CASE.batches()):
        met = [run.weights[j][max(0, m - golden("fdg", j, K))] for j in range(K)]
        for k, expected in enumerate(gradient_at(met, x, y)):
            torch.testing.assert_close(gradients[k][m], 0.5 ** (K - 1 - k) * expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.25, 0.7, 1.0])
def test_shrinking_is_a_power_of_beta_at_frozen_weights(beta):
    """B9; and with beta = 1 nothing of it is left (A2)."""
    frozen = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}
    _, shrunk = with_gradients({"name": "fdg", "beta": beta}, **frozen)
    _, plain = with_gradients("backprop", **frozen)
    for k in range(K):
        for mine, theirs in zip(shrunk[k], plain[k], strict=True):
            torch.testing.assert_close(mine, beta ** (K - 1 - k) * theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@settings(max_examples=10)
@given(case=cases(batches=(1, 10)))
def test_ddg_and_pipedream_are_one_algorithm(optimizer, case):
    """B3: described by different people in different words; the same per-block trajectories, bit for bit."""
    ddg, pipedream = (train(case, name, optimizer=optimizer, epochs=2) for name in ("ddg", "pipedream"))
    compare(ddg.weights, pipedream.weights, tolerance=0.0)


@pytest.mark.parametrize("name", ["ddg", "pipedream", "fdg"])
@settings(max_examples=8)
@given(case=cases(batches=(4, 8)))
def test_recomputing_with_stashed_weights_is_keeping_the_graph(name, case):
    """B4: S0 and S1 agree to the last bit."""
    kept, recomputed = (train(case, {"name": name, "recompute": again}, epochs=2) for again in (False, True))
    compare(kept.weights, recomputed.weights, tolerance=0.0)


def test_replaying_with_todays_weights_is_something_else_below_the_top():
    """B4: S2 is not S0 once the weights move; the first update of every block, and the top's input-free one, agree."""
    replay, ddg = (train(CASE, name).weights for name in ("features_replay", "ddg"))
    assert all(torch.equal(replay[K - 1][v], ddg[K - 1][v]) for v in range(2))
    for k in range(K - 1):
        assert not torch.equal(replay[k][2], ddg[k][2])


class Naive(KeepGraph):
    """What the published code of DDG and FDG does: keep the graph, change the weights under it (stash policy S3)."""

    def __init__(self, block, steps_between, at_once):
        super().__init__(block, False, at_once)


@pytest.mark.parametrize("name", ["ddg", "pipedream", "fdg"])
@pytest.mark.parametrize("batches", [2, 12])
def test_weights_changed_under_a_live_graph_raise(name, batches):
    """B5: never a wrong gradient, not even for the first batch of its shape."""
    case = replace(CASE, sizes=tuple(range(4, 4 + batches)))
    naive = replace(point(name), retention=Naive)
    with pytest.raises(OperationError, match="modified by an inplace operation") as caught:
        train(case, naive)
    assert caught.value.operation.startswith("B1")
    train(case, replace(naive, order=point("backprop").order))  # without a step between it is fine


def test_graphs_over_live_weights_do_what_the_published_code_did():
    """B5, S3: with one layer per block the gradient is exact at the two top blocks and wrong below (notes, 0.3)."""
    case = Case(widths=(4, 5, 3, 4, 5, 3), cuts=(1, 2, 3, 4), sizes=(6,) * 12)
    run, gradients = with_gradients({"name": "ddg", "mutated": True}, case=case)
    for n, (x, y, _) in enumerate(case.batches()):
        for k, expected in enumerate(by_hand_mutated(case, run.weights, n, x, y)):
            torch.testing.assert_close(gradients[k][n], expected, rtol=0, atol=1e-12)
    n, (x, y, _) = 11, case.batches()[11]
    met = [run.weights[j][n - (case.K - 1 - j)] for j in range(case.K)]
    wrong = [not torch.allclose(gradients[k][n], g) for k, g in enumerate(gradient_at(met, x, y, case))]
    assert wrong == [True, True, True, False, False]


def by_hand_mutated(case, weights, n, x, y):
    """Stored activations; the input gradient of a linear layer with tanh behind it through its weights of today."""
    inputs, outputs, found, K = [x], [], [], case.K
    for k in range(K):
        block = at(case, k, weights[k][max(0, n - (K - 1 - k))])
        inputs.append(block(inputs[-1]).detach())
        outputs.append(inputs[-1])
    logits = outputs[-1].requires_grad_()
    (delta,) = torch.autograd.grad(F.cross_entropy(logits, y), logits)
    for k in reversed(range(K)):
        before = delta if k == K - 1 else delta * (1 - outputs[k] ** 2)
        found.append(torch.cat([(before.T @ inputs[k]).flatten(), before.sum(0)]))
        delta = before @ at(case, k, weights[k][n])[0].weight.detach()
    return reversed(found)


def at(case, k, vector):
    """Block k with its weights in one vector, its single linear layer first."""
    unit: Any = case.blocks()[k][0]
    nn.utils.vector_to_parameters(vector.clone(), unit.parameters())
    return unit


def test_only_weights_may_change_under_a_live_graph():
    class Overwrites(nn.Module):
        def forward(self, x):
            y = x.tanh()
            y.add_(1.0)  # tanh needs its output
            return y

    case = replace(CASE, sizes=(6, 6))
    blocks = [nn.Sequential(block, Overwrites()) for block in case.blocks()]
    with pytest.raises(OperationError, match="modified by an inplace operation"):
        train(case, {"name": "ddg", "mutated": True}, blocks=blocks)
    with pytest.raises(UserError, match="choose one of them"):
        point({"name": "fdg", "mutated": True, "recompute": True})


@pytest.mark.parametrize("blocks", range(2, 7))
@pytest.mark.parametrize(
    "name", ["ddg", "pipedream", "features_replay", "fdg", "spectrain", "pipeoptim", "async_nesterov", *TICK]
)
def test_versions_of_a_run_are_the_golden_ones(name, blocks):
    """B8: (weights at the forward, weights at the backward) of every batch, as the workers have recorded them."""
    case = Case(widths=(3,) * (blocks + 1), cuts=tuple(range(1, blocks)), sizes=(2,) * 22)
    for k, block in enumerate(train(case, name).trainer.statistics()):
        late = golden(name, k, blocks)
        assert block.versions == [(n, max(0, n - late), n) for n in range(22)]
        assert block.staleness == {d: 1 for d in range(late)} | {late: 22 - late}


@pytest.mark.parametrize("blocks", [2, 5])
@pytest.mark.parametrize("runtime", ["simulated", "threads"])
def test_admission_bounds_how_late_a_batch_is_and_its_gradient_is_exact_where_it_was(blocks, runtime):
    case = Case(widths=(3,) * (blocks + 1), cuts=tuple(range(1, blocks)), sizes=(2,) * 12)
    run, gradients = with_gradients({"name": "pipedream", "admission": 3}, case, runtime=runtime)
    late = {2: [1, 0], 5: [2, 2, 1, 1, 0]}[blocks]
    for k, block in enumerate(run.trainer.statistics()):
        assert block.versions == [(n, max(0, n - late[k]), n) for n in range(12)]
        assert block.peak_in_flight == late[k] + 1
    for m, (x, y, _) in enumerate(case.batches()):
        met = [run.weights[j][max(0, m - late[j])] for j in range(blocks)]
        for k, expected in enumerate(gradient_at(met, x, y, case)):
            torch.testing.assert_close(gradients[k][m], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"admission": 1}, r"admission takes 2 or more \(1 is backprop\), got 1"),
        ({"admission": 0}, r"admission takes 2 or more \(1 is backprop\), got 0"),
        ({"admission": 2, "vertical_sync": True}, "take one of vertical_sync, admission and microbatches"),
        ({"admission": 2, "microbatches": 2}, "take one of vertical_sync, admission and microbatches"),
        ({"microbatches": 2, "vertical_sync": True}, "take one of vertical_sync, admission and microbatches"),
    ],
)
def test_admission_and_the_like_are_refused_where_they_mean_nothing(more, text):
    with pytest.raises(UserError, match=text):
        point({"name": "pipedream", **more})


@pytest.mark.parametrize(("microbatches", "late"), [(1, [3, 2, 1, 0]), (2, [2, 1, 1, 0]), (3, [1, 1, 1, 0])])
def test_micro_batches_make_1f1b_less_late(microbatches, late):
    case = Case(widths=(3,) * 5, cuts=(1, 2, 3), sizes=(6,) * 12)
    run = train(case, {"name": "pipedream", "microbatches": microbatches})
    for k, block in enumerate(run.trainer.statistics()):
        assert max(block.staleness) == late[k] and block.updates == 12


def test_one_micro_batch_is_the_minibatch_as_it_came():
    data = Data(0, batch=0, inputs=torch.ones(3, 2), targets=torch.zeros(3))
    (only,) = point("pipedream").feed.passes(data, mass=lambda targets: pytest.fail("targets were counted"))
    assert only is data


@given(st.integers(2, 6))
@settings(max_examples=5)
def test_every_epoch_starts_from_a_drained_pipeline(blocks):
    case = Case(widths=(3,) * (blocks + 1), cuts=tuple(range(1, blocks)), sizes=(2,) * 4)
    for k, block in enumerate(train(case, "pipedream", epochs=3).trainer.statistics()):
        late = blocks - 1 - k
        assert block.versions == [(n, n - min(n % 4, late), n) for n in range(12)]


@pytest.mark.parametrize("microbatches", [1, 2, 3, 4])
@pytest.mark.parametrize("blocks", range(1, 7))
@pytest.mark.parametrize("name", ["adl", "pipemare", "petra", "xpipe"])
def test_versions_of_accumulated_gradients(name, blocks, microbatches):
    """B10: forward n has seen (n - D) // M updates, its backward n // M."""
    hops = 1 if name == "xpipe" else 2
    case = Case(widths=(3,) * (blocks + 1), cuts=tuple(range(1, blocks)), sizes=(4,) * 14)
    for k, block in enumerate(train(case, {"name": name, "microbatches": microbatches}).trainer.statistics()):
        late, M = hops * (blocks - 1 - k), microbatches
        assert block.versions == [(n, max(0, n - late) // M, n // M) for n in range(14 * M)]


@pytest.mark.parametrize("spec", [{"name": "pipedream", "vertical_sync": True}, {"name": "pipedream_2bw"}], ids=str)
@pytest.mark.parametrize("blocks", range(1, 7))
def test_versions_of_one_moment(spec, blocks):
    """B2, B6: all blocks run a batch with weights of one age, and hold no more versions than that."""
    M = 1 if "vertical_sync" in spec else 4
    lag = -(-(blocks - 1) // M)
    case = Case(widths=(3,) * (blocks + 1), cuts=tuple(range(1, blocks)), sizes=(4,) * 14)
    run = train(case, {**spec, "recompute": True})
    weights = 8 * (3 * 3 + 3)
    for k, block in enumerate(run.trainer.statistics()):
        assert block.versions == [(n, max(0, n // M - lag), n // M) for n in range(14 * M)]
        inputs = (blocks - k) * 8 * 3 * (4 // M) * (2 if blocks == 1 else 1)  # alone, a block keeps its graph
        newest = lag > 0 and blocks - 1 - k > (lag - 1) * M  # some pass here has met today's version
        assert block.peak_held_bytes == inputs + (lag + newest) * weights


def test_with_vertical_sync_a_gradient_is_exact_at_one_moment():
    """B2: every index is m - K + 1."""
    run, gradients = with_gradients({"name": "pipedream", "vertical_sync": True})
    for m, (x, y, _) in enumerate(CASE.batches()):
        met = [run.weights[j][max(0, m - (K - 1))] for j in range(K)]
        for k, expected in enumerate(gradient_at(met, x, y)):
            torch.testing.assert_close(gradients[k][m], expected, rtol=0, atol=1e-12)


def test_double_buffers_follow_the_papers_update():
    """w[t+1] = w[t] - lr grad f(w[t-1]), on the whole minibatch and the whole network (Narayanan et al. 2021)."""
    run, gradients = with_gradients("pipedream_2bw")
    for t, (x, y, _) in enumerate(CASE.batches()):
        for k, expected in enumerate(gradient_at([versions[max(0, t - 1)] for versions in run.weights], x, y)):
            torch.testing.assert_close(gradients[k][t], expected, rtol=0, atol=1e-12)


def test_queues_and_schedules_are_one_axis():
    """DSP with one tick per edge is Features Replay; ADL with one micro-batch keeps the graphs of DSP's schedule."""
    compare(train(CASE, {"name": "dsp", "queue": 1}).weights, train(CASE, "features_replay").weights, tolerance=0.0)
    tick = replace(point("dsp"), retention=KeepGraph, facts=point({"name": "adl", "microbatches": 1}).facts)
    compare(train(CASE, tick).weights, train(CASE, {"name": "adl", "microbatches": 1}).weights)


def test_a_queue_per_edge_makes_what_lies_below_it_late():
    spec = {"name": "dsp", "queue": [3, 1]}
    run = train(CASE, spec)
    late = [max(block.staleness) for block in run.trainer.statistics()]
    assert late == [point(spec).facts.delay(k, K) for k in range(K)] == [3 + K - 2, *range(K - 2, -1, -1)]
    compare(run.weights, reference(CASE, spec))


def test_batch_size_scaling_keeps_the_memory_of_samples():
    """Kosson et al.: momentum per sample, and what a sample contributes in all, do not change."""
    lr, momentum = scaled(0.1, 0.9, reference=128, batch=8)
    assert momentum ** (128 / 8) == pytest.approx(0.9)
    assert lr / (1 - momentum) / 8 == pytest.approx(0.1 / (1 - 0.9) / 128)


def test_evaluation_takes_blocks_as_they_are_after_a_broken_epoch():
    """F6: blocks may then have made different numbers of updates; measured is the network they make together."""
    batches = CASE.batches()

    def broken():
        yield from batches * 3
        raise RuntimeError("the disk is full")

    blocks = CASE.blocks()
    with Trainer(
        blocks, "pipedream", loss=F.cross_entropy, optimizer=OPTIMIZERS["sgd"], runtime="simulated"
    ) as trainer:
        with pytest.raises((RuntimeError, OperationError), match="the disk is full"):
            trainer.fit(broken())
        updates = [block.updates for block in trainer.statistics()]
        found = trainer.evaluate(batches)
    assert len(set(updates)) > 1
    network, x, y = (
        nn.Sequential(*blocks).eval(),
        torch.cat([b[0] for b in batches]),
        torch.cat([b[1] for b in batches]),
    )
    assert found["loss"] == pytest.approx(float(F.cross_entropy(network(x), y).detach()))


def test_a_warm_up_with_another_method_hands_on_everything_but_what_belongs_to_a_method():
    """T3 of PipeMare: synchronous epochs first. Weights, momentum, schedulers and counts go on, corrections begin."""
    batches, spec = CASE.batches(), {"name": "pipemare", "microbatches": 2, "anneal": 3}

    def made(method, blocks, seed=0):
        return Trainer(
            blocks,
            method,
            loss=F.cross_entropy,
            optimizer=OPTIMIZERS["momentum"],
            scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 5, 0.5),
            runtime="simulated",
            seed=seed,
        )

    blocks = CASE.blocks()
    with made("one_f_one_b", blocks) as first:
        first.fit(batches)
        state = first.state_dict()
        weights = [flat(block) for block in blocks]
    blocks = CASE.blocks()
    with made(spec, blocks, seed=3) as trainer:
        with pytest.raises(UserError, match="other_method=True takes over what does not belong to the method"):
            trainer.load_state_dict(state)
        trainer.load_state_dict(state, other_method=True)
        assert trainer.state_dict()["seed"] == 3
        for k, (block, worker) in enumerate(zip(blocks, trainer.workers, strict=True)):
            assert torch.equal(flat(block), weights[k])
            assert worker.block.version == worker.steps.schedulers[0].last_epoch == len(batches)
            (optimizer,), saved = worker.steps.optimizers, state["blocks"][k]["steps"]["optimizers"][0]
            for i, p in enumerate(block.parameters()):
                assert torch.equal(optimizer.state[p]["momentum_buffer"], saved["state"][i]["momentum_buffer"])
            assert all(row.get("t", 0) == 0 for row in worker.corrections.state_dict())
        trainer.fit(batches)
        assert [block.updates for block in trainer.statistics()] == [len(batches)] * K
