"""Loss scales: who divides by what, who hears of an overflow, and what float16 gains by it."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled import Trainer, UserError
from decoupled.correction import Correction
from decoupled.messages import Down
from decoupled.models.revnet import revnet
from decoupled.scaling import Precision, Scaled, Scaling, precisions
from decoupled.testing import Case, Tap, compare, point, train

CASE = Case(widths=(4, 5, 3, 4, 5, 3), cuts=(1, 2, 4), sizes=(6,) * 9 + (5,))
GROWING = {"name": "float32", "scale": 4.0, "interval": 2}
DRAW = torch.Generator().manual_seed(0)
BATCHES = [(torch.randn(8, 4, generator=DRAW), torch.randint(3, (8,), generator=DRAW)) for _ in range(10)]


def fit(blocks, method, precision, runtime="simulated", batches=BATCHES, lr=0.1, loss=F.cross_entropy, **more):
    torch.manual_seed(0)
    made = blocks()
    with Trainer(
        made, method, loss=loss, optimizer=lambda p: torch.optim.SGD(p, lr=lr), runtime=runtime, precision=precision,
        **more,
    ) as trainer:  # fmt: skip
        history = trainer.fit(batches)
        return [p.detach().clone() for p in trainer.model.parameters()], trainer.statistics(), history[-1]["loss"]


def mlp():
    return [nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Linear(5, 3)]


# --- the parts


def test_a_sum_of_gradients_with_two_scales_has_the_smaller_one():
    total = Scaled(torch.tensor([8.0]), 4.0) + Scaled(torch.tensor([6.0]), 2.0)
    assert (total.tensor.item(), total.scale) == (10.0, 2.0)
    assert total.plain().item() == 8 / 4 + 6 / 2


def test_what_is_too_small_for_float16_is_not_lost_when_its_scale_is_taken_out():
    gradient = Scaled(torch.tensor([2.0**-20], dtype=torch.float16), 2.0**16)
    assert gradient.plain().dtype == torch.float32
    assert gradient.plain().item() == 2.0**-36
    doubled = gradient.through(lambda g: 2 * g)
    assert (doubled.tensor.dtype, doubled.tensor.item(), doubled.scale) == (torch.float16, 2.0**-19, 2.0**16)


def test_the_scale_grows_after_an_interval_without_overflow_and_shrinks_once_for_all_that_was_in_flight():
    scaling = Scaling(Precision(name="fp16", scale=8.0, interval=2))
    for expected in (8.0, 16.0, 16.0, 32.0):
        scaling.stepped()
        assert scaling.scale == expected
    for _ in range(3):  # three batches that were on their way with 32
        scaling.hear((32.0, 1.0))
        assert scaling.scale == 16.0
    scaling.hear((16.0, 1.0))
    assert scaling.scale == 8.0
    scaling.stepped()
    assert scaling.scale == 8.0  # counted anew


def test_news_go_as_far_up_as_the_objective():
    low, middle, high = (Scaling(Precision(name="fp16")) for _ in range(3))
    assert low.gradients([torch.tensor([float("inf")])], 64.0, blocks=2) is None
    middle.hear(low.tell())
    assert low.tell() == ()  # told once
    high.hear(middle.tell())
    assert high.tell() == ()
    assert [s.scale for s in (low, middle, high)] == [32.0] * 3
    assert low.gradients([torch.tensor([float("nan")])], 16.0, blocks=0) is None  # its own objective
    assert low.tell() == ()
    assert low.overflows == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fp61", "unknown precision 'fp61'.*Did you mean 'fp16'"),
        ({"name": "fp16", "skale": 1.0}, "option of precision 'fp16': 'skale'.*Did you mean 'scale'"),
        ({"name": "fp16", "scale": 0.0}, "must be positive numbers"),
        ({"name": "fp16", "backoff": 2.0}, "backoff < 1"),
        ({"name": "fp16", "interval": "x"}, "must be positive numbers"),
        ([{"name": "fp16", "scale": 2.0}, "fp16"], "in different ways"),
        ([], "empty list"),
        (16, "must be a name or a mapping"),
    ],
)
def test_wrong_precisions_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        precisions(spec)


# --- training


def test_every_down_carries_the_scale_of_its_own_batch_however_late_it_is():
    """pipedream, four blocks: at block 0 a gradient is three updates late, and the scale grows every second one."""
    tap = Tap()
    run = train(CASE, "pipedream", precision=GROWING, observers=[tap])
    scales: dict[str, list[float]] = {}
    for edge, message in tap.messages:
        if isinstance(message, Down):
            scales.setdefault(edge.target, []).append(message.scale)
    taken = [4.0 * 2 ** (n // 2) for n in range(10)]  # in force at the top at its n-th batch
    assert scales == {"block0": taken, "block1": taken, "block2": taken}
    assert run.trainer.statistics()[-1].loss_scale == 4.0 * 2**5
    assert max(run.trainer.statistics()[0].staleness) == 3


@pytest.mark.parametrize("method", ["pipedream", "petra", "dfa", {"name": "adl", "microbatches": 2}], ids=str)
def test_a_block_divides_by_what_came_and_not_by_what_it_knows_itself(method):
    """Whatever the lower blocks believe the scale to be, and whatever it has become at the top meanwhile."""

    def weights(believed):
        with Trainer(
            CASE.blocks(), method, loss=F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            runtime="simulated", precision=GROWING,
        ) as trainer:  # fmt: skip
            trainer.fit(CASE.batches()[:1])
            for worker in trainer.workers[:-1]:
                worker.scaling.scale = believed or worker.scaling.scale
            trainer.fit(CASE.batches())
            return [p.detach() for p in trainer.model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(0.0), weights(2.0**30), strict=True))


class HalfNorm(Correction):
    """Not linear: the gradient from above is scaled to norm 0.01 at most."""

    def cotangent(self, gradient):
        return gradient * min(1.0, 0.01 / float(gradient.norm()))


@pytest.mark.parametrize(
    "method",
    [
        {"name": "pipedream", "corrections": [{"name": "clip", "limit": 0.1}]},
        {"name": "adl", "corrections": [{"name": "clip_global", "limit": 0.1}, "gap_aware"]},
        {"name": "pipedream", "corrections": ["delay_compensation", "spike_compensation"]},
        {"name": "pipemare", "corrections": [{"name": "shrink", "factor": 0.5}]},
        {"name": "zero_bubble", "corrections": [{"name": "clip", "limit": 0.1}]},
    ],
    ids=str,
)
def test_corrections_and_clipping_see_gradients_without_a_scale(method):
    how = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "epochs": 2}
    compare(train(CASE, method, precision=GROWING, **how).weights, train(CASE, method, **how).weights, tolerance=0.0)


def test_a_correction_that_is_not_linear_sees_the_gradient_itself():
    method = replace(point("pipedream"), corrections=(HalfNorm(),))
    compare(train(CASE, method, precision=GROWING).weights, train(CASE, method).weights, tolerance=0.0)


class Steep(torch.autograd.Function):
    """The identity, whose gradient is 4096 times too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        return grads[0] * 4096


class Steeper(nn.Module):
    def forward(self, x):
        return Steep.apply(x)


OVERLAP = {"name": "overlapping_local", "reach": 3}
PROCESSES = {"name": "processes", "processes": 2}


@pytest.mark.parametrize(
    ("method", "runtime"),
    [
        ("pipedream", "simulated"),
        ("pipedream", "threads"),
        ("pipedream", PROCESSES),
        (OVERLAP, "simulated"),
        (OVERLAP, "threads"),
        pytest.param(OVERLAP, PROCESSES, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_overflow_in_the_lowest_block_skips_its_step_alone_and_its_news_reach_the_top(method, runtime):
    def blocks():
        low, *rest = mlp()
        return [nn.Sequential(low, Steeper()), *rest]

    start = 2.0**14
    _, found, loss = fit(blocks, method, {"name": "fp16", "scale": start}, runtime, BATCHES * 3, lr=1e-4)
    assert [block.overflows for block in found[1:]] == [0, 0]
    assert [block.updates for block in found[1:]] == [30, 30]
    assert 0 < found[0].overflows < 30
    assert found[0].updates == 30 - found[0].overflows
    assert found[2].loss_scale < start
    if method == "pipedream":
        assert (found[0].overflows, found[2].loss_scale) == fit_counts(blocks, start)
    assert loss == loss


def fit_counts(blocks, start):
    """What the simulator has counted, which every runtime must count."""
    _, found, _ = fit(blocks, "pipedream", {"name": "fp16", "scale": start}, batches=BATCHES * 3, lr=1e-4)
    return found[0].overflows, found[2].loss_scale


def test_a_scale_per_objective():
    """Greedy: the block whose head is steep lowers its own scale, and nobody else's."""

    def blocks():
        low, middle, top = mlp()
        return [nn.Sequential(low, Steeper()), middle, top]

    _, found, _ = fit(blocks, "greedy_local", {"name": "fp16", "scale": 2.0**14}, lr=1e-4)
    assert found[0].overflows > 0
    assert found[0].loss_scale < 2.0**14
    assert [block.loss_scale for block in found[1:]] == [2.0**14] * 2


def test_a_minibatch_with_one_bad_pass_is_dropped_whole():
    """Of four micro-batches one overflows: no step, and the gradients of the other three are forgotten."""
    method = {"name": "gpipe", "microbatches": 4}
    found = fit(mlp, method, {"name": "fp16", "scale": 2.0**24, "backoff": 0.5**5}, batches=BATCHES[:1])
    without = fit(mlp, method, "fp16", batches=BATCHES[:1], lr=0.0)
    assert found[1][-1].updates == 0
    assert found[1][-1].overflows >= 1
    assert all(torch.equal(a, b) for a, b in zip(found[0], without[0], strict=True))


@pytest.mark.parametrize("method", ["pipedream", "greedy_local", {"name": "features_replay"}], ids=str)
def test_float16_learns_from_gradients_that_it_could_not_hold_unscaled(method):
    """A loss of 1e-7 of the usual size with a learning rate of 1e6 of it: lost without a scale, as ever with one."""

    def tiny(output, target):
        return F.cross_entropy(output.float(), target) * 1e-7

    lost, _, _ = fit(mlp, method, {"name": "fp16", "scale": 1.0}, lr=1e6, loss=tiny)
    found, blocks, _ = fit(mlp, method, "fp16", lr=1e6, loss=tiny)
    whole, _, _ = fit(mlp, method, "float32", lr=1e6, loss=tiny)
    torch.manual_seed(0)
    start = [p.detach() for block in mlp() for p in block.parameters()]
    moved = [float((a - b).norm()) for a, b in zip(whole, start, strict=True)]
    errors = [float((a - b).norm()) for a, b in zip(found, whole, strict=True)]
    assert all(error < 0.1 * way for error, way in zip(errors, moved, strict=True))
    assert any(float((a - b).norm()) > 0.9 * way for a, b, way in zip(lost, whole, moved, strict=True))
    assert sum(block.overflows for block in blocks) == 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reversible_blocks_are_reversed_in_the_precision_of_their_forward(precision):
    def blocks():
        units = revnet((1, 8, 8), 3, width=4, stages=1, units=3)
        return [nn.Sequential(*units[:2]), nn.Sequential(units[2]), nn.Sequential(*units[3:])]

    batches = [(torch.randn(8, 1, 8, 8), torch.randint(3, (8,))) for _ in range(6)]
    losses = [fit(blocks, "petra", p, batches=batches)[2] for p in (precision, "float32")]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_one_precision_per_block_with_scale():
    weights, found, _ = fit(mlp, "pipedream", ["float32", "fp16", "float32"])
    whole, _, _ = fit(mlp, "pipedream", "float32")
    assert found[-1].loss_scale == 65536.0
    assert all(torch.allclose(a, b, atol=0.02) for a, b in zip(weights, whole, strict=True))
