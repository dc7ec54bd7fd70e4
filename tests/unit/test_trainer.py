"""Trainer: what users do with it, what they do wrong, and what they are told then."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from decoupled import OperationError, Trainer, UserError
from decoupled.coupling import Gradient
from decoupled.method import Facts, Method, top
from decoupled.order import explicit, free
from decoupled.runtime.simulated import Simulated
from decoupled.runtime.threads import Threads
from decoupled.runtime.timing import Timing
from decoupled.testing import Case, compare, flat, train

CASE = Case(widths=(4, 5, 6, 3), cuts=(1, 2), sizes=(6, 6, 6, 6, 5))
RUNTIMES = ["simulated", "threads"]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def trainer(model=None, method="ddg", **options):
    given = {"loss": F.cross_entropy, "optimizer": sgd, "runtime": "simulated", **options}
    return Trainer(CASE.blocks() if model is None else model, method, **given)


def weights(one):
    return flat(one.model)


# --- what it accepts ----------------------------------------------------------------------------------------------


def test_a_sequential_with_cuts_and_a_list_of_blocks_are_the_same_network():
    results = []
    for given in ("list", "cuts", "sequential"):
        parts = CASE.blocks()
        model = parts if given == "list" else nn.Sequential(*parts)
        with trainer(model, blocks=None if given == "list" else [1, 2]) as one:
            one.fit(CASE.batches())
            assert one.cuts == [1, 2]
            assert len(one.model) == 3
            results.append(weights(one))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_number_of_blocks_is_balanced_on_the_first_batch():
    with trainer(nn.Sequential(*CASE.blocks()), blocks=2) as one:
        assert len(one.cuts) == 1
        one.fit(CASE.batches())
        assert len(one.statistics()) == 2


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_model_is_trained_in_place(runtime):
    blocks = CASE.blocks()
    before = [flat(block) for block in blocks]
    with trainer(blocks, runtime=runtime) as one:
        one.fit(CASE.batches())
        assert torch.equal(torch.cat([flat(block) for block in blocks]), weights(one))
    assert not any(torch.equal(flat(block), b) for block, b in zip(blocks, before, strict=True))


def test_batches_may_be_pairs_triples_lists_arrays_or_a_data_loader():
    expected = train(CASE, "ddg").weights
    x, y = (torch.cat(parts) for parts in list(zip(*CASE.batches(), strict=True))[:2])
    loader = DataLoader(TensorDataset(x, y), batch_size=6)
    every: list[Any] = [
        [(x, y) for x, y, _ in CASE.batches()],
        [[x, y, None] for x, y, _ in CASE.batches()],
        [(x.numpy(), y.numpy(), i.numpy()) for x, y, i in CASE.batches()],
        iter(CASE.batches()),
        loader,
    ]
    for batches in every:
        compare(train(CASE, "ddg", batches=batches).weights, expected, tolerance=0.0)


@pytest.mark.parametrize("name", ["ddg", "gpipe", "greedy_local", "block_admm"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_batch_sizes_may_change_from_batch_to_batch(name, runtime):
    sizes = (3, 1, 7, 2, 6, 1)
    case = dataclasses.replace(CASE, sizes=sizes)
    run = train(case, name, runtime=runtime, epochs=2)
    assert run.history[1]["samples"] == sum(sizes)
    assert {s.samples for s in run.trainer.statistics()} <= {2 * sum(sizes), 8 * sum(sizes)}


def test_a_method_is_a_name_a_mapping_an_omegaconf_node_or_a_point():
    expected = train(CASE, {"name": "overlapping_local", "reach": 3}).weights
    node = OmegaConf.create({"method": {"name": "overlapping_local", "reach": 3}}).method
    compare(train(CASE, node).weights, expected, tolerance=0.0)
    with trainer(method=node) as one:
        assert one.method.name == "overlapping_local"
        compare(train(CASE, one.method).weights, expected, tolerance=0.0)
    with pytest.raises(AssertionError, match="differs"):
        compare(train(CASE, "overlapping_local").weights, expected)


def test_an_explicit_order_can_be_run():
    """The same operations, written out by hand."""
    case = Case(widths=(4, 5, 3), cuts=(1,), sizes=(4, 4, 3))
    order = explicit(["F0 F1 B0 S F2 B1 S B2 S", "F0 B0 S F1 B1 S F2 B2 S"])
    by_hand = Method(Gradient(), order, Facts(exact=False, reach=top, in_flight=order.in_flight))
    compare(train(case, by_hand).weights, train(case, "ddg").weights, tolerance=0.0)


@pytest.mark.parametrize("runtime", [Simulated(), Simulated(Timing(latency=2.0, jitter=9.0, seed=4)), "threads"])
def test_a_free_order_trains_within_its_credit(runtime):
    """What has arrived decides; every pass is answered all the same, never with more in flight than the credit."""
    order = free(lambda k, K: 2)
    method = Method(Gradient(), order, Facts(exact=False, reach=top, in_flight=order.in_flight))
    run = train(CASE, method, runtime=runtime, epochs=3)
    for block in run.trainer.statistics():
        assert block.updates == 15
        assert block.peak_in_flight <= 2
        assert max(block.staleness) <= 1
    assert sorted(n for n, *_ in run.trainer.statistics()[0].versions) == list(range(15))


def test_free_messages_that_overtake_each_other_lose_nothing():
    """The end of the data may overtake the last batch; it must not be believed before that has come."""
    method = Method(Gradient(), free(), Facts(exact=False, reach=top, in_flight=free().in_flight))
    for seed in range(8):
        runtime = Simulated(Timing(latency=1.0, jitter=20.0, seed=seed), fifo=False)
        run = train(CASE, method, runtime=runtime, batches=CASE.batches() * 4)
        assert [block.updates for block in run.trainer.statistics()] == [20, 20, 20]


def test_a_runtime_that_was_given_outlives_its_trainers():
    """Its workers are used by one trainer after another, until its owner closes it."""
    runtime = Threads()
    for _ in range(2):
        with trainer(runtime=runtime) as one:
            one.fit(CASE.batches())
        assert runtime._pools._pools
    runtime.close()
    assert not runtime._pools._pools


@pytest.mark.parametrize("runtime", [{"name": "threads", "patience": 5.0}, {"name": "simulated", "fifo": False}])
def test_runtimes_take_their_options_by_name(runtime):
    with trainer(runtime=runtime) as one:
        one.fit(CASE.batches())
    with pytest.raises(UserError, match=rf"unknown option of runtime '{runtime['name']}': 'patent'"):
        trainer(runtime={"name": runtime["name"], "patent": 1})


# --- what it reports ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_history_and_progress(runtime):
    heard = []
    with trainer(runtime=runtime, on_batch=heard.append) as one:
        history = one.fit(CASE.batches(), epochs=2)
        history += one.fit(CASE.batches())
        assert one.epoch == 3
    assert heard == [6, 6, 6, 6, 5] * 3
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert [row["samples"] for row in history] == [29] * 3
    assert all(row["samples_per_second"] == row["samples"] / row["seconds"] > 0 for row in history)


@pytest.mark.parametrize("name", ["backprop", "gpipe"])
def test_the_loss_of_an_epoch_is_the_mean_over_samples(name):
    """At learning rate 0: a short last batch counts for as many samples as it has."""
    batches = CASE.batches()
    model = nn.Sequential(*CASE.blocks())
    expected = F.cross_entropy(model(torch.cat([x for x, *_ in batches])), torch.cat([y for _, y, _ in batches]))
    run = train(CASE, name, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0), epochs=2)
    assert [row["loss"] for row in run.history] == pytest.approx([float(expected.detach())] * 2)


def test_statistics_are_one_frozen_record_per_block():
    run = train(CASE, "greedy_local", epochs=2, runtime=Simulated(Timing(forward=1.0, backward=2.0, step=0.5)))
    first, second, third = run.trainer.statistics()
    assert [s.block for s in (first, second, third)] == [0, 1, 2]
    assert (first.device, first.samples, first.updates, first.skipped) == ("cpu", 58, 10, 0)
    assert first["updates"] == first.updates
    assert (first.parameters, first.auxiliary_parameters) == (4 * 5 + 5, 5 * 3 + 3)
    assert (third.parameters, third.auxiliary_parameters) == (6 * 3 + 3, 0)
    assert first.staleness == {0: 10}
    assert first.versions == [(n, n, n) for n in range(10)]
    assert (first.bytes_up, first.bytes_down, third.bytes_up) == (58 * 5 * 8, 0, 0)
    assert first.busy_seconds == pytest.approx(10 * 3.5)
    assert first.wait_seconds == pytest.approx(2 * 2 * 1.0)  # each epoch ends when the top has finished
    assert first.peak_in_flight == 1
    assert first.peak_held_bytes > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(first, "updates", 0)  # noqa: B010 - the type checker refuses it too
    with pytest.raises(AttributeError):
        first["update"]


def test_there_are_no_statistics_and_no_workers_before_the_first_batch():
    with trainer() as one:
        assert one.statistics() == []
        assert one.workers == ()


def test_evaluate_is_the_forward_network():
    with trainer(method="greedy_local") as one:
        one.fit(CASE.batches())
        found = one.evaluate(CASE.batches())
        x, y = (torch.cat(parts) for parts in list(zip(*CASE.batches(), strict=True))[:2])
        output = one.model(x)
        assert found["loss"] == pytest.approx(float(F.cross_entropy(output, y).detach()))
        assert found["accuracy"] == pytest.approx(float((output.argmax(1) == y).double().mean()))
        with pytest.raises(UserError, match="nothing to evaluate"):
            one.evaluate([])


def test_evaluate_without_classes_has_no_accuracy():
    with trainer(loss=F.mse_loss) as one:
        batches = [(x, torch.randn(len(x), 3, dtype=torch.float64)) for x, *_ in CASE.batches()]
        one.fit(batches)
        found = one.evaluate(batches)
        assert math.isfinite(found["loss"])
        assert math.isnan(found["accuracy"])


def test_evaluate_works_before_fit_and_after_close():
    one = trainer()
    before = one.evaluate(CASE.batches())
    one.fit(CASE.batches(), epochs=3)
    one.close()
    assert one.evaluate(CASE.batches())["loss"] < before["loss"]


# --- optimizers and schedulers ------------------------------------------------------------------------------------


def test_every_block_and_every_head_has_an_optimizer_of_its_own():
    groups = []

    def optimizer(parameters):
        groups.append(sum(p.numel() for p in parameters))
        return sgd(parameters)

    with trainer(method="greedy_local", optimizer=optimizer) as one:
        one.fit(CASE.batches())
    assert groups == [25, 18, 36, 21, 21]


def test_a_scheduler_ticks_once_per_step_of_its_own_block():
    rates = []

    def scheduler(optimizer):
        rates.append([])
        optimizer.register_step_pre_hook(lambda *_, log=rates[-1]: log.append(optimizer.param_groups[0]["lr"]))
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)

    train(CASE, "pipedream", scheduler=scheduler, epochs=2)
    assert rates == [[0.2 * 0.5**n for n in range(10)]] * 3


def test_parameters_that_are_not_trained_stay_as_they_are():
    blocks: list[Any] = CASE.blocks()
    for parameter in [*blocks[1].parameters(), blocks[0][0][0].bias]:
        parameter.requires_grad_(False)
    before = [[p.detach().clone() for p in block.parameters()] for block in blocks]
    for name in ("backprop", "pipedream", "features_replay", "greedy_local", "overlapping_local"):
        train(CASE, name, blocks=blocks)
    changed = [
        [not torch.equal(p, q) for p, q in zip(b.parameters(), old, strict=True)]
        for b, old in zip(blocks, before, strict=True)
    ]  # fmt: skip
    assert changed == [[True, False], [False, False], [True, True]]


@pytest.mark.parametrize("name", ["backprop", "ddg", "features_replay", "greedy_local", "gpipe", "block_admm"])
def test_blocks_without_parameters_take_part(name):
    blocks = [
        nn.Sequential(nn.Linear(4, 5).double()),
        nn.Sequential(nn.Tanh()),
        nn.Sequential(nn.Linear(5, 3).double()),
    ]
    before = flat(blocks[0])
    train(CASE, name, blocks=blocks, epochs=2)
    assert not torch.equal(flat(blocks[0]), before)


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "pipedraem"}, r"unknown method 'pipedraem'\. Did you mean 'pipedream'\?"),
        ({"method": {"name": "overlapping_local", "raech": 2}}, r"no option 'raech'\. Did you mean 'reach'\?"),
        ({"method": {"name": "backprop", "beta": 2}}, r"no option 'beta'.*Options: none"),
        ({"method": {"name": "overlapping_local", "reach": "two"}}, r"'reach' must be int, got 'two'"),
        ({"method": {"name": "overlapping_local", "reach": True}}, r"'reach' must be int, got True"),
        ({"method": {"name": "gpipe", "recompute": 1}}, r"'recompute' must be bool, got 1"),
        ({"method": {"reach": 2}}, r"the method \{'reach': 2\} has no name; write \{name: NAME"),
        ({"method": 7}, "a method must be a name or a mapping with a name, got 7"),
        ({"method": {"name": "overlapping_local", "reach": 0}}, "reach of at least 1, got 0"),
        ({"method": {"name": "chunked_local", "chunks": 0}}, "at least 1 chunk, got 0"),
        ({"method": {"name": "gpipe", "microbatches": 0}}, "microbatches must be at least 1, got 0"),
        ({"method": {"name": "block_admm", "rounds": 0}}, "rounds must be at least 1, got 0"),
        ({"method": {"name": "penalty", "beta": -1}}, "beta must be positive, got -1"),
        ({"method": {"name": "penalty", "eta": -1}}, "eta must be positive, or 0 .* got -1"),
        ({"method": {"name": "block_admm", "sigma": -0.5}}, r"sigma must lie in \[0, 1\], got -0.5"),
        ({"method": {"name": "penalty", "step": "gradeint"}}, r"'gradeint'\. Did you mean 'gradient'\?"),
        ({"method": {"name": "fdg", "beta": 0}}, r"factor in \(0, 1\], got 0"),
        ({"runtime": "thread"}, r"unknown runtime 'thread'\. Did you mean 'threads'\?"),
        ({"on_nonfinite": "skipp"}, r"Did you mean 'skip'\?"),
        ({"blocks": 4}, "blocks=4 but the model has only 3 units"),
        ({"blocks": [2, 1]}, r"\[2, 1\]"),
    ],
)
def test_wrong_arguments_are_refused_at_once_with_the_remedy(options, message):
    model = nn.Sequential(*CASE.blocks()) if "blocks" in options else CASE.blocks()
    options = {"method": "backprop", **options}
    with pytest.raises(UserError, match=message):
        trainer(model, **options)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "epoch 1 has no batches"),
        ([torch.zeros(3, 4)], r"a batch must be \(inputs, targets\).*got Tensor"),
        ([(torch.zeros(3, 4),)], "got tuple of 1"),
        ([(torch.zeros(3, 4).double(), torch.zeros(2).long())], "batch 0: 3 inputs but 2 targets"),
        ([(torch.zeros(0, 4).double(), torch.zeros(0).long())], "batch 0 has no samples"),
        (
            [(torch.zeros(3, 4).double(), torch.tensor([0, 1, 3]))],
            "labels go from 0 to 3, but the network has 3",
        ),
        ([(torch.zeros(3, 4).double(), torch.tensor([0, -1, 2]))], "labels go from -1 to 2"),
        ([(torch.zeros(3, 9).double(), torch.tensor([0, 1, 2]))], r"block0 does not take an input of shape \(2, 9\)"),
    ],
    ids=["empty", "tensor", "single", "lengths", "no samples", "label above", "label below", "features"],
)
def test_wrong_batches_are_refused_with_the_remedy(batches, message, runtime):
    with trainer(runtime=runtime) as one:
        with pytest.raises(UserError, match=message):
            one.fit(batches)
        assert one.fit(CASE.batches())[0]["samples"] == 29  # and it can go on with better ones


def test_a_label_of_minus_100_is_ignored_as_in_torch():
    batches = [(x, torch.where(y == 0, -100, y), i) for x, y, i in CASE.batches()]
    assert math.isfinite(train(CASE, "backprop", batches=batches).history[0]["loss"])


def test_an_iterator_that_is_used_up_is_an_error_in_the_second_epoch():
    with trainer() as one, pytest.raises(UserError, match=r"epoch 2 has no batches: .*used up"):
        one.fit(iter(CASE.batches()), epochs=2)


def test_a_loader_hears_of_the_epoch_before_it_is_iterated():
    heard = []

    class Loader:
        def set_epoch(self, epoch):
            heard.append(epoch)

        def __iter__(self):
            heard.append("iter")
            return iter(CASE.batches())

    with trainer() as one:
        one.fit(Loader(), epochs=2)
    assert heard == [0, "iter", 1, "iter"]


def test_stored_variables_without_sample_numbers_are_one_clear_error():
    batches = [(x, y) for x, y, _ in CASE.batches()]
    for runtime in RUNTIMES:
        with trainer(method="penalty", runtime=runtime) as one:
            with pytest.raises((UserError, OperationError), match=r"\(inputs, targets, indices\)"):
                one.fit(batches)


def test_a_closed_trainer_says_so():
    one = trainer()
    one.fit(CASE.batches())
    one.close()
    one.close()
    with pytest.raises(UserError, match="this trainer is closed"):
        one.fit(CASE.batches())


def test_blocks_that_do_not_fit_together_are_named():
    blocks = [nn.Linear(4, 5).double(), nn.Linear(6, 3).double()]
    with trainer(blocks) as one, pytest.raises(UserError, match=r"block1 does not take an input of shape \(2, 5\)"):
        one.fit(CASE.batches())

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with trainer([Pair(), blocks[0]]) as one, pytest.raises(UserError, match="block0 returns tuple; a block maps one"):
        one.fit(CASE.batches())


# --- failures while training --------------------------------------------------------------------------------------


class Fuse(nn.Module):
    """Fails in the forward of its n-th call in training (once)."""

    def __init__(self, at):
        super().__init__()
        self.left, self.armed = at, True

    def forward(self, x):
        if self.training and self.armed:
            self.left -= 1
            if self.left < 0:
                self.armed = False
                raise ZeroDivisionError("the fuse")
        return x


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_failing_block_is_named_and_the_trainer_can_go_on(runtime, k):
    blocks: list[Any] = CASE.blocks()
    blocks[k].append(Fuse(at=3))
    with trainer(blocks, runtime=runtime) as one:
        with pytest.raises(OperationError) as caught:
            one.fit(CASE.batches())
        assert str(caught.value) == f"block{k}, operation F3 (batch 3) (method 'ddg'): ZeroDivisionError: the fuse"
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        (row,) = one.fit(CASE.batches())
        assert (row["epoch"], row["samples"]) == (1, 29)
        assert len({s.updates for s in one.statistics()}) <= 3
        one.state_dict()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("the loader")])
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", ["ddg", "gpipe", "greedy_local", "penalty"])
def test_an_interrupt_in_the_loader_stops_everybody_and_the_trainer_can_go_on(name, runtime, error):
    def broken():
        yield from CASE.batches()[:3]
        raise error

    with trainer(method=name, runtime=runtime) as one:
        one.fit(CASE.batches())
        with pytest.raises(type(error) if isinstance(error, Exception) else error):
            one.fit(broken())
        (row,) = one.fit(CASE.batches())
        assert (row["epoch"], row["samples"]) == (2, 29)


def test_an_epoch_that_was_broken_off_leaves_nothing_in_the_next_one():
    """Its losses, gradients and passes are gone: at learning rate 0 the next loss is as if it were the first."""

    def broken():
        yield from CASE.batches() * 6
        raise RuntimeError("the loader")

    for runtime in RUNTIMES:
        with trainer(optimizer=lambda p: torch.optim.SGD(p, lr=0.0), runtime=runtime) as one:
            (first,) = one.fit(CASE.batches()[:2])
            with pytest.raises(RuntimeError, match="the loader"):
                one.fit(broken())
            assert one.statistics()[2].samples > first["samples"]
            (second,) = one.fit(CASE.batches()[:2])
            assert second["loss"] == first["loss"]


def test_a_nonfinite_loss_stops_by_default_and_can_be_skipped():
    batches = CASE.batches()
    batches[2] = (batches[2][0] * float("nan"), *batches[2][1:])
    with trainer() as one, pytest.raises(OperationError, match="train with on_nonfinite='skip'"):
        one.fit(batches)
    with trainer(on_nonfinite="skip") as one:
        (row,) = one.fit(batches)
        assert math.isfinite(row["loss"])
        assert torch.isfinite(weights(one)).all()
        assert [s.skipped for s in one.statistics()] == [0, 0, 1]
        assert [s.updates for s in one.statistics()] == [4, 4, 4]


def test_numpy_and_python_randomness_of_the_user_is_not_touched():
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.random(3)
    np.random.seed(1)
    train(CASE, "greedy_local", runtime="threads")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.random(3) == before[1]).all()
