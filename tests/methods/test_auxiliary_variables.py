"""Auxiliary variables: the equations written out once more, the acceptance tests of the notes, and what is stored."""

import re
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled import registry
from decoupled.errors import OperationError, UserError
from decoupled.messages import Data, Down, Up
from decoupled.methods.auxiliary_variables.variable import Rule, Variable, nonnegative_step, proximal_step, rounding
from decoupled.testing import OPTIMIZERS, Case, Tap, cases, compare, flat, train

CASE = Case(widths=(4, 5, 3, 4, 3), cuts=(1, 2, 3), sizes=(6, 6, 5))
K = CASE.K
DEFAULTS = {"beta": 0.1, "eta": 5.0, "sigma": 0.5, "rounds": 4, "sweep": False, "step": "gradient", "stored": False}
DEFAULTS |= {"z_steps": 1, "output": False}
UNSTABLE = pytest.mark.filterwarnings("ignore:block_admm")


# --- the equations, written out once more -------------------------------------------------------------------------


class Reference:
    """Z_k, U_k and the blocks, updated in plain loops from the equations at the top of the method's file.

    X_k = f_k(Z_{k-1});  J_k = beta/2 sum ||Z_k - X_k + U_k||^2 / B, no step while it is 0 up to rounding
    p_k = B dJ_{k+1}/dZ_k;  Z_k <- step(Z_k, X_k, U_k, p_k);  U_k <- U_k + sigma (Z_k - X_k)
    z_steps: so many Z steps, then one of U and one of the weights along the mean gradient
    output: Z_{K-1} too, p_{K-1} = B dloss(Z_{K-1})/dZ_{K-1}, before J_{K-1} is taken
    """

    def __init__(self, case, optimizer, **options):
        self.o = {**DEFAULTS, **options}
        self.blocks = case.blocks()
        self.K = len(self.blocks)
        self.edges = self.K if self.o["output"] and self.K > 1 else self.K - 1
        self.optimizers = [optimizer(list(block.parameters())) for block in self.blocks]
        self.weights = [[flat(block)] for block in self.blocks]
        self.rows: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in self.blocks]  # stored (Z, U), by sample

    def fit(self, batches):
        for x, y, indices in batches:
            Z, U = self.unknown(), self.unknown()
            for _ in range(self.o["rounds"]):
                moved: set[int] = set()
                for n in range(self.o["z_steps"]):
                    if self.o["stored"]:
                        Z, U = self.unknown(), self.unknown()
                    moved |= self.one(x, y, [int(i) for i in indices], Z, U, n == self.o["z_steps"] - 1)
                for k in sorted(moved):
                    self.optimizers[k].step()
                    self.optimizers[k].zero_grad()
                    self.weights[k].append(flat(self.blocks[k]))
        return self.weights

    def unknown(self) -> list[Any]:
        return [None] * self.edges

    def one(self, x, y, indices, Z, U, last):
        inputs, X, below = [], [], x
        for k, block in enumerate(self.blocks):
            inputs.append(below.detach().requires_grad_())
            X.append(block(inputs[k]))
            if k < self.edges:
                self.begin(k, X[k].detach(), indices, Z, U)
                below = Z[k]
        p: list[Any] = [None] * self.K
        moved = set()
        for k in reversed(range(self.K)):
            if self.o["sweep"] or k == self.K - 1:
                self.move(k, X, y, Z, U, p)
            J = self.objective(k, X[k], y, Z, U)
            if J is not None:
                gradients = torch.autograd.grad(J, [inputs[k], *self.blocks[k].parameters()])
                p[k - 1] = len(x) * gradients[0] if k else None
                for parameter, gradient in zip(self.blocks[k].parameters(), gradients[1:], strict=True):
                    parameter.grad = gradient / self.o["z_steps"] + (0 if parameter.grad is None else parameter.grad)
                moved.add(k)
        for k in range(self.edges):
            if not self.o["sweep"] and k < self.K - 1:
                self.move(k, X, y, Z, U, p)
            if last:
                U[k] = U[k] + self.o["sigma"] * (Z[k] - X[k].detach())
            if self.o["stored"]:
                self.rows[k] |= dict(zip(indices, zip(Z[k], U[k], strict=True), strict=True))
        return moved

    def begin(self, k, X, indices, Z, U):
        """A variable starts at the forward value, a dual at 0; stored ones go on where their samples were left."""
        if Z[k] is None:
            rows = [self.rows[k].get(i, (row, torch.zeros_like(row))) for i, row in zip(indices, X, strict=True)]
            Z[k], U[k] = (torch.stack(part) for part in zip(*rows, strict=True))

    def objective(self, k, X, y, Z, U):
        if k == self.edges:
            return F.cross_entropy(X, y)
        residual = Z[k] - X + U[k]
        square, rounding = (residual**2).sum(), (8 * 2.0**-52) ** 2 * (X.detach() ** 2).sum()
        return self.o["beta"] / 2 * square / len(X) if square > rounding else None

    def move(self, k, X, y, Z, U, p):
        if k == self.K - 1 and k < self.edges:  # the output has a variable
            z = Z[k].detach().requires_grad_()
            p[k] = len(z) * torch.autograd.grad(F.cross_entropy(z, y), z)[0]
        if k >= self.edges or p[k] is None:
            return
        beta, eta, x = self.o["beta"], self.o["eta"], X[k].detach()
        if self.o["step"] == "gradient":
            Z[k] = Z[k] - eta * (beta * (Z[k] - x + U[k]) + p[k])
        else:  # where the derivative of the quadratic with its proximal term is 0
            Z[k] = (beta * x - beta * U[k] - p[k] + Z[k] / eta) / (beta + 1 / eta)
            if self.o["step"] == "nonnegative":
                Z[k] = torch.where(Z[k] > 0, Z[k], torch.zeros_like(Z[k]))


def does_not_overshoot(options: Any) -> bool:
    """From eta beta = 2 on the step of a variable diverges, and is refused."""
    return options["beta"] * options["eta"] < 2


admm = st.fixed_dictionaries(
    {
        "beta": st.floats(0.05, 2), "eta": st.floats(0.1, 1), "sigma": st.floats(0, 1), "rounds": st.integers(1, 5),
        "sweep": st.booleans(), "step": st.sampled_from(["gradient", "proximal", "nonnegative"]),
        "z_steps": st.integers(1, 3), "output": st.booleans(), "stored": st.booleans(),
    }
)  # fmt: skip
penalty = st.fixed_dictionaries(
    {
        "beta": st.floats(0.05, 2), "eta": st.floats(0.1, 1), "rounds": st.integers(1, 3), "stored": st.booleans(),
        "sweep": st.booleans(), "step": st.sampled_from(["gradient", "proximal", "nonnegative"]),
    }
).filter(does_not_overshoot)  # fmt: skip


@UNSTABLE
@settings(max_examples=25)
@given(case=cases(batches=(1, 4)), options=admm, optimizer=st.sampled_from(sorted(OPTIMIZERS)))
def test_block_admm_follows_its_equations(case, options, optimizer):
    run = train(case, {"name": "block_admm", **options}, optimizer=OPTIMIZERS[optimizer], epochs=2)
    expected = Reference(case, OPTIMIZERS[optimizer], **options).fit(case.batches() * 2)
    compare(run.weights, expected, tolerance=1e-9)


@UNSTABLE
@settings(max_examples=25)
@given(
    case=cases(batches=(1, 4)), options=penalty, sigma=st.floats(0, 0.5), data=st.data(),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
)  # fmt: skip
def test_stored_variables_are_found_by_sample_number(case, options, sigma, optimizer, data):
    """Later visits come in other batches, some with new samples, some without old ones, some with one twice."""
    x, y, _ = (torch.cat(parts) for parts in zip(*case.batches(), strict=True))
    samples = st.lists(st.integers(0, len(x) - 1), min_size=1, max_size=2 * len(x))
    batches = [(x[i], y[i], i) for i in map(torch.tensor, data.draw(st.lists(samples, min_size=2, max_size=6)))]
    for spec in (
        {"name": "penalty", **options},
        {"name": "block_admm", **options, "sigma": sigma, "stored": True},
    ):
        run = train(case, spec, optimizer=OPTIMIZERS[optimizer], batches=batches)
        options = {**options, "stored": spec["stored"], "sigma": spec.get("sigma", 0.0)}
        expected = Reference(case, OPTIMIZERS[optimizer], **options).fit(batches)
        compare(run.weights, expected, tolerance=1e-9)


# --- acceptance tests (notes/auxiliary_variables_and_admm.md, 5) --------------------------------------------------


def backpropagation(case):
    """Of every block on the first batch: input, output, per-sample gradient at the output, gradient of the weights."""
    blocks, h, inputs, outputs = case.blocks(), case.batches()[0][0], [], []
    for block in blocks:
        inputs.append(h.detach())
        h = block(h)
        h.retain_grad()
        outputs.append(h)
    F.cross_entropy(h, case.batches()[0][1]).backward()
    per_sample = [len(h) * y.grad for y in outputs]
    return (
        inputs,
        [y.detach() for y in outputs],
        per_sample,
        [torch.cat([p.grad.flatten() for p in b.parameters()]) for b in blocks],
    )


@pytest.mark.parametrize("beta", [0.1, 1.0, 7.0])
def test_with_the_true_multiplier_local_gradients_are_those_of_backpropagation(beta):
    """1: Z = forward value and multiplier = gradient at the interface, here in scaled form U = -p / beta."""
    inputs, outputs, per_sample, expected = backpropagation(CASE)
    for k, block in enumerate(CASE.blocks()[:-1]):
        half = Variable(Rule(beta, 1.0))
        half.offer(Data(0, batch=0))
        half.z, half.u = outputs[k], -per_sample[k] / beta
        J = half.objective(block(inputs[k]), None)
        assert J is not None
        found = torch.cat([g.flatten() for g in torch.autograd.grad(J, list(block.parameters()))])
        torch.testing.assert_close(found, expected[k], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("beta", [0.5, 2.0])
@pytest.mark.parametrize("c", [1.0, 0.5])
def test_a_sweep_from_the_forward_values_is_backpropagation_times_a_power(c, beta, stored):
    """2: right to left with eta = c / beta, the gradient of block k is c**(K-1-k) times that of backpropagation."""
    *_, expected = backpropagation(CASE)
    spec = {"name": "penalty", "sweep": True, "beta": beta, "eta": c / beta, "stored": stored}
    weights = train(CASE, spec, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0)).weights
    for k in range(K):
        found = weights[k][0] - weights[k][1]
        torch.testing.assert_close(found, c ** (K - 1 - k) * expected[k], rtol=1e-9, atol=1e-12)


scalars = st.tuples(*[st.floats(-3, 3)] * 4, st.floats(0.05, 3), st.floats(0.05, 3))


@settings(max_examples=60)
@given(scalars)
@pytest.mark.parametrize(("step", "low"), [(proximal_step, -60.0), (nonnegative_step, 0.0)])
def test_closed_forms_beat_a_fine_grid(step, low, case):
    """3: no point of a grid of 20001 is better than the closed form, and the closed form is allowed."""
    z, x, u, p, beta, eta = case
    found = step(*(torch.tensor(float(v), dtype=torch.float64) for v in (z, x, u, p)), beta, eta)

    def objective(v):
        return beta / 2 * (v - x + u) ** 2 + p * v + (v - z) ** 2 / (2 * eta)

    grid = torch.linspace(low, 60, 20001, dtype=torch.float64)
    assert found >= low
    assert objective(found) <= objective(grid).min() + 1e-12
    assert torch.isclose(found, grid[objective(grid).argmin()], atol=60 / 10000)


@pytest.mark.parametrize("spec", [{"name": "block_admm", "rounds": 1}, {"name": "penalty", "stored": False}], ids=str)
def test_one_jacobi_round_moves_nothing_below_the_top(spec):
    """4: the loss has not come down yet, so blocks below do not step: no decay, no momentum, nothing."""
    run = train(CASE, spec, optimizer=OPTIMIZERS["momentum"], epochs=3)
    assert [len(weights) - 1 for weights in run.weights] == [0] * (K - 1) + [9]
    assert [s.updates for s in run.trainer.statistics()] == [0] * (K - 1) + [9]


@pytest.mark.parametrize("rounds", range(1, 7))
def test_the_loss_comes_down_by_one_block_per_round(rounds):
    run = train(CASE, {"name": "block_admm", "rounds": rounds})
    batches = len(CASE.sizes)
    assert [s.updates for s in run.trainer.statistics()] == [batches * max(0, rounds - (K - 1 - k)) for k in range(K)]


@pytest.mark.parametrize("rounds", range(1, 7))
@pytest.mark.parametrize("sweep", [False, True])
def test_labels_come_down_by_one_block_per_round(rounds, sweep):
    """Inner objectives read no labels: those of the last minibatch change a block bit for bit, or not at all."""
    spec = {"name": "block_admm", "rounds": rounds, "sweep": sweep}
    *others, (x, y, indices) = CASE.batches()
    base, other = (train(CASE, spec, batches=[*others, (x, labels, indices)]).weights for labels in (y, (y + 1) % 3))
    moved = [k for k in range(K) if not torch.equal(base[k][-1], other[k][-1])]
    assert moved == [k for k in range(K) if sweep or rounds >= K - k]


@pytest.mark.parametrize("visits", range(1, 6))
def test_stored_variables_bring_it_down_by_one_block_per_visit(visits):
    run = train(CASE, "penalty", epochs=visits)
    batches = len(CASE.sizes)
    assert [s.updates for s in run.trainer.statistics()] == [batches * max(0, visits - (K - 1 - k)) for k in range(K)]


def traffic(spec, K, epochs=1):
    """Per minibatch of each epoch: gradients that come down to every block but the last, and steps of every block."""
    case, count = Case(widths=(4,) * (K + 1), cuts=tuple(range(1, K)), sizes=(6,) * 5), 5
    tap = Tap()
    run = train(case, spec, observers=[tap], epochs=epochs)
    down = [[0] * (K - 1) for _ in range(epochs)]
    for edge, message in tap.messages:
        if isinstance(message, Down) and not message.void:
            down[message.batch // count][int(edge.target.removeprefix("block"))] += 1
    return [[n / count for n in row] for row in down], [len(versions) - 1 for versions in run.weights], count


@pytest.mark.parametrize(
    ("layer", "visit", "round"),
    [(nn.Identity, False, False), (lambda: nn.BatchNorm1d(5), True, False), (lambda: nn.Dropout(0.3), True, True)],
    ids=["plain", "batch_norm", "dropout"],
)
@pytest.mark.parametrize("name", ["penalty", "augmented_lagrangian", "block_admm"])
def test_blocks_that_do_not_repeat_their_output_step_before_the_loss_has_come_down(name, layer, visit, round):
    """In the second visit, in other batches, or the second round of a minibatch; by noise, and not by the loss."""
    torch.manual_seed(0)
    x, y = torch.randn(24, 5), torch.randint(3, (24,))
    batches = [(x[i], y[i], i) for _ in range(2) for i in torch.randperm(24).split(6)]
    for twice, spec, data in (
        (visit, {"rounds": 1, "stored": True}, batches),
        (round, {"rounds": 2, "stored": False}, batches[:4]),
    ):
        blocks = [nn.Sequential(nn.Linear(5, 5), layer(), nn.Tanh()) for _ in range(3)]
        with warnings.catch_warnings(action="ignore"):  # two rounds do not reach the lowest of four blocks
            run = train(CASE, {"name": name, **spec}, blocks=[*blocks, nn.Linear(5, 3)], batches=data)
        assert [s.updates for s in run.trainer.statistics()] == [4 * twice, 4 * twice, 4, 8]


@pytest.mark.parametrize(("depth", "rounds"), [(4, 4), (4, 6), (3, 4), (5, 5)])
def test_block_admm_sends_gradients_and_steps_from_the_round_that_its_card_says(depth, rounds):
    spec = {"name": "block_admm", "rounds": rounds}
    gradients = [rounds - (depth - 2 - k) for k in range(depth - 1)]
    assert traffic(spec, depth) == ([gradients], [5 * (rounds - (depth - 1 - k)) for k in range(depth)], 5)
    every = [[rounds] * (depth - 1)]
    assert traffic({**spec, "sweep": True}, depth) == (every, [5 * rounds] * depth, 5)
    assert traffic({**spec, "stored": True}, depth, epochs=2)[0] == [gradients, *every]
    doubled = [2 * rounds - (depth - 2 - k) for k in range(depth - 1)]
    assert traffic({**spec, "z_steps": 2}, depth)[0] == [doubled]


@pytest.mark.parametrize("name", ["penalty", "augmented_lagrangian"])
def test_stored_methods_send_gradients_from_the_visit_that_their_cards_say(name):
    down, steps, count = traffic(name, 4, epochs=5)
    assert down == [[float(visit >= 3 - k) for k in range(3)] for visit in range(1, 6)]
    assert steps == [count * (5 - (3 - k)) for k in range(4)]
    assert traffic({"name": name, "sweep": True}, 4)[0] == [[1, 1, 1]]
    assert traffic({"name": name, "rounds": 4}, 4, epochs=2)[0] == [[2, 3, 4], [4, 4, 4]]
    assert traffic({"name": name, "rounds": 4, "stored": False}, 4, epochs=2)[0] == [[2, 3, 4]] * 2


@pytest.mark.parametrize("spec", ["block_admm", "penalty", {"name": "penalty", "sweep": True}], ids=str)
def test_memory_of_a_block_does_not_depend_on_how_many_lie_above(spec):
    """5: one graph per block and nothing that grows with K - k."""
    held = []
    for blocks in (2, 3, 6):
        case = Case(widths=(4,) * (blocks + 1), cuts=tuple(range(1, blocks)), sizes=(6, 6))
        statistics = train(case, spec, epochs=2).trainer.statistics()
        held.append(statistics[0].peak_held_bytes)
        assert {s.peak_in_flight for s in statistics} == {1}
        assert len({s.peak_held_bytes for s in statistics[1:-1]}) <= 1
    assert held[0] == held[1] == held[2]


@pytest.mark.parametrize("spec", ["block_admm", "penalty"], ids=str)
def test_no_graph_crosses_and_the_variable_is_sent_before_the_block_has_run(spec):
    """5: what goes up in a later round is Z, a plain tensor, and not today's output."""
    tap = Tap()
    run = train(CASE, spec, epochs=K + 1, observers=[tap])
    ups = [m for e, m in tap.messages if isinstance(m, Up) and e.source == "block0"]
    assert all(m.payload[0].grad_fn is None and not m.payload[0].requires_grad for m in ups)
    operations = [op for actor, op, *_ in tap.operations if actor == "block0"]
    assert operations[0] == "E0"
    assert [op for op in operations if op[0] != "E"][:3] == ["F0", "B0", "S"]
    last = ups[-1]
    x = CASE.batches()[last.batch % len(CASE.sizes)][0]
    assert not torch.allclose(run.trainer.model[0](x), last.payload[0], atol=1e-6)


def test_the_loss_on_the_variable_is_reported_where_the_output_has_one():
    """Two rounds at learning rate 0, by hand: Z starts at the output and has made a step by the second."""
    case, eta = replace(CASE, sizes=(6,), cuts=(2,)), 0.5
    spec = {"name": "block_admm", "output": True, "sigma": 0.0, "rounds": 2, "eta": eta}
    run = train(case, spec, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    _, outputs, per_sample, _ = backpropagation(case)
    targets = case.batches()[0][1]
    losses = [F.cross_entropy(z, targets) for z in (outputs[-1], outputs[-1] - eta * per_sample[-1])]
    assert losses[1] < losses[0]
    assert run.history[0]["loss"] == pytest.approx(float(sum(losses) / 2))


# --- what is stored and what is kept in range ---------------------------------------------------------------------


def test_nonnegative_variables_stay_so():
    """For outputs behind a ReLU."""
    blocks = [nn.Sequential(nn.Linear(4, 5), nn.ReLU()).double(), nn.Linear(5, 3).double()]
    for step, negative in (("gradient", True), ("nonnegative", False)):
        tap = Tap()
        spec = {"name": "penalty", "step": step, "eta": 50.0, "beta": 0.01}
        train(CASE, spec, blocks=blocks, batches=CASE.batches() * 3, observers=[tap])
        assert any((m.payload[0] < 0).any() for _, m in tap.messages if isinstance(m, Up)) == negative


def test_online_variables_end_with_their_minibatch():
    """The same minibatch twice: the second time starts from the forward value again."""
    tap = Tap()
    run = train(replace(CASE, sizes=(6,)), "block_admm", epochs=2, observers=[tap], optimizer=OPTIMIZERS["sgd"])
    first_of_second = next(m for e, m in tap.messages if isinstance(m, Up) and e.source == "block0" and m.key == 4)
    assert first_of_second.round == 0
    state = run.trainer.workers[0].lower.state_dict()
    assert not any(isinstance(v, torch.Tensor) and v.numel() for v in state.values())


def test_stored_rows_cost_one_row_per_sample_and_edge():
    """Up to the room that the table grows by ahead."""
    run = train(CASE, "penalty", epochs=2)
    for k, worker in enumerate(run.trainer.workers[:-1]):
        needed = sum(CASE.sizes) * CASE.widths[CASE.cuts[k]] * 8
        assert needed <= worker.lower.held_bytes <= 1.5 * needed


def test_an_unstable_dual_step_is_warned_of():
    with pytest.warns(UserWarning, match=r"sigma 0.9 > eta\*beta 0.5 is known to be unstable"):
        train(CASE, {"name": "block_admm", "sigma": 0.9})
    with pytest.warns(UserWarning, match=r"eta\*beta = 2.5 breaks eta\*beta < 2; set eta below 4, or the variables"):
        registry.make({"name": "block_admm", "beta": 0.5})


# --- batch mode: rows in memory or in a file; residuals; what goes wrong ---------------------------------------------

BATCH = {"name": "block_admm", "stored": True, "rounds": 1}


def test_rows_in_a_file_train_as_rows_in_memory():
    """Beyond the limit the same numbers, bit for bit, and nothing held in memory; a checkpoint carries them over."""
    one = max(CASE.sizes) * 5 * 8 * 2  # a minibatch of Z and U of the widest edge
    held, mapped = (train(CASE, BATCH | {"memory": memory}, epochs=3) for memory in (1024.0, one / 2**20))
    compare(mapped.weights, held.weights, tolerance=0)
    for a, b in zip(held.trainer.workers[:-1], mapped.trainer.workers[:-1], strict=True):
        assert (a.lower.figures()["file_bytes"], b.lower.held_bytes) == (0, 0)
        assert b.lower.figures()["file_bytes"] == a.lower.held_bytes > 0
        b.lower.load_state_dict(a.lower.state_dict())
        torch.testing.assert_close(b.lower.state_dict(), a.lower.state_dict(), rtol=0, atol=0)


def test_duals_double_what_a_sample_costs():
    held = [
        [worker.lower.held_bytes for worker in train(CASE, BATCH | {"sigma": sigma}).trainer.workers[:-1]]
        for sigma in (0.0, 0.5)
    ]
    assert held[1] == [2 * n for n in held[0]]


def test_residuals_are_logged_per_edge():
    """Two rounds of a sweep on one minibatch, by hand: root mean squares over the rounds of Z - X and beta (Z' - Z)."""
    case = replace(CASE, sizes=(6,), cuts=(2,))
    spec = {"name": "block_admm", "sweep": True, "rounds": 2, "beta": 0.4, "eta": 1.0, "sigma": 0.0}
    tap = Tap()
    run = train(case, spec, observers=[tap], optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    x = backpropagation(case)[1][0]
    edge, top = (block.edge for block in run.trainer.statistics())
    p = [len(x) * m.payload[0] for _, m in tap.messages if isinstance(m, Down)]
    first = x - p[0]
    second = first - (0.4 * (first - x) + p[1])
    primal = [(first - x).square().mean(), (second - x).square().mean()]
    dual = [(0.4 * (first - x)).square().mean(), (0.4 * (second - first)).square().mean()]
    assert edge["primal"] == pytest.approx(float(sum(primal) / 2) ** 0.5)
    assert edge["dual"] == pytest.approx(float(sum(dual) / 2) ** 0.5)
    assert top == {}


def failure(spec, **options):
    with pytest.raises(OperationError) as caught:
        train(CASE, spec, **options)
    assert isinstance(caught.value.__cause__, UserError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@UNSTABLE
@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"beta": 1.0, "eta": 30.0}, r"eta\*beta = 30 breaks eta\*beta < 2; set eta below 2"),
        (
            {"beta": 1e-5, "eta": 1e4, "sigma": 1.0},
            r"sigma = 1 breaks sigma <= eta\*beta = 0.1; set sigma=0.1 or less",
        ),
        ({"beta": 1e-5, "eta": 1e5, "sigma": 0.0}, r"eta\*beta = 1 and sigma = 0 break no rule; .* set it lower"),
    ],
)
def test_a_diverging_variable_names_its_edge_and_the_broken_rule(options, rule):
    message = failure({"name": "block_admm", "rounds": 40, **options}, epochs=20, optimizer=OPTIMIZERS["adam"])
    assert re.search(rf"block\d, operation .* auxiliary variable of edge \d-\d diverges: {rule}$", message)


def test_batch_mode_wants_sample_indices():
    batches = [(x, y) for x, y, _ in CASE.batches()]
    assert "yield (inputs, targets, indices) batches" in failure(BATCH, batches=batches)
    batches = [(x, y, i - 1) for x, y, i in CASE.batches()]
    assert "sample index -1: number the samples of the data set from 0" in failure(BATCH, batches=batches)


def test_a_memory_limit_below_one_minibatch():
    message = failure(BATCH | {"memory": 2e-4})
    assert re.search(
        r"a memory limit of 0.0001 MiB cannot hold one minibatch .*6 rows of 40 bytes.*allow .* or more", message
    )


def test_no_room_for_the_file(monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    assert "No space left on device); set TMPDIR, or raise the memory limit" in failure(BATCH | {"memory": 5e-4})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_only_rounding_is_no_objective(dtype):
    """One unit in the last place is nothing in float32 and float64; more counts, in float16 also beyond its range."""
    gaps = {0.0: True, torch.finfo(dtype).eps: dtype.itemsize > 2, 0.01: False, float("nan"): False}
    for size in (1.0, 50.0):
        y = size * torch.randn(64, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
        for gap, nothing in gaps.items():
            half = Variable(Rule(1.0, 0.5))
            half.offer(Data(0, batch=0))
            half.z = (y.double() * (1 + gap)).to(dtype)
            half.u = torch.zeros_like(y)
            assert (half.objective(y, None) is None) == nothing
    assert not rounding(1.0, y, float("inf"))
