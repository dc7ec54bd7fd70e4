"""Corrected methods equal a loop written out by hand from their equations: no worker, no retention, no correction.

`by_hand` runs batch n through the blocks with what `forward` makes of their weights D_k updates ago, back through what
`backward` makes of today's, and steps; every method below is those three functions, in a few lines of arithmetic.
"""

import itertools
from dataclasses import replace
from types import SimpleNamespace as Record
from typing import Any

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from decoupled import correction as corrections
from decoupled import registry
from decoupled.compensation import GapAware, Rescale, SpikeCompensation
from decoupled.correction import Site
from decoupled.errors import OperationError, UserError
from decoupled.prediction import Discrepancy, LinearPrediction, Remembers, motion
from decoupled.testing import OPTIMIZERS, Case, compare, flat, label, train, variants

CASE = Case(widths=(4, 5, 3, 4, 5, 3), cuts=(1, 2, 4), sizes=(6,) * 11 + (4,))
K = CASE.K
LR, M, DECAY = 0.1, 0.9, 0.01  # of the optimizer "momentum"
ONE, TWO = ([1 * (K - 1 - k) for k in range(K)], [2 * (K - 1 - k) for k in range(K)])


def run(block, vector, x):
    """A block with its weights in one vector."""
    shapes = {name: p.shape for name, p in block.named_parameters()}
    parts = vector.split([shape.numel() for shape in shapes.values()])
    return functional_call(block, {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}, x)


def blank(k, w):
    """State of a block: its weights w, w[v - 1], momentum buffer, and what a method adds."""
    return Record(k=k, w=w, old=w, v=torch.zeros_like(w), d=torch.zeros_like(w), t=0, second=torch.zeros_like(w))


def sgd(s, g, lr=LR):
    s.v = M * s.v + g + DECAY * s.w
    return s.w - lr * s.v


def by_hand(delays, *, forward=lambda s: s.w, backward=None, step=sgd, gradient=None, after=None, micro=1):
    """Weights of every block after every update; `micro` micro-batches per update, counted in `delays`."""
    blocks = CASE.blocks()
    history = [[blank(k, flat(block))] for k, block in enumerate(blocks)]
    sums: list[Any] = [0.0] * K
    passes = [
        (part, target, len(part) / len(x))
        for x, y, _ in CASE.batches()
        for part, target in zip(x.tensor_split(micro), y.tensor_split(micro), strict=True)
    ]
    for n, (x, y, share) in enumerate(passes):
        met = [forward(history[k][max(0, (n - delays[k]) // micro)]) for k in range(K)]
        inputs = [x]
        for k, block in enumerate(blocks):
            inputs.append(run(block, met[k], inputs[-1]).detach())
        cotangent: Any = None
        for k in reversed(range(K)):
            s = history[k][-1]
            weights = (met[k] if backward is None else backward(s)).detach().requires_grad_()
            h = inputs[k].detach().requires_grad_()
            out = run(blocks[k], weights, h)
            loss = F.cross_entropy(out, y) * share if k == K - 1 else (out * cotangent).sum()
            cotangent, g = torch.autograd.grad(loss, [h, weights])
            sums[k] = sums[k] + (g if gradient is None else gradient(s, g, met[k]))
            if n % micro == micro - 1:
                new = Record(**vars(s))
                new.w, new.old, new.t = step(new, sums[k]), s.w, s.t + 1
                if after is not None:
                    after(new)
                history[k].append(new)
                sums[k] = 0.0
    return [[s.w for s in versions] for versions in history]


def check(spec, expected, optimizer="momentum"):
    found = train(CASE, spec, optimizer=OPTIMIZERS[optimizer])
    compare(found.weights, expected, tolerance=1e-11)
    plain = train(CASE, replace(registry.make(spec), corrections=()), optimizer=OPTIMIZERS[optimizer])
    with pytest.raises(AssertionError, match="differs by"):  # and the correction is not nothing
        compare(plain.weights, expected, tolerance=1e-7)


def today(s):
    return s.w


# --- methods ------------------------------------------------------------------------------------------------------


def spiked(s, g):
    late, g = TWO[s.k], g + DECAY * s.w
    s.v = M * s.v + g
    return s.w - LR * (M**late * s.v + (1 - M**late) / (1 - M) * g)


@pytest.mark.parametrize("spikes", [True, False])
@pytest.mark.parametrize("form", ["velocity", "weight"])
def test_pipelined_backprop(form, spikes):
    def ahead(s):
        return s.w - LR * TWO[s.k] * s.v if form == "velocity" else s.w + TWO[s.k] * (s.w - s.old)

    spec = {"name": "pipelined_backprop", "prediction": form, "spike_compensation": spikes}
    check(spec, by_hand(TWO, forward=ahead, backward=today, step=spiked if spikes else sgd))


def test_pipelined_backprop_without_prediction():
    spec = {"name": "pipelined_backprop", "prediction": "none"}
    check(spec, by_hand(TWO, backward=today, step=spiked))


def adam(s, g):
    """OPTIMIZERS["adam"]; leaves the next expected step in s.d."""
    t = s.t + 1
    s.v, s.second = 0.9 * s.v + 0.1 * g, 0.999 * s.second + 0.001 * g * g
    s.d = 0.02 * (s.v / (1 - 0.9**t)) / ((s.second / (1 - 0.999**t)).sqrt() + 1e-8)
    return s.w - s.d


def test_pipeoptim_reads_momentum_and_adam():
    check("pipeoptim", by_hand(ONE, forward=lambda s: s.w - LR * ONE[s.k] * s.v, backward=today))
    expected = by_hand(ONE, forward=lambda s: s.w - ONE[s.k] * s.d, backward=today, step=adam)
    check("pipeoptim", expected, optimizer="adam")


def test_without_momentum_the_velocity_is_the_last_gradient():
    def step(s, g):
        s.v = g
        return s.w - 0.2 * g

    expected = by_hand(ONE, forward=lambda s: s.w - 0.2 * ONE[s.k] * s.v, backward=today, step=step)
    check("pipeoptim", expected, optimizer="sgd")


def test_spectrain_predicts_one_moment_for_forward_and_backward():
    def ahead(s):
        return s.w - LR * (s.k // 2 + ONE[s.k]) * s.v

    check("spectrain", by_hand(ONE, forward=ahead, backward=lambda s: s.w - LR * (s.k // 2) * s.v))


def test_spectrain_with_stashed_weights():
    check({"name": "spectrain", "stash": True}, by_hand(ONE, forward=lambda s: s.w - LR * ONE[s.k] * s.v))


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_xpipe_looks_equally_far_in_all_micro_batches(micro, optimizer):
    """As far as the first micro-batch of a minibatch is late; with one micro-batch it is spectrain."""

    def ahead(s, updates):
        return s.w - updates * (LR * s.v if optimizer == "momentum" else s.d)

    expected = by_hand(
        ONE,
        forward=lambda s: ahead(s, s.k // 2 // micro - ONE[s.k] // -micro),
        backward=lambda s: ahead(s, s.k // 2 // micro),
        step=sgd if optimizer == "momentum" else adam,
        micro=micro,
    )
    check({"name": "xpipe", "microbatches": micro}, expected, optimizer)
    if micro == 1:
        runs = [train(CASE, spec).weights for spec in ({"name": "xpipe", "microbatches": 1}, "spectrain")]
        compare(*runs, tolerance=0.0)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "momentum"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("stash", [True, False])
def test_async_nesterov(stash, adaptive, optimizer):
    """1 - gamma times the optimizer's step (for plain SGD: the gradient), from the look-ahead point."""

    def steps_to(s, g):
        return s.w - 0.2 * g if optimizer == "sgd" else adam(s, g) if optimizer == "adam" else sgd(s, g)

    def gamma(s):
        return 0.8 + (ONE[s.k] * (0.99 - 0.8) / K if adaptive else 0.0)

    def point(s):
        return s.w + gamma(s) * (s.w - s.old)

    def step(s, g):
        return point(s) + (1 - gamma(s)) * (steps_to(s, g) - s.w)

    spec = {"name": "async_nesterov", "gamma": 0.8, "stash": stash, "adaptive": adaptive}
    check(spec, by_hand(ONE, forward=point, backward=None if stash else point, step=step), optimizer)


def test_async_nesterov_without_look_ahead_is_pipedream():
    """C6."""
    found = [train(CASE, spec).weights for spec in ({"name": "async_nesterov", "gamma": 0.0}, "pipedream")]
    compare(*found, tolerance=0.0)


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_pipemare(micro):
    """T1 divides the learning rate by the delay, T2 estimates the weights of the forward."""
    tau = [d / micro for d in TWO]

    def step(s, g):
        return sgd(s, g, LR / max(1.0, tau[s.k]) ** (1 - min(s.t / 5, 1)))

    def drift(s):
        keep = 0.3 ** (1 / tau[s.k]) if tau[s.k] else 0.0
        s.d = keep * s.d + (1 - keep) * (s.w - s.old)

    spec = {"name": "pipemare", "microbatches": micro, "anneal": 5, "decay": 0.3}
    expected = by_hand(TWO, backward=lambda s: s.w - tau[s.k] * s.d, step=step, after=drift, micro=micro)
    check(spec, expected)


@pytest.mark.parametrize("micro", [1, 2, 5])
def test_adl(micro):
    found = train(CASE, {"name": "adl", "microbatches": micro}, optimizer=OPTIMIZERS["momentum"])
    compare(found.weights, by_hand(TWO, micro=micro), tolerance=1e-11)


def test_delay_compensation_on_pipedream():
    expected = by_hand(ONE, gradient=lambda s, g, met: g + 0.7 * g * g * (s.w - met))
    check({"name": "pipedream", "corrections": [{"name": "delay_compensation", "strength": 0.7}]}, expected)


@pytest.mark.parametrize("micro", [2, 3])
def test_delay_compensation_of_a_share_is_its_share_of_the_compensation(micro):
    """The mean over micro-batches of g + s g g (w - w_F), of which each pass brings 1 / M."""
    expected = by_hand(TWO, gradient=lambda s, g, met: g + 0.7 * micro * g * g * (s.w - met), micro=micro)
    check({"name": "adl", "microbatches": micro, "corrections": [{"name": "dc", "strength": 0.7}]}, expected)


def test_gap_aware_on_pipedream():
    """Per tensor: two of them (weight, bias) in each layer."""
    sizes = [[p.numel() for p in block.parameters()] for block in CASE.blocks()]

    def gradient(s, g, met):
        if not s.t or not ONE[s.k]:
            return g
        rows = zip(g.split(sizes[s.k]), (s.w - met).split(sizes[s.k]), s.lengths, strict=True)
        return torch.cat([part / (1 + gap.norm() * (1 - 0.9**s.t) / length) for part, gap, length in rows])

    def after(s):
        steps = [part.norm() for part in (s.w - s.old).split(sizes[s.k])]
        before = getattr(s, "lengths", [0.0] * len(steps))
        s.lengths = [0.9 * mean + 0.1 * step for mean, step in zip(before, steps, strict=True)]

    expected = by_hand(ONE, gradient=gradient, after=after)
    check({"name": "pipedream", "corrections": [{"name": "gap_aware", "decay": 0.9}]}, expected)


def test_corrections_compose_by_config():
    """Prediction in the forward, compensated momentum, and a clipped gradient, on a method that has none of them."""

    def step(s, g):
        g = g * min(1.0, 0.05 / (float(g.norm()) + 1e-6))
        late, g = ONE[s.k], g + DECAY * s.w
        s.v = M * s.v + g
        return s.w - LR * (M**late * s.v + (1 - M**late) / (1 - M) * g)

    names: list[Any] = [
        {"name": "clip", "limit": 0.05},
        "spike_compensation",
        {"name": "linear_prediction", "scale": 2},
    ]
    expected = by_hand(ONE, forward=lambda s: s.w - LR * 2 * ONE[s.k] * s.v, backward=today, step=step)
    for listed in itertools.permutations(names):
        check({"name": "features_replay", "corrections": list(listed)}, expected)


@pytest.mark.parametrize("limit", ["clip", "clip_global"])
@pytest.mark.parametrize("spec", [s for s in variants() if getattr(registry.make(s), "corrections", ())], ids=label)
def test_clipping_bounds_the_step_of_a_method_with_corrections_of_its_own(spec, limit):
    """A step of at most lr (1 + m + m^2 ..) limit, however a correction changes it, or reads the gradient."""
    with_clip = (spec if isinstance(spec, dict) else {"name": spec}) | {"corrections": [{"name": limit, "limit": 1e-9}]}
    weights = train(CASE, with_clip, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)).weights
    for versions in weights:
        for old, new in itertools.pairwise(versions):
            assert (new - old).norm() < 0.1 * 10 * 1e-9 * 1.001


ORDERLESS = [
    {"name": "clip", "limit": 0.3}, "spike_compensation", {"name": "rescale", "anneal": 3}, "gap_aware",
    {"name": "linear_prediction", "form": "weight"},
]  # fmt: skip


@pytest.mark.parametrize("names", list(itertools.permutations(ORDERLESS))[::7], ids=str)
def test_a_step_does_not_depend_on_the_order_of_the_list(names):
    """Gradients are clipped before anything reads them, and what remembers a step remembers the whole of it."""
    w, v = torch.tensor([3.0, -1.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    p = torch.nn.Parameter(w.clone())
    made = torch.optim.SGD([p], lr=0.1, momentum=0.9, weight_decay=0.01)
    acting = corrections.Acting([corrections.make(name) for name in names], site(made, 3, p))
    remembering: Any = [part for part in acting.parts if isinstance(part, Remembers)]
    assert len(remembering) == 2
    for n in range(5):
        before = p.detach().clone()
        p.grad = torch.tensor([0.5 - n, 2.0], dtype=torch.float64)
        g = p.grad * 0.3 / (p.grad.norm() + 1e-6) + 0.01 * w
        v = 0.9 * v + g
        w = w - 0.1 / 3 ** (1 - min(n / 3, 1)) * (0.9**3 * v + (1 - 0.9**3) / 0.1 * g)
        acting.before_step()
        made.step()
        acting.after_step()
        for part in remembering:
            torch.testing.assert_close(part.change, [p.detach() - before], rtol=0, atol=0)
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-14)


@pytest.mark.parametrize("spec", ["async_nesterov", {"name": "async_nesterov", "stash": False}], ids=str)
def test_what_follows_a_look_ahead_remembers_the_whole_step(spec):
    more = "gap_aware" if spec == "async_nesterov" else "discrepancy"
    given = (spec if isinstance(spec, dict) else {"name": spec}) | {"corrections": [more]}
    found = train(CASE, given, optimizer=OPTIMIZERS["sgd"])
    for worker, weights in zip(found.trainer.workers, found.weights, strict=True):
        remembering: Any = worker.corrections.parts
        for part in remembering:
            change = torch.cat([t.reshape(-1) for t in part.change])
            torch.testing.assert_close(change, weights[-1] - weights[-2], rtol=0, atol=1e-15)


def test_a_prediction_from_momentum_keeps_nothing_of_its_own():
    """Without momentum it keeps the last gradient."""
    for optimizer, keeps in (("momentum", False), ("adam", False), ("sgd", True)):
        workers = train(CASE, "pipeoptim", optimizer=OPTIMIZERS[optimizer]).trainer.workers
        kept = [worker.corrections.held_bytes for worker in workers if worker.corrections.parts]
        weights = [sum(p.nbytes for p in worker.block.parameters) for worker in workers if worker.corrections.parts]
        assert kept == [keeps * own for own in weights]
        assert kept


@pytest.mark.parametrize(("name", "delays"), [("backprop", [0] * K), ("gpipe", [0] * K), ("pipedream", ONE)])
def test_clipping_by_the_norm_of_the_whole_network_some_batches_ago(name, delays):
    """Down the norms of the blocks above add up, up their sum comes back; the bottom block has it one batch earlier.

    The latest Up of block k at B n is that of pass n + D_k (or the last one), and the bottom block had closed D_0 + 1
    passes fewer by then, the last of which brought the norms of the pass before it.
    """
    norms: dict[int, float] = {}
    last = len(CASE.sizes) - 1

    def step(s, g):
        norms[s.t] = norms.get(s.t, 0.0) + float(g.norm()) ** 2
        known = min(s.t + delays[s.k], last) - delays[0] - 2 if s.k else s.t - 1
        return sgd(s, g * min(1.0, 0.3 / (max(norms.get(known, 0.0), float(g.norm()) ** 2) ** 0.5 + 1e-6)))

    spec = {"name": name, "corrections": [{"name": "clip_global", "limit": 0.3}]}
    check(spec, by_hand(delays, step=step))


def test_global_clipping_of_one_block_is_clipping():
    one = Case(widths=(4, 5, 3), cuts=(), sizes=(6,) * 8)
    names = ({"name": "clip_global", "limit": 0.1}, {"name": "clip", "limit": 0.1})
    runs = [train(one, {"name": "backprop", "corrections": [name]}).weights for name in names]
    compare(*runs, tolerance=1e-15)


@pytest.mark.parametrize("runtime", ["threads", {"name": "processes", "processes": 2}])
def test_news_travel_on_every_runtime(runtime):
    spec = {"name": "pipedream", "corrections": [{"name": "clip_global", "limit": 0.05}]}
    found = train(CASE, spec, optimizer=OPTIMIZERS["momentum"], runtime=runtime).trainer.model
    expected = train(CASE, spec, optimizer=OPTIMIZERS["momentum"]).trainer.model
    assert torch.equal(flat(found), flat(expected))


# --- what the pieces promise --------------------------------------------------------------------------------------


def site(optimizer, delay, *parameters):
    return Site(0, 4, delay, parameters, optimizer)


@pytest.mark.parametrize("form", ["velocity", "weight"])
@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_under_a_constant_gradient_predictions_come_true(kind, form):
    """C3: once momentum has converged, the predicted weights are those in place D updates later."""
    p = torch.nn.Parameter(torch.tensor([3.0, -1.0], dtype=torch.float64))
    made = torch.optim.SGD([p], lr=0.1, momentum=0.9) if kind == "momentum" else torch.optim.Adam([p], lr=0.02, eps=0)
    acting: Any = LinearPrediction(form).at(site(made, 5, p))

    def step():
        p.grad = torch.tensor([0.5, -2.0], dtype=torch.float64)
        acting.before_step()
        made.step()
        acting.after_step()
        acting.settle()

    for _ in range(400):
        step()
    before = p.detach().clone()
    (predicted,) = acting.forward([p.detach().clone()])
    assert torch.equal(p.detach(), before)
    for _ in range(5):
        step()
    torch.testing.assert_close(predicted, p.detach(), rtol=0, atol=1e-9)


def test_coasting_is_what_momentum_does_when_no_gradient_comes():
    """FTPipe's msnag; C4: for little friction it is the linear prediction."""
    p = torch.nn.Parameter(torch.tensor([3.0, -1.0], dtype=torch.float64))
    for momentum in (0.9, 1 - 1e-7):
        made = torch.optim.SGD([p], lr=0.1, momentum=momentum)
        for _ in range(3):
            p.grad = torch.tensor([0.5, -2.0], dtype=torch.float64)
            made.step()
        acting, linear = (LinearPrediction(form).at(site(made, 4, p)) for form in ("coasting", "velocity"))
        (coasting,), (going_on,) = (a.forward([p.detach().clone()]) for a in (acting, linear) if a)
        for _ in range(4):
            p.grad = torch.zeros_like(p)
            made.step()
        torch.testing.assert_close(coasting, p.detach(), rtol=0, atol=1e-8)
    torch.testing.assert_close(coasting, going_on, rtol=0, atol=1e-5)


NEGATED = [
    "pipedream", "pipelined_backprop", {"name": "pipelined_backprop", "spike_compensation": False}, "spectrain",
    {"name": "spectrain", "stash": True}, "pipeoptim", {"name": "xpipe", "microbatches": 2},
    {"name": "features_replay", "corrections": [{"name": "linear_prediction", "form": "coasting"}]},
]  # fmt: skip


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("spec", NEGATED, ids=str)
def test_maximizing_the_negative_loss_is_minimizing_the_loss(spec, momentum):
    """torch has turned the gradient round before it enters the momentum that predictions read."""

    def sgd(parameters, **more):
        return torch.optim.SGD(parameters, lr=0.1, momentum=momentum, weight_decay=0.01, **more)

    def negative(output, targets):
        return -torch.nn.functional.cross_entropy(output, targets)

    found = train(CASE, spec, optimizer=lambda p: sgd(p, maximize=True), loss=negative)
    compare(found.weights, train(CASE, spec, optimizer=sgd).weights, tolerance=1e-14)


def stepping(made, parts, *gradients):
    """What takes a step with these gradients, one per parameter of the optimizer."""
    parameters = [p for group in made.param_groups for p in group["params"]]

    def step():
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = torch.full_like(p, gradient)
        parts.before_step()
        made.step()
        parts.after_step()

    return step


def check_foreseen(acting, step, late, *parameters):
    """The weights that are predicted now are those after so many steps."""
    predicted = acting.forward([p.detach().clone() for p in parameters])
    for _ in range(late):
        step()
    torch.testing.assert_close(predicted, [p.detach() for p in parameters], rtol=0, atol=1e-9)


@pytest.mark.parametrize("momenta", [(0.9, 0.0), (0.0, 0.9), (0.5, 0.9)], ids=str)
@pytest.mark.parametrize("form", ["velocity", "weight"])
def test_every_parameter_group_is_predicted_with_its_own_momentum(momenta, form):
    p, q = (torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [one], "momentum": momentum} for one, momentum in zip((p, q), momenta, strict=True)]
    made = torch.optim.SGD(groups, lr=0.1)
    acting = corrections.Acting([LinearPrediction(form)], site(made, 3, p, q))
    step = stepping(made, acting, 1.0, -2.0)
    for _ in range(400):
        step()
    check_foreseen(acting, step, 3, p, q)


def test_a_prediction_loads_a_state_that_knows_no_last_gradients():
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    part: Any = LinearPrediction().at(site(torch.optim.SGD([p], lr=0.1), 3, p))
    part.load_state_dict({"change": [torch.ones(1)]})
    assert torch.equal(part.forward([p.detach().clone()])[0], p)


def test_momentum_runs_out_as_it_is_set_now_in_every_group():
    p, q = (torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    made = torch.optim.SGD([{"params": [p], "momentum": 0.9}, {"params": [q], "momentum": 0.5}], lr=0.1)
    acting = corrections.Acting([LinearPrediction("coasting")], site(made, 4, p, q))
    for _ in range(3):
        stepping(made, acting, 1.0, -2.0)()
    made.param_groups[0]["momentum"] = 0.2
    check_foreseen(acting, stepping(made, acting, 0.0, 0.0), 4, p, q)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_prediction_goes_on_with_the_learning_rate_of_now(momentum):
    """Also where the rate is another one than that of the last change: a drop of the schedule."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    made = torch.optim.SGD([p], lr=1.0, momentum=momentum)
    acting = corrections.Acting([LinearPrediction()], site(made, 3, p))
    step = stepping(made, acting, 1.0)
    for _ in range(60):
        step()
    made.param_groups[0]["lr"] = 0.1
    check_foreseen(acting, step, 3, p)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("names", [[0, 1], [1, 0]], ids=str)
def test_a_prediction_counts_with_the_rescaled_rate(momentum, names):
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    made = torch.optim.SGD([p], lr=1.0, momentum=momentum)
    both = [LinearPrediction(), Rescale()]
    acting = corrections.Acting([both[n] for n in names], site(made, 3, p))
    step = stepping(made, acting, 1.0)
    for _ in range(60):
        step()
    check_foreseen(acting, step, 3, p)


@pytest.mark.parametrize("gamma", [0.5, 0.9])
@pytest.mark.parametrize("late", [1, 3])
def test_behind_a_look_ahead_a_steady_drift_is_a_gap_of_so_many_steps(gamma, late):
    """Gradients are taken at look-ahead points, so these are compared: under a constant gradient they move alike."""
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    made = torch.optim.SGD([p], lr=1.0)
    acting = corrections.Acting(
        [corrections.make({"name": "lookahead", "gamma": gamma}), GapAware(0.5)], site(made, late, p)
    )
    step, points = stepping(made, acting, 1.0), []
    assert acting.forward is not None
    for _ in range(400):
        points.append(acting.forward([p.detach().clone()])[0])
        step()
    points.append(acting.forward([p.detach().clone()])[0])
    then = points[-1 - late].requires_grad_()
    (found,) = acting.gradients([torch.ones_like(p)], [then])
    torch.testing.assert_close(found, torch.full_like(p, 1 / (1 + late)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("names", list(itertools.permutations(range(3))), ids=str)
def test_a_look_ahead_takes_its_share_of_the_whole_step_wherever_it_is_listed(names):
    p = torch.nn.Parameter(torch.tensor([3.0, -1.0], dtype=torch.float64))
    made = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    all_three: list[Any] = ["spike_compensation", {"name": "lookahead", "gamma": 0.6}, {"name": "rescale", "anneal": 9}]
    acting = corrections.Acting([corrections.make(all_three[n]) for n in names], site(made, 3, p))
    w, v, change = p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)
    for n in range(5):
        g = 0.5 - n
        v = 0.9 * v + g
        whole = -0.1 / 3 ** (1 - min(n / 9, 1)) * (0.9**3 * v + (1 - 0.9**3) / 0.1 * g)
        change = 0.4 * whole + 0.6 * change
        w = w + change
        stepping(made, acting, g)()
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-14)


def test_motion_counts_the_decoupled_decay():
    p = torch.nn.Parameter(torch.tensor([3.0, -1.0], dtype=torch.float64))
    made = torch.optim.AdamW([p], lr=0.02, weight_decay=0.3, eps=0)
    p.grad = gradient = torch.tensor([0.5, -2.0], dtype=torch.float64)
    made.step()
    expected, before = motion(site(made, 1, p), p), p.detach().clone()
    torch.testing.assert_close(expected, 0.02 * (gradient.sign() + 0.3 * before))
    made.step()
    torch.testing.assert_close(before - p.detach(), expected)


def test_a_constant_drift_is_corrected_exactly():
    """C5, T2: w moves by c each update, so the weights of the forward were w - D c."""
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    c = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    acting: Any = Discrepancy(0.5).at(site(torch.optim.SGD([p], lr=1.0), 3, p))
    for _ in range(400):
        acting.before_step()
        with torch.no_grad():
            p.add_(c)
        acting.after_step()
        acting.settle()
    torch.testing.assert_close(acting.backward([p.detach().clone()])[0], p.detach() - 3 * c)


def test_the_rescaled_rate_is_back_before_the_scheduler_looks():
    """C5, T1; a scheduler that multiplies what it finds must not see the small rate."""
    p = torch.nn.Parameter(torch.ones(1))
    made = torch.optim.SGD([p], lr=0.8)
    schedule = torch.optim.lr_scheduler.ExponentialLR(made, 0.5)
    acting: Any = Rescale(2).at(site(made, 4, p))
    seen = []
    for _ in range(4):
        p.grad = torch.ones(1)
        acting.before_step()
        seen.append(made.param_groups[0]["lr"])
        made.step()
        acting.after_step()
        acting.settle()
        schedule.step()
    assert seen == pytest.approx([0.8 / 4, 0.4 / 2, 0.2, 0.1])
    assert Rescale(2).at(site(made, 1, p)) is None


@pytest.mark.parametrize("spec", ["spectrain", {"name": "spectrain", "stash": True}, "pipelined_backprop"], ids=str)
def test_predictions_leave_no_bit_behind(spec):
    """C7: what a pass is run with are copies; the live weights move in steps only."""
    blocks = CASE.blocks()
    seen: list[list[Any]] = [[flat(block)] for block in blocks]
    moved = []

    def optimizer(parameters):
        made = OPTIMIZERS["momentum"](parameters)
        k = next(k for k, block in enumerate(blocks) if next(block.parameters()) is parameters[0])
        made.register_step_pre_hook(lambda *_: moved.append(torch.equal(flat(blocks[k]), seen[k][-1])))
        return made

    class Watched(torch.optim.lr_scheduler.LambdaLR):
        def step(self, epoch=None):  # right behind the corrections' last hook
            super().step(epoch)
            k = next(
                k for k, b in enumerate(blocks) if next(b.parameters()) is self.optimizer.param_groups[0]["params"][0]
            )
            seen[k].append(flat(blocks[k]))

    train(CASE, spec, blocks=blocks, optimizer=optimizer, scheduler=lambda made: Watched(made, lambda n: 1.0))
    assert all(moved)
    assert len(moved) == K * len(CASE.sizes)


def test_corrections_have_state_of_their_own():
    """Two blocks never share it, and it is saved and loaded."""
    spec = {"name": "pipedream", "corrections": ["gap_aware", {"name": "rescale", "anneal": 9}, "linear_prediction"]}
    run = train(CASE, spec, optimizer=OPTIMIZERS["momentum"])
    states = [worker.steps.state_dict()["corrections"] for worker in run.trainer.workers]
    assert [len(state) for state in states] == [3, 3, 2, 0]  # nothing to do where nothing is late
    assert not torch.equal(states[0][0]["lengths"][0], states[1][0]["lengths"][0])
    saved, batches = run.trainer.state_dict(), CASE.batches()
    again = train(CASE, spec, optimizer=OPTIMIZERS["momentum"])
    again.trainer.load_state_dict(saved)
    fresh = [worker.steps.state_dict()["corrections"] for worker in again.trainer.workers]
    assert str(fresh) == str(states)
    assert batches


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "names", "reason"),
    [
        ("backprop", ["linear_prediction"], r"late gradients, and those of 'backprop' never are; leave it out"),
        ("gpipe", ["gap_aware"], "never are"),
        ("greedy_local", [{"name": "shrink", "factor": 0.5}], "never are"),
        ("features_replay", ["delay_compensation"], r"which 'features_replay' does not keep \(KeepInput\)"),
        ("petra", ["gap_aware"], "does not keep"),
        ({"name": "ddg", "mutated": True}, ["discrepancy"], "keeps its graphs over the live ones; leave it out"),
        ({"name": "ddg", "mutated": True}, ["linear_prediction"], "keeps its graphs over the live ones; leave it out"),
        ({"name": "ddg", "mutated": True}, ["gap_aware"], r"does not keep \(KeepLiveGraph\)"),
        ("pipedream", ["discrepancy"], r"which 'pipedream' keeps anyway \(KeepGraph\)"),
        ("fdg", [{"name": "shrink", "factor": 0.5}], "Shrink is there twice; give it once, or set the option of 'fdg'"),
        (
            "spectrain",
            ["linear_prediction"],
            "FromEntry and LinearPrediction each say which weights a forward runs with",
        ),
        ("pipedream", ["lookahead", "linear_prediction"], "use one of them"),
        ("pipedream", ["gap_awar"], r"unknown correction 'gap_awar'\. Did you mean 'gap_aware'\?"),
        ("pipedream", [{"name": "gap_aware", "decoy": 0.1}], "Did you mean 'decay'"),
        ("pipedream", [{"name": "gap_aware", "decay": "x"}], "option 'decay' must be float, got 'x'"),
        ("pipedream", [{"name": "rescale", "anneal": True}], "option 'anneal' must be int, got True"),
        ("pipedream", ["clip"], "correction 'clip' needs limit"),
        ("dfa", [{"name": "clip_global", "limit": 1}], "go down from block to block; those of 'dfa' do not"),
        ("pipedream", [{"name": "linear_prediction", "scale": float("nan")}], "must be a finite number, got nan"),
        ("pipedream", [{"name": "clip", "limit": float("inf")}], "must be a finite number, got inf"),
        ("pipedream", [{"name": "linear_prediction", "scale": -3}], "at least 0 times the delay ahead, got scale -3"),
        ("pipedream", [{"name": "spike_compensation", "scale": -2}], "a scale of at least 0, got -2"),
        ({"name": "dsp", "queue": True}, [], r"option 'queue' must be int \| list, got True"),
        ("pipedream", "clip", "corrections must be a list, got 'clip'"),
        ("pipedream", [{"name": "linear_prediction", "form": "quadratic"}], "no form 'quadratic'; use one of velocity"),
        ("pipedream", [{"name": "discrepancy", "decay": 1.0}], r"a decay in \[0, 1\), got 1.0"),
    ],
)
def test_nonsense_is_refused_with_the_reason(method, names, reason):
    with pytest.raises(UserError, match=reason):
        registry.make(
            {"name": method, "corrections": names} if isinstance(method, str) else method | {"corrections": names}
        )


def test_optimizers_that_a_correction_cannot_read_are_refused():
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(UserError, match=r"cannot read the momentum of RMSprop; use form: weight"):
        LinearPrediction().at(site(torch.optim.RMSprop([p]), 3, p))
    assert LinearPrediction("weight").at(site(torch.optim.RMSprop([p]), 3, p)) is not None
    with pytest.raises(UserError, match=r"written for SGD with momentum, .* got Adam; use that, or leave it out"):
        SpikeCompensation().at(site(torch.optim.Adam([p]), 3, p))
    forever = torch.optim.SGD([p], momentum=1.0)
    for part in (SpikeCompensation(), LinearPrediction("coasting")):
        with pytest.raises(UserError, match=r"needs SGD with a momentum below 1; lower it"):
            part.at(site(forever, 3, p))
    with pytest.raises((UserError, OperationError), match="spike compensation is written for SGD"):
        train(CASE, "pipelined_backprop", optimizer=OPTIMIZERS["adam"])


def test_every_correction_is_named_once():
    assert set(corrections.names()) >= {
        "clip", "clip_global", "delay_compensation", "discrepancy", "gap_aware", "linear_prediction", "lookahead",
        "rescale", "shrink", "spike_compensation",
    }  # fmt: skip
    with pytest.raises(ValueError, match="correction 'clip' is registered already"):
        corrections.named("clip")(Rescale)


# --- what a correction says of itself -----------------------------------------------------------------------------

OPTIONS = {"shrink": {"factor": 0.5}, "clip": {"limit": 1.0}, "clip_global": {"limit": 1.0}}


@pytest.mark.parametrize("delay", [0, 1, 3])
@pytest.mark.parametrize("name", corrections.names())
def test_moves_says_whether_passes_run_with_other_weights(name, delay):
    part = corrections.make({"name": name, **OPTIONS.get(name, {})})
    weight = torch.nn.Parameter(torch.ones(2))
    acting = corrections.Acting([part], site(OPTIMIZERS["momentum"]([weight]), delay, weight))
    assert part.moves(Site(0, 4, delay, (), None)) == (acting.forward is not None or acting.backward is not None)


def test_a_correction_that_only_overrides_a_pass_is_taken_to_move_weights():
    class Scaled(corrections.Correction):
        def forward(self, weights):
            return [2 * w for w in weights]

    assert Scaled().moves(Site(3, 4, 0, (), None))
    assert not corrections.Correction().moves(Site(3, 4, 0, (), None))


# method -> copies of its weights that a block's corrections keep, with momentum and without, as the cards say
KEPT = {
    "pipedream": (0, 0), "dsp": (0, 0), "adl": (0, 0),
    "pipemare": (2, 2), "async_nesterov": (1, 1), "spectrain": (0, 1), "xpipe": (0, 1), "pipeoptim": (0, 1),
    "pipelined_backprop": (0, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("momentum", [True, False])
def test_what_corrections_keep_is_told_apart(name, momentum):
    """By blocks whose gradients are late; the last block has nothing to correct."""
    case = Case(widths=(4, 5, 3, 4, 3), cuts=(1, 2), sizes=(6,) * 12)
    run = train(case, name, optimizer=OPTIMIZERS["momentum" if momentum else "sgd"])
    expected = 8 * KEPT[name][not momentum]
    for block in run.trainer.statistics()[:-1]:
        assert block.correction_bytes == expected * block.parameters
