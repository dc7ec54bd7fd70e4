"""Layer-parallel methods: their equations once more, signs and fixed points, filters, phases, generators, multigrid."""

import itertools
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

import decoupled
from decoupled.data import Augment, Loader, Split
from decoupled.errors import OperationError, UserError
from decoupled.messages import Down, Up
from decoupled.methods.auxiliary_variables.auxnet import generator
from decoupled.methods.auxiliary_variables.filters import Filter
from decoupled.methods.auxiliary_variables.mgrit import Multigrid
from decoupled.methods.auxiliary_variables.rule import Phases, Rule
from decoupled.randomness import seeded
from decoupled.runtime.simulated import Simulated
from decoupled.runtime.timing import Timing
from decoupled.testing import OPTIMIZERS, Case, Tap, cases, compare, flat, train

CASE = Case(widths=(4, 5, 3, 4, 3), cuts=(1, 2, 3), sizes=(6, 6, 5))
K = CASE.K


# --- the equations, written out once more -------------------------------------------------------------------------


class Reference:
    """Stages on rows of lambda and kappa in plain loops; serial epochs are backpropagation and record both.

    J_k = sum_i (beta/2 ||X - lambda||^2 + <kappa, X - lambda>) / B;  p = B dJ_{k+1}/dlambda
    lambda <- lambda - eta (p - kappa - beta (X - lambda));  kappa <- kappa + sigma beta (X - lambda)
    In a sweep, from the top, J_k is taken at the lambda that J_{k+1} has moved.
    """

    def __init__(
        self, case, optimizer, *, beta, eta, sigma=None, serial=0, parallel=1, repeat=True, warm=True, sweep=False
    ):
        self.beta, self.eta, self.sigma, self.sweep = beta, eta, sigma, sweep
        self.warm = warm and not (sweep and sigma is None)
        self.serial, self.parallel, self.repeat = serial, parallel, repeat
        self.blocks = case.blocks()
        self.K = len(self.blocks)
        self.optimizers = [optimizer(list(block.parameters())) for block in self.blocks]
        self.weights = [[flat(block)] for block in self.blocks]
        self.lam: list[dict[int, Tensor]] = [{} for _ in range(self.K - 1)]
        self.kap: list[dict[int, Tensor]] = [{} for _ in range(self.K - 1)]

    def fit(self, batches, epochs):
        cycle = self.serial + self.parallel
        for epoch in range(epochs):
            place = epoch % cycle if self.repeat else epoch
            for x, y, indices in batches:
                if place < self.serial or place >= cycle:
                    self.serial_pass(x, y, indices.tolist())
                else:
                    self.parallel_pass(x, y, indices.tolist())
        return self.weights

    def serial_pass(self, x, y, rows):
        outputs = [x]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        gradients = torch.autograd.grad(F.cross_entropy(outputs[-1], y), [*outputs[1:-1], *self.parameters()])
        for k in range(self.K - 1):
            p, X = gradients[k] * len(x), outputs[k + 1].detach()
            if self.sigma is None:
                self.lam[k] |= dict(zip(rows, X - self.eta * p if self.warm else X, strict=True))
            else:
                self.lam[k] |= dict(zip(rows, X, strict=True))
                self.kap[k] |= dict(zip(rows, p if self.warm else 0 * p, strict=True))
        self.step(range(self.K), gradients[self.K - 1 :])

    def parallel_pass(self, x, y, rows):
        inputs, X, lam, kap, below = [], [], [], [], x
        for k, block in enumerate(self.blocks):
            inputs.append(below.detach().requires_grad_())
            X.append(block(inputs[k]))
            if k < self.K - 1:
                lam.append(known(self.lam[k], rows, X[k].detach()))
                kap.append(known(self.kap[k], rows, torch.zeros_like(lam[k])))
                below = lam[k]
        learnt: dict[int, tuple[Tensor, ...]] = {}
        old = list(lam)
        new = list(lam)
        for k in reversed(range(self.K)):
            if k < self.K - 1 and k + 1 in learnt:
                p, violation = learnt[k + 1][0] * len(x), X[k].detach() - old[k]
                new[k] = old[k] - self.eta * (p - kap[k] - self.beta * violation)
            if k == self.K - 1:
                J = F.cross_entropy(X[k], y)
            else:
                violation = X[k] - (new if self.sweep else old)[k]
                J = (self.beta / 2 * violation**2 + kap[k] * violation).sum() / len(x)
                if (violation**2).sum() <= (8 * 2.0**-52) ** 2 * (X[k] ** 2).sum() and not kap[k].any():
                    continue  # 0 up to rounding
            learnt[k] = torch.autograd.grad(J, [inputs[k], *self.blocks[k].parameters()])
        for k in range(self.K - 1):
            self.lam[k] |= dict(zip(rows, new[k], strict=True))
            if self.sigma is not None:
                violation = X[k].detach() - new[k]
                if (violation**2).sum() <= (8 * 2.0**-52) ** 2 * (X[k] ** 2).sum():
                    violation = 0 * violation
                kappa = kap[k] + self.sigma * self.beta * violation
                self.kap[k] |= dict(zip(rows, kappa, strict=True))
        moved = sorted(learnt)
        self.step(moved, [gradient for k in moved for gradient in learnt[k][1:]])

    def step(self, moved, gradients):
        left = iter(gradients)
        for k in moved:
            for parameter in self.blocks[k].parameters():
                parameter.grad = next(left)
            self.optimizers[k].step()
            self.weights[k].append(flat(self.blocks[k]))

    def parameters(self):
        return [p for block in self.blocks for p in block.parameters()]


def known(table: dict[int, Tensor], rows: list[int], start: Tensor) -> Tensor:
    """Rows of a table, those that are not there from `start`."""
    found = {**dict(zip(rows, start, strict=True)), **table}
    return torch.stack([found[i] for i in rows])


numbers = {"beta": st.floats(0.05, 2), "share": st.floats(0.05, 0.9), "sigma": st.none() | st.floats(0, 1)}
cycle = {
    "serial": st.integers(0, 2), "parallel": st.integers(1, 3), "repeat": st.booleans(), "warm": st.booleans(),
    "sweep": st.booleans(),
}  # fmt: skip


def steps(options):
    """eta from its share of 1 / beta, which keeps the variable from overshooting."""
    share = options.pop("share")
    return options | {"eta": share / options["beta"]}


@pytest.mark.filterwarnings("ignore:sigma")
@settings(max_examples=25)
@given(
    case=cases(batches=(1, 4)), options=st.fixed_dictionaries(numbers | cycle), name=st.sampled_from(list(OPTIMIZERS))
)
def test_hybrid_follows_its_equations(case, options, name):
    options, optimizer = steps(options), OPTIMIZERS[name]
    epochs = options["serial"] + options["parallel"] + 2
    run = train(case, {"name": "hybrid", **options}, optimizer=optimizer, epochs=epochs)
    compare(run.weights, Reference(case, optimizer, **options).fit(case.batches(), epochs), tolerance=1e-8)


@pytest.mark.filterwarnings("ignore:sigma")
@settings(max_examples=20)
@given(case=cases(batches=(1, 4)), options=st.fixed_dictionaries(numbers), data=st.data())
def test_stored_variables_are_found_by_sample_whatever_the_batches(case, options, data):
    """Later visits come in other batches, with samples that are new, missing, or in two batches that follow."""
    options = steps(options) | {"sweep": data.draw(st.booleans())}
    x, y, _ = (torch.cat(parts) for parts in zip(*case.batches(), strict=True))
    batches = []
    for _ in range(data.draw(st.integers(2, 6))):
        count = data.draw(st.integers(1, len(x)))
        indices = torch.tensor(data.draw(st.permutations(range(len(x))))[:count])
        batches.append((x[indices], y[indices], indices))
    if options["sigma"] is None:
        spec: dict[str, Any] = {"name": "penalty"} | {k: v for k, v in options.items() if k != "sigma"}
    else:
        spec = {"name": "augmented_lagrangian"} | options
    run = train(case, spec, batches=batches, epochs=2)
    expected = Reference(case, OPTIMIZERS["sgd"], **options).fit(batches, 2)
    compare(run.weights, expected, tolerance=1e-8)


# --- signs and fixed points ---------------------------------------------------------------------------------------


def gradients(spec, epochs, **options):
    """Gradients of every block in every batch, at learning rate 0."""
    blocks = CASE.blocks()
    seen: list[list[Tensor]] = [[] for _ in blocks]

    def recording(parameters):
        made = torch.optim.SGD(parameters, lr=0.0)
        k = next(k for k, block in enumerate(blocks) if next(block.parameters()) is parameters[0])
        made.register_step_pre_hook(lambda *_: seen[k].append(torch.cat([p.grad.flatten() for p in parameters])))
        return made

    train(CASE, spec, optimizer=recording, blocks=blocks, epochs=epochs, **options)
    return seen


@pytest.mark.parametrize("beta", [0.1, 1.0, 7.0])
def test_with_the_recorded_state_and_gradient_local_gradients_are_those_of_backpropagation(beta):
    """Acceptance 1: at lambda = forward state and kappa = gradient, cosine and ratio are 1, and AL is at rest."""
    seen = gradients({"name": "hybrid", "beta": beta, "eta": 0.5 / beta, "parallel": 2}, epochs=3)
    batches = len(CASE.sizes)
    for found in seen:
        exact, first, second = found[:batches], found[batches : 2 * batches], found[2 * batches :]
        torch.testing.assert_close(first, exact, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(second, exact, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("c", [1.0, 0.5])
def test_a_warm_penalty_starts_with_the_gradient_times_eta_beta(c):
    """lambda = X - eta p, so the pull towards it is eta beta p; blocks that hear a moved neighbour are not compared."""
    seen = gradients({"name": "hybrid", "beta": 2.0, "eta": c / 2.0, "sigma": None}, epochs=2)
    batches = len(CASE.sizes)
    torch.testing.assert_close(seen[0][batches:], [c * g for g in seen[0][:batches]], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("beta", [0.25, 2.0])
@pytest.mark.parametrize("c", [1.0, 0.5])
def test_a_hybrid_that_sweeps_starts_with_backpropagation_times_a_power(c, beta):
    """Whatever beta is: X - lambda is eta p by the time it counts. The block above has seen X itself."""
    seen = gradients({"name": "hybrid", "beta": beta, "eta": c / beta, "sigma": None, "sweep": True}, epochs=2)
    batches = len(CASE.sizes)
    for k in range(K):
        exact = [c ** (K - 1 - k) * g for g in seen[k][:batches]]
        torch.testing.assert_close(seen[k][batches:], exact, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("stored", "least", "most"), [(True, 0.9, 1.0), (False, 0.2, 0.3)])
def test_a_sweep_over_stored_variables_keeps_all_blocks_busy_from_the_second_visit_on(stored, least, most):
    """Variables are sent ahead, so the answer of a pass has come when its forward is over."""
    case, tap, count = Case(widths=CASE.widths, cuts=CASE.cuts, sizes=(2,) * 40), Tap(), 40
    spec = {"name": "penalty", "sweep": True, "stored": stored}
    run = train(case, spec, epochs=2, observers=[tap], runtime=Simulated(Timing()))
    assert run.trainer.method.order.text(0, 2, 2).endswith("F0 A0 B0 S F1 A1 B1 S" if stored else "F1 A1 B1 S")
    work = [(op, start, end) for _, op, start, end in tap.operations if op[0] in "FB" and int(op[1:]) >= count]
    busy = sum(end - start for _, start, end in work)
    elapsed = max(end for *_, end in work) - min(start for _, start, _ in work)
    assert least < busy / (K * elapsed) <= most


def test_a_cold_start_has_nothing_to_learn_below_the_top_and_frozen_variables_never_have():
    """While weights stay: without the recorded gradient, and with variables that never move."""
    batches = len(CASE.sizes)
    cold = gradients({"name": "hybrid", "warm": False}, epochs=2)
    assert [len(found) for found in cold] == [batches] * (K - 1) + [2 * batches]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen = gradients({"name": "hybrid", "warm": False, "eta": 0.0, "parallel": 4}, epochs=5)
    assert [len(found) for found in frozen] == [batches] * (K - 1) + [5 * batches]


@pytest.mark.parametrize(
    ("momentum", "beta", "least", "most"), [(0.0, 0.002, 0.0, 0.002), (0.0, 1.0, 0.15, 0.35), (0.9, 0.002, 0.7, 2.0)]
)
def test_blocks_below_frozen_variables_are_pulled_back_and_their_momentum_goes_on(momentum, beta, least, most):
    """The control is no frozen block: the way of a parallel epoch over that of the serial epoch before."""
    spec = {"name": "hybrid", "eta": 0.0, "sigma": None, "warm": False, "beta": beta}
    run = train(CASE, spec, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=momentum), epochs=2)
    for w in run.weights[:-1]:
        start, recorded, end = w[:: len(CASE.sizes)]
        assert least < (end - recorded).norm() / (recorded - start).norm() < most


@pytest.mark.parametrize("beta", [0.5, 2.0])
@pytest.mark.parametrize("c", [1.0, 0.5])
def test_a_sweep_from_the_forward_values_is_backpropagation_times_a_power(c, beta):
    """Acceptance 2, for the augmented Lagrangian as for the penalty."""
    spec = {"name": "augmented_lagrangian", "sweep": True, "beta": beta, "eta": c / beta, "sigma": 0.0}
    found = gradients(spec, epochs=1)
    exact = gradients("backprop", epochs=1)
    for k in range(K):
        torch.testing.assert_close(found[k][0], c ** (K - 1 - k) * exact[k][0], rtol=1e-9, atol=1e-12)


# --- filters ------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(r=st.integers(1, 4), height=st.integers(1, 3), width=st.integers(1, 3), seed=st.integers(0, 9))
def test_filters_are_linear_maps_with_the_transpose_they_claim(r, height, width, seed):
    shape = (2, height * r, width * r)
    filter, draw = Filter(r, shape, "edge"), torch.Generator().manual_seed(seed)
    x, g = (torch.randn(3, *shape, generator=draw, dtype=torch.float64) for _ in range(2))
    small = filter.down(x)
    assert small.numel() * r * r == x.numel()
    torch.testing.assert_close((filter.up(small) * g).sum(), (small * filter.transposed(g)).sum())
    constant = torch.full_like(x, 2.5)
    torch.testing.assert_close(filter.up(filter.down(constant)), constant)  # nothing is lost of what is coarse


def test_a_filter_loses_what_is_fine_and_little_of_what_is_smooth():
    filter = Filter(2, (1, 16, 16), "edge")
    ramp = torch.linspace(0, 1, 16, dtype=torch.float64).expand(1, 1, 16, 16)
    checkers = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).double().mul(2).sub(1).expand(1, 1, 16, 16)
    error = [float((filter.up(filter.down(x)) - x).norm() / x.norm()) for x in (ramp, checkers)]
    assert error[0] < 0.05
    assert error[1] == pytest.approx(1.0)


def test_no_filter_changes_nothing():
    x = torch.randn(2, 7)
    filter = Filter(None, (7,), "edge")
    assert all(f(x) is x for f in (filter.down, filter.up, filter.transposed))


IMAGES = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.arange(12) % 3
BATCHES = [(IMAGES[i], LABELS[i], i) for i in torch.arange(12).split(4)]


def convolutions() -> list[nn.Module]:
    with seeded(0):
        return [
            nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh()).double(),
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.Tanh()).double(),
            nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double(),
        ]


@pytest.mark.parametrize("sigma", [0.5, None])
def test_a_filter_of_factor_two_sends_a_quarter_in_parallel_epochs(sigma):
    sent: dict[Any, list[int]] = {}
    for factor in (None, 2):
        tap = Tap()
        spec = {"name": "hybrid", "sigma": sigma, "downsample": factor}
        run = train(CASE, spec, blocks=convolutions(), batches=BATCHES, epochs=3, observers=[tap])
        sent[factor] = [
            sum(m.nbytes for _, m in tap.messages if isinstance(m, kind) and 3 * epoch <= m.batch < 3 * epoch + 3)
            for epoch in range(2) for kind in (Up, Down)
        ]  # fmt: skip
        held = [worker.lower.held_bytes for worker in run.trainer.workers[:-1]]
        sent[factor] += held
    serial, parallel, held = (slice(0, 2), slice(2, 4), slice(4, 6))
    assert sent[2][serial] == sent[None][serial]
    assert [4 * b for b in sent[2][parallel]] == sent[None][parallel] == sent[None][serial]
    assert [4 * b for b in sent[2][held]] == sent[None][held]


def test_through_a_filter_the_top_follows_autograd_on_what_it_is_fed_and_the_bottom_the_filtered_multiplier():
    """Local gradients of the first parallel epoch, by autograd on D, U and the recorded state."""
    blocks, x, y = convolutions(), IMAGES, LABELS
    X = [blocks[0](x)]
    leaf = X[0].detach().requires_grad_()
    p = torch.autograd.grad(F.cross_entropy(blocks[2](blocks[1](leaf)), y), leaf)[0]
    filter = Filter(2, (3, 8, 8), "edge")
    small = filter.down(X[0])
    kappa = torch.autograd.grad(filter.up(mu := small.detach().requires_grad_()), mu, p)[0]
    expected = torch.autograd.grad((kappa * small).sum(), list(blocks[0].parameters()))
    seen = []

    def recording(parameters):
        made = torch.optim.SGD(parameters, lr=0.0)
        if parameters[0] is next(blocks[0].parameters()):
            made.register_step_pre_hook(lambda *_: seen.append([p.grad.clone() for p in parameters]))
        return made

    spec = {"name": "hybrid", "downsample": 2}
    train(CASE, spec, blocks=blocks, batches=[(x, y, torch.arange(12))], optimizer=recording, epochs=2)
    torch.testing.assert_close(seen[1], list(expected), rtol=1e-9, atol=1e-12)


def test_shapes_that_a_filter_cannot_divide_are_one_clear_line():
    for shape, factor in (((3, 7, 8), 2), ((5,), 2), ((3, 8, 8), 3)):
        with pytest.raises(UserError, match=rf"edge block1 -> block2: a filter of factor {factor} cannot divide"):
            Filter(factor, shape, "edge block1 -> block2")
    with pytest.raises(UserError, match=r"edge block0 -> block1: .* shape \(5,\); cut the network where"):
        train(CASE, {"name": "penalty", "downsample": 2})
    with pytest.raises(UserError, match="downsample must be at least 1"):
        Filter(0, (1, 4, 4), "edge")


# --- phases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phases", "what", "draws"),
    [
        (Phases(1, 2, True), "sppsppspp", [0, 0, 0, 3, 3, 3, 6, 6, 6]),
        (Phases(2, 1, True), "sspsspssp", [0, 1, 1, 3, 4, 4, 6, 7, 7]),
        (Phases(1, 3, False), "spppsssss", [0, 0, 0, 0, 4, 5, 6, 7, 8]),
        (Phases(0, 1, True), "ppppppppp", [0] * 9),
    ],
)
def test_phases_say_which_epochs_are_serial_and_which_images_they_see(phases, what, draws):
    assert "".join("s" if phases.serial_at(e) else "p" for e in range(9)) == what
    assert [phases.draw(e) for e in range(9)] == draws
    assert [phases.records(e) for e in range(8)] == [what[e : e + 2] == "sp" for e in range(8)]


@pytest.mark.parametrize(
    ("spec", "draws"),
    [
        ("backprop", [0, 1, 2, 3, 4]),
        ({"name": "hybrid", "parallel": 2}, [0, 0, 0, 3, 3]),
        ("penalty", [0] * 5),
        ({"name": "penalty", "stored": False, "rounds": 3}, [0, 1, 2, 3, 4]),
        ("auxnet", [0, 1, 2, 3, 4]),
    ],
    ids=str,
)
def test_a_sample_looks_the_same_while_something_is_kept_for_it(spec, draws):
    """Epochs differ in their order always, in the images only where the method says so."""
    split = Split(IMAGES.float(), LABELS)

    def images(loader):
        batches = list(loader)
        indices, inputs = (torch.cat([getattr(b, name) for b in batches]) for name in ("indices", "inputs"))
        return inputs[indices.argsort()]

    seen = []

    class Spy(Loader):
        def __iter__(self):
            batches = list(super().__iter__())
            seen.append(images(batches))
            return iter(batches)

    def loader(kind):
        return kind(split, 4, shuffle=True, augment=Augment(padding=2, flip=True))

    spying: Any = loader(Spy)
    train(CASE, spec, blocks=[b.float() for b in convolutions()], batches=spying, epochs=5)
    for found, draw in zip(seen, draws, strict=True):
        plain = loader(Loader)
        plain.set_draw(draw)
        assert torch.equal(found, images(plain))


def test_a_pass_that_is_dropped_leaves_the_records_of_others_alone():
    """What came down for the pass behind a dropped one was once recorded for the rows of the dropped one."""
    blocks = [nn.Linear(3, 4), nn.Linear(4, 2)]
    batches = [(torch.randn(4, 3), torch.randint(2, (4,)), torch.arange(4 * i, 4 * i + 4)) for i in range(3)]
    batches[1][0].fill_(float("nan"))
    with decoupled.Trainer(
        blocks, {"name": "hybrid", "beta": 1.0, "eta": 0.1, "sigma": 0.1}, loss=F.cross_entropy, runtime="simulated",
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0), on_nonfinite="skip",
    ) as trainer:  # fmt: skip
        trainer.fit(batches)
        lower: Any = trainer.workers[0].lower
    assert [lower._lam.know(indices) for _, _, indices in batches] == [True, False, True]
    for x, _, indices in (batches[0], batches[2]):
        assert torch.equal(lower._lam.get(indices), blocks[0](x))


def test_serial_epochs_are_backpropagation_and_optimizers_go_on_across_the_switch():
    spec = {"name": "hybrid", "serial": 2, "parallel": 1, "repeat": False}
    found = train(CASE, spec, optimizer=OPTIMIZERS["adam"], epochs=2).weights
    compare(found, train(CASE, "backprop", optimizer=OPTIMIZERS["adam"], epochs=2).weights)
    run = train(CASE, spec, optimizer=OPTIMIZERS["adam"], epochs=4)
    steps = [int(next(iter(w.steps.optimizers[0].state.values()))["step"]) for w in run.trainer.workers]
    assert steps == [4 * len(CASE.sizes)] * K


@pytest.mark.parametrize(("repeated", "early"), [(False, 3), (True, 1)])
def test_variables_are_sent_ahead_unless_an_earlier_pass_will_still_move_them(repeated, early):
    """In the second epoch the variables of three passes are sent before the first answer has come."""
    tap, batches = Tap(), [CASE.batches()[0]] * 3 if repeated else CASE.batches()
    run = train(CASE, "penalty", batches=batches, epochs=2, observers=[tap], runtime=Simulated(Timing()))
    assert run.trainer.method.order.text(0, K, 3) == "E0 E1 E2 F0 B0 S A0 F1 B1 S A1 F2 B2 S A2"
    seen = [type(m) for e, m in tap.messages if "block0" in (e.source, e.target) and m.key in (3, 4, 5)]
    assert seen[: seen.index(Down)].count(Up) == early
    assert (seen.count(Up), seen.count(Down)) == (3, 3)


def network_with_batch_norm() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 3)),
    ]


def test_statistics_of_batch_norm_can_be_estimated_again_before_a_test():
    """Acceptance 9: in parallel epochs upper stages see lambda; torch's `update_bn` on the model puts that right."""
    batches = [(x.float(), y, i) for x, y, i in BATCHES]
    run = train(CASE, {"name": "hybrid", "parallel": 2}, blocks=network_with_batch_norm(), batches=batches, epochs=3)
    model: Any = run.trainer.model
    before = run.trainer.evaluate(batches)
    update_bn(batches, model)
    after = run.trainer.evaluate(batches)
    assert before != after
    hidden = torch.cat([model[0][0](x) for x, *_ in batches])
    norm = model[0][1]
    torch.testing.assert_close(norm.running_mean, hidden.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"sigma": None, "sweep": True}], ids=str)
def test_threads_and_processes_agree_with_the_simulator_across_phases(more):
    spec = {"name": "hybrid", "parallel": 2, "downsample": 2} | more
    found = []
    for runtime in ("simulated", "threads", {"name": "processes", "processes": 2}):
        blocks = convolutions()
        with decoupled.Trainer(
            blocks, spec, loss=F.cross_entropy, optimizer=OPTIMIZERS["momentum"], runtime=runtime
        ) as trainer:
            trainer.fit(BATCHES, epochs=5)
            found.append(torch.cat([flat(block) for block in trainer.model]))
    assert all(torch.equal(found[0], other) for other in found[1:])


# --- bad input ----------------------------------------------------------------------------------------------------


def test_a_step_that_diverges_says_which_edge_which_rule_and_what_to_set():
    with pytest.raises(UserError, match=r"eta\*beta = 2: from 2 on the variable diverges; set eta below 4"):
        Rule(0.5, 4.0)
    with pytest.warns(
        UserWarning, match=r"sigma 0.9 > eta\*beta 0.5 is known to be unstable; set sigma to 0.5 or less"
    ):
        Rule(0.1, 5.0, 0.9)
    line = (
        r"the loss is (inf|nan); edge block0 -> block1: beta=100000, eta\*beta=0.1; known to be stable are "
        r"sigma <= eta\*beta and eta\*beta in \[0.1, 0.5\]: set beta=10000, or lower the learning rate"
    )
    linear: list[nn.Module] = [nn.Linear(4, 5).double(), nn.Linear(5, 3).double()]
    with pytest.raises(OperationError, match=line):
        train(CASE, {"name": "penalty", "beta": 1e5, "eta": 1e-6}, blocks=linear, epochs=200)


def test_other_impossible_options_are_one_line_too():
    for spec, line in {
        "beta": ({"name": "hybrid", "beta": 0.0}, "beta must be positive"),
        "eta": ({"name": "penalty", "eta": -1.0}, "eta must be positive, or 0"),
        "sigma": ({"name": "augmented_lagrangian", "sigma": 1.5}, r"sigma must lie in \[0, 1\]"),
        "cycle": ({"name": "hybrid", "parallel": 0}, "at least 0 serial and 1 parallel epochs, got 1 and 0"),
        "width": ({"name": "auxnet", "width": 0}, "width of the generators must be at least 1"),
    }.values():
        with pytest.raises(UserError, match=line):
            train(CASE, spec)
    without = [(x, y) for x, y, _ in CASE.batches()]
    with pytest.raises(OperationError, match="addressed by sample: yield"):
        train(CASE, "hybrid", batches=without)


# --- generators ---------------------------------------------------------------------------------------------------


def test_auxnet_follows_its_equations():
    """One batch, learning rate 1: every block fits the generated variable, every generator moves by eta g."""
    x, y, _ = CASE.batches()[0]
    beta, eta = 0.5, 0.8
    sgd: dict[str, Any] = {"optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}
    start = train(CASE, {"name": "auxnet"}, batches=CASE.batches()[:1], optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    nets = [worker.lower.module for worker in start.trainer.workers[:-1]]
    run = train(CASE, {"name": "auxnet", "beta": beta, "eta": eta}, batches=CASE.batches()[:1], **sgd)
    blocks = CASE.blocks()
    lam = [net(x) for net in nets if net is not None]
    inputs = [x, *(one.detach().requires_grad_() for one in lam)]
    X = [block(given) for block, given in zip(blocks, inputs, strict=True)]
    J = [beta / 2 * (X[k] - lam[k].detach()).square().sum() / len(x) for k in range(K - 1)] + [
        F.cross_entropy(X[-1], y)
    ]
    for k, block in enumerate(blocks):
        found = torch.autograd.grad(J[k], list(block.parameters()), retain_graph=True)
        expected = torch.cat([(p - g).detach().flatten() for p, g in zip(block.parameters(), found, strict=True)])
        torch.testing.assert_close(run.weights[k][-1], expected, rtol=1e-9, atol=1e-12)
    for k, net in enumerate(n for n in nets if n is not None):
        p = torch.autograd.grad(J[k + 1], inputs[k + 1])[0] * len(x)
        g = (p - beta * (X[k] - lam[k])).detach()
        found = torch.autograd.grad((eta * g * lam[k]).sum() / len(x), list(net.parameters()))
        after = run.trainer.workers[k].lower.module
        assert after is not None
        for parameter, old, gradient in zip(after.parameters(), net.parameters(), found, strict=True):
            torch.testing.assert_close(parameter, old - gradient, rtol=1e-9, atol=1e-12)


def test_auxnet_unlocks_the_forward():
    """The top block runs its first forward while the bottom one, a hundred times slower, is at its own."""
    tap = Tap()
    train(CASE, "auxnet", observers=[tap], runtime=Simulated(Timing(slow={0: 100.0})))
    begun = {(actor, op): (start, end) for actor, op, start, end in tap.operations}
    assert all(begun[f"block{k}", "F0"][0] < begun["block0", "F0"][1] for k in (1,))
    locked = Tap()
    train(CASE, "backprop", observers=[locked], runtime=Simulated(Timing(slow={0: 100.0})))
    begun = {(actor, op): (start, end) for actor, op, start, end in locked.operations}
    assert begun["block1", "F0"][0] >= begun["block0", "F0"][1]


@pytest.mark.parametrize("edge", [(4, 28, 28), (8, 14, 14), (3, 4, 4), (10,)])
def test_generators_have_the_shape_of_the_edge_and_stay_small(edge):
    net = generator((1, 28, 28), edge, 6)
    assert net(torch.randn(2, 1, 28, 28)).shape == (2, *edge)
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) <= 4
    with pytest.raises(UserError, match="cut where sides are halved"):
        generator((1, 28, 28), (4, 20, 20), 6)


def test_auxnet_refuses_tokens():
    blocks: list[nn.Module] = [nn.Sequential(nn.Embedding(5, 4), nn.Flatten()), nn.Linear(12, 2)]
    batches = [(torch.randint(5, (6, 3)), torch.randint(2, (6,)), torch.arange(6))]
    with pytest.raises(OperationError, match="not from tokens"):
        train(CASE, "auxnet", blocks=blocks, batches=batches)


# --- multigrid in layers ------------------------------------------------------------------------------------------


def functions(layers=16):
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double() for _ in range(layers)]


def solved(layers, network):
    """Output and all gradients, of the input first, in one vector each."""
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = network(x)
    weights = [p for layer in layers for p in layer.parameters()]
    return y.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(y.square().sum(), [x, *weights])])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("relax", "enough"), [(True, 2), (False, 4)])
def test_multigrid_is_exact_after_as_many_iterations_as_there_are_intervals_or_half(relax, enough, threads):
    """Forward and gradient; before that they are not, and every iteration comes closer."""
    layers, errors = functions(), []
    for count in range(1, enough + 1):
        solver = Multigrid(layers, 4, 0.25, count, count, relax, threads)
        (y, g), (exact_y, exact_g) = solved(layers, solver), solved(layers, solver.serial)
        errors.append([float((a - b).norm() / b.norm()) for a, b in ((y, exact_y), (g, exact_g))])
        assert len(solver.residuals) == count
    assert all(max(late) < min(early) for early, late in itertools.pairwise(errors))
    assert max(errors[-1]) < 1e-12
    assert min(errors[0]) > 1e-2


def test_one_interval_per_layer_is_serial_propagation_at_once():
    layers = functions(3)
    solver = Multigrid(layers, coarsening=1, h=0.5)
    for found, exact in zip(solved(layers, solver), solved(layers, solver.serial), strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


def test_multigrid_trains_as_a_unit_of_any_network():
    torch.manual_seed(0)
    units = [
        nn.Linear(4, 6),
        Multigrid([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(8)], 4, 0.25),
        nn.Linear(6, 3),
    ]
    x, y = torch.randn(64, 4), torch.randint(3, (64,))
    given: Any = {"loss": F.cross_entropy, "optimizer": lambda p: torch.optim.Adam(p, lr=0.03)}
    with decoupled.Trainer(nn.Sequential(*units), "backprop", blocks=[1], **given) as trainer:
        losses = [row["loss"] for row in trainer.fit([(x, y)], epochs=40)]
    assert losses[-1] < 0.9 * losses[0]


def test_multigrid_refuses_what_it_cannot_solve():
    layers: list[nn.Module] = [nn.Linear(2, 2) for _ in range(6)]
    with pytest.raises(UserError, match="6 layers are no multiple of coarsening=4"):
        Multigrid(layers, 4)
    with pytest.raises(UserError, match="BatchNorm1d does not do the same each time; use GroupNorm"):
        Multigrid([nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))], 1)
    with pytest.raises(UserError, match="must be at least 1"):
        Multigrid(layers, 2, iterations=0)


def test_a_small_multiplier_counts_where_the_violation_is_only_rounding():
    """Before any answer there is nothing to fit; a recorded gradient is exact, however small."""
    rule = Rule(100.0, 0.004, sigma=0.1)
    y = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    lam = y * (1 + torch.finfo(y.dtype).eps)
    for kap, nothing in ((None, True), (torch.zeros_like(y), True), (torch.full_like(y, 1e-5), False)):
        assert (rule.objective(y, lam, kap, rule.gradient(y, lam, kap)) is None) == nothing
    nan = torch.full_like(y, float("nan"))
    assert rule.objective(y, y, nan, rule.gradient(y, y, nan)) is not None


def test_blocks_that_have_heard_nothing_take_no_step_in_float32():
    """Other batches round a sample's output otherwise; kappa collected that, and Adam made whole steps of it."""
    depth, count, size = 5, 50, 8
    torch.manual_seed(0)
    x, y = torch.randn(count, 8), torch.randint(3, (count,))
    batches = [[(x[i], y[i], i) for i in torch.randperm(count).split(size)] for _ in range(depth)]
    for name, optimizer in itertools.product(("penalty", "augmented_lagrangian"), ("adam", "momentum")):
        torch.manual_seed(1)
        blocks = [nn.Sequential(nn.Linear(8 if k == 0 else 16, 16), nn.Tanh()) for k in range(depth - 1)]
        blocks.append(nn.Sequential(nn.Linear(16, 3)))
        given: Any = {"loss": F.cross_entropy, "optimizer": OPTIMIZERS[optimizer], "runtime": "simulated"}
        with decoupled.Trainer(blocks, name, **given) as trainer:
            before = [flat(block) for block in trainer.model]
            for visit in range(1, depth + 1):
                trainer.fit(batches[visit - 1])
                updates = [len(batches[0]) * max(0, visit - (depth - 1 - k)) for k in range(depth)]
                assert [block.updates for block in trainer.statistics()] == updates
                same = [torch.equal(flat(block), old) for block, old in zip(trainer.model, before, strict=True)]
                assert same == [n == 0 for n in updates]
