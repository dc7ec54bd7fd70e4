"""Blocks without a gradient: their prox against a grid, what goes down, factorisation against scipy and scikit-learn,
and networks that block-ADMM trains and backpropagation cannot."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls as scipy_nnls
from sklearn.decomposition import NMF as PeerNMF
from torch import nn
from torch.nn import functional as F

from decoupled import Trainer
from decoupled import data as datasets
from decoupled.coupling import Place
from decoupled.data import Loader
from decoupled.errors import OperationError, UserError
from decoupled.messages import Data, Down, Up
from decoupled.methods.auxiliary_variables.edge import AuxiliaryVariable
from decoupled.methods.auxiliary_variables.nmf import NMF, UPDATES, nnls
from decoupled.methods.auxiliary_variables.proximal import Handed, Pull, Quantize, Sign, TopK
from decoupled.methods.auxiliary_variables.variable import Rule
from decoupled.testing import Tap

# --- closed forms -------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(x=st.floats(-3, 3), target=st.floats(-3, 3), weight=st.floats(0.01, 5))
@pytest.mark.parametrize("unit", [Sign(0.1), Sign(0.0), Quantize(4, -1, 1), Quantize(3, 0, 1, margin=0.05)], ids=str)
def test_the_prox_of_a_step_function_beats_a_fine_grid(unit, x, target, weight):
    """No allowed point (at least a margin from every threshold) of a grid of 8001 is better."""
    unit = unit.double()
    point, wanted = torch.tensor([x], dtype=torch.float64), torch.tensor([target], dtype=torch.float64)
    v = unit.prox(point, wanted, weight)

    def price(v, level):
        return (v - x) ** 2 + weight * (target - level) ** 2

    grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    allowed = ((grid[:, None] - unit.thresholds).abs() >= unit.margin).all(1)
    best = price(grid, unit(grid))[allowed].min()
    assert price(v, unit(v)) <= best + 1e-9  # v lies on the level that it was priced with
    assert ((v - unit.thresholds).abs() >= unit.margin - 1e-8).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unit", [Sign(0.0), Quantize(), Quantize(4, -90, 90, margin=1e-7)], ids=str)
def test_a_variable_is_sent_down_as_well_as_up_a_level(unit, dtype):
    """Without a margin, or one that rounds away, the point below a threshold was the threshold, on the level above."""
    unit = unit.to(dtype)
    x, target = torch.cartesian_prod(unit.levels + 0.01, unit.levels).T
    assert torch.equal(unit(unit.prox(x, target, 1e6)), target)


def test_forwards():
    assert Sign()(torch.tensor([-2.0, -0.0, 0.5])).tolist() == [-1.0, 1.0, 1.0]
    assert Quantize(3, 0, 1)(torch.tensor([-1.0, 0.2, 0.3, 0.9])).tolist() == [0.0, 0.0, 0.5, 1.0]
    assert TopK(2)(torch.tensor([[3.0, -1.0, 2.0, 0.5]])).tolist() == [[3.0, 0.0, 2.0, 0.0]]


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), weight=st.floats(0.01, 5), k=st.integers(1, 6))
def test_the_prox_of_top_k_is_never_worse_than_staying(seed, weight, k):
    draw = torch.Generator().manual_seed(seed)
    x, target = (torch.randn(4, 6, generator=draw, dtype=torch.float64) for _ in range(2))
    unit = TopK(k)

    def price(v):
        return (v - x).square().sum(1) + weight * (target - unit(v)).square().sum(1)

    assert (price(unit.prox(x, target, weight)) <= price(x) + 1e-9).all()
    torch.testing.assert_close(unit.prox(x, unit(x), weight), x)


def cheapest_top_k(x, target, weight, k):
    """Price of the argmin: of all sets of winners, each with its best lowest winner (convex: by ternary search)."""
    alone, best = (x + weight * target) / (1 + weight), torch.full((len(x),), float("inf"), dtype=x.dtype)
    for chosen in itertools.combinations(range(x.shape[1]), k):
        wins = torch.isin(torch.arange(x.shape[1]), torch.tensor(chosen))

        def price(lowest, wins=wins):
            v = torch.where(wins, torch.maximum(alone, lowest), torch.minimum(x, lowest))
            return ((v - x).square() + weight * (target - v * wins).square()).sum(1, keepdim=True)

        low = torch.full((len(x), 1), -9.0, dtype=x.dtype)
        high = -low
        for _ in range(80):
            left, right = low + (high - low) / 3, high - (high - low) / 3
            down = price(left) < price(right)
            low, high = torch.where(down, low, left), torch.where(down, right, high)
        best = torch.minimum(best, price(low).squeeze(1))
    return best


@pytest.mark.parametrize(("weight", "k"), [(0.1, 1), (0.5, 2), (2.0, 4)])
def test_the_prox_of_top_k_is_an_approximation(weight, k):
    """Between staying and the argmin: half of what there is to gain or more, and often not all."""
    draw = torch.Generator().manual_seed(0)
    x, target = (torch.randn(200, 6, generator=draw, dtype=torch.float64) for _ in range(2))
    unit, argmin = TopK(k), cheapest_top_k(x, target, weight, k)
    v = unit.prox(x, target, weight)
    found = (v - x).square().sum(1) + weight * (target - unit(v)).square().sum(1)
    stay = weight * (target - unit(x)).square().sum(1)
    assert (found >= argmin - 1e-9).all()
    assert 0.5 < float((stay - found).sum() / (stay - argmin).sum()) < 0.99
    assert 0.1 < float((found < argmin + 1e-6).double().mean()) < 0.9


@pytest.mark.parametrize("z_steps", [1, 3])
def test_what_a_proximal_block_sends_down_moves_the_variable_to_its_prox(z_steps):
    """Handed gives the target as the gradient of J, Pull makes (x - v) / (eta B) of it, the value of J is the
    penalty's."""
    rule = Rule(0.5, 4.0, 0.0, z_steps=z_steps)
    x, z = torch.tensor([[0.3, -2.0]]), torch.tensor([[-4.0, -0.5]])
    unit, lower = Sign(0.1), Handed(rule)
    y = unit(x).requires_grad_()
    lower.offer(Data(0, batch=0, share=1 / z_steps))
    lower.z, lower.u = z, torch.zeros_like(z)
    J = lower.objective(y, None)
    assert J is not None
    assert float(J.detach()) == pytest.approx(float(0.25 * (z - y.detach()).square().sum()))
    (J / z_steps).backward()
    assert y.grad is not None
    (payload,) = Pull(unit, rule).reply_with(None, x, y.detach(), (y.grad,))
    v = x - 4.0 * payload * z_steps
    torch.testing.assert_close(v, torch.tensor([[-0.1, -2.0]]))  # the first entry changes sides, the second agrees


@pytest.mark.parametrize("sweep", [False, True])
def test_the_target_has_the_dual_of_before_the_round_ends(sweep):
    """In a sweep the objective comes last, and the dual made its step before the target was taken."""
    lower, draw = Handed(Rule(0.5, 1.0, sigma=0.5)), torch.Generator().manual_seed(0)
    x, z, u, p = (torch.randn(4, 3, generator=draw) for _ in range(4))
    y = x.clone().requires_grad_()
    lower.offer(Data(0, batch=0))
    lower.z, lower.u = z, u
    lower.emit(y, None)
    if sweep:
        lower.answer((p,))
    target = lower.z + u
    J = lower.objective(y, None)
    assert J is not None
    J.backward()
    if not sweep:
        lower.answer((p,))
    assert y.grad is not None
    torch.testing.assert_close(y.grad, target)
    torch.testing.assert_close(lower.u, u + 0.5 * (lower.z - x))


# --- factorisation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_codes_are_those_of_scipy(seed):
    draw = torch.Generator().manual_seed(seed)
    z, basis = (torch.rand(n, 12, generator=draw, dtype=torch.float64) for n in (7, 5))
    expected = torch.stack([torch.from_numpy(scipy_nnls(basis.T.numpy(), row.numpy())[0]) for row in z])
    assert (expected == 0).any()
    torch.testing.assert_close(nnls(z, basis, 3000), expected, rtol=0, atol=1e-6)
    assert (nnls(z, basis, 5) >= 0).all()


@pytest.mark.parametrize("name", UPDATES)
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_an_update_of_the_basis_never_raises_the_error(name, seed):
    draw = torch.Generator().manual_seed(seed)
    z, basis, codes = (torch.rand(a, b, generator=draw, dtype=torch.float64) for a, b in ((9, 6), (3, 6), (9, 3)))
    error = [(z - codes @ basis).norm()]
    for _ in range(4):
        basis = UPDATES[name](basis, codes.T @ codes, codes.T @ z)
        assert (basis >= 0).all()
        error.append((z - codes @ basis).norm())
    assert all(after <= before + 1e-12 for before, after in zip(error, error[1:], strict=False))  # noqa: RUF007
    assert error[-1] < error[0]


@pytest.mark.parametrize("name", UPDATES)
def test_online_factorisation_comes_near_scikit_learn(name):
    """Unsupervised, in minibatches: the error of the codes on the basis within 10 % of the peer's."""
    x = datasets.load("digits").train.inputs.flatten(1)
    x = (x - x.min())[:500]
    unit = NMF(64, 8, update=name, sweeps=2)
    for _ in range(12):
        for batch in x.split(100):
            unit.fit(batch, unit(batch))
    ours = (x - unit(x) @ unit.basis).norm()
    peer = PeerNMF(8, init="nndsvda", max_iter=3000, tol=1e-3)  # pyright: ignore[reportArgumentType]
    theirs = peer.fit(x.numpy()).reconstruction_err_
    assert float(ours) <= 1.1 * theirs
    torch.testing.assert_close(unit.basis.norm(dim=1), torch.ones(8))


def test_normalising_the_basis_changes_no_product():
    """Statistics are scaled with it: another update of the same batch moves nothing once the basis is right."""
    codes, basis = torch.rand(50, 3), torch.rand(3, 6)
    x = codes @ basis
    unit = NMF(6, 3, sweeps=500)
    unit.basis.copy_(basis / 2)
    unit.fit(x, codes)
    torch.testing.assert_close(unit.basis, F.normalize(basis), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(unit.B, unit.A @ unit.basis, rtol=1e-3, atol=1e-3)


# --- training ----------------------------------------------------------------------------------------------------


def blocks_with(unit, width=48, out=48):
    torch.manual_seed(0)
    below = [nn.Flatten(), nn.Linear(64, width), *([nn.ReLU()] if unit.nonnegative else [])]
    return [nn.Sequential(*below), unit, nn.Linear(out, 10)]


def fit(blocks, method, epochs=2, runtime="simulated", **options):
    data = datasets.load("digits")
    loss, optimizer = F.cross_entropy, lambda p: torch.optim.Adam(p, lr=3e-3)
    with Trainer(blocks, method, None, loss=loss, optimizer=optimizer, runtime=runtime, **options) as trainer:
        trainer.fit(Loader(data.train, 32, shuffle=True), epochs=epochs)
        return trainer.evaluate(Loader(data.test, 360))["accuracy"]


ADMM = {"name": "block_admm", "beta": 0.01, "eta": 50.0, "sigma": 0.0}


@pytest.mark.parametrize(
    ("make", "method", "out"),
    [
        (Sign, ADMM, 48),
        (lambda: Quantize(3, -1, 1), ADMM, 48),
        (lambda: TopK(12), ADMM | {"beta": 0.1, "eta": 5.0}, 48),
        (lambda: NMF(48, 16), ADMM | {"beta": 0.1, "eta": 5.0}, 16),
    ],
    ids=["sign", "quantize", "top_k", "nmf"],
)
def test_block_admm_trains_below_a_block_that_backpropagation_does_not_pass(make, method, out):
    """The first layer learns, and the network is better than with the first layer frozen, which backpropagation is."""
    accuracies = []
    for one in (method, "backprop"):
        blocks = blocks_with(make(), out=out)
        before = blocks[0][1].weight.clone()
        accuracies.append(fit(blocks, one))
        assert torch.equal(blocks[0][1].weight, before) == (one == "backprop")
    assert accuracies[0] > 0.8
    assert accuracies[0] > accuracies[1] + 0.05


def test_threads_equal_the_simulator():
    weights = []
    for runtime in ("simulated", "threads"):
        blocks = blocks_with(NMF(48, 8), out=8)
        fit(blocks, "block_admm", 1, runtime)
        weights.append([*blocks[0].state_dict().values(), *blocks[1].state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_variables_beside_a_factorisation_stay_nonnegative():
    tap = Tap()
    fit(blocks_with(NMF(48, 8), out=8), ADMM, 1, observers=[tap])
    downs = [m for _, m in tap.messages if isinstance(m, Down)]
    ups = [m for _, m in tap.messages if isinstance(m, Up)]
    assert downs
    assert all((m.payload[0] >= 0).all() for m in ups)


# --- wrong input -------------------------------------------------------------------------------------------------


def test_a_negative_input_to_the_factorisation():
    with pytest.raises(UserError, match=r"NMF factorises what is not negative, its input goes down to -0\.25; end the"):
        NMF(3, 2)(torch.tensor([[0.5, -0.25, 1.0]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: [nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Sign()), nn.Linear(8, 10)],
            "block0 holds Sign, which has no gradient, together with other layers; cut before and after it",
        ),
        (lambda: [nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), Sign()], "block1 is Sign.*put one there"),
    ],
    ids=["mixed", "top"],
)
def test_a_block_without_a_gradient_in_the_wrong_place(make, message):
    with pytest.raises((UserError, OperationError), match=message):
        fit(make(), "block_admm", 1)


def test_a_factorisation_has_a_block_below():
    place = Place(0, 2, F.cross_entropy, ((2,), (3,)), (4,), (NMF(4, 2), nn.Linear(2, 3)))
    with pytest.raises(UserError, match=r"block0 is NMF, .*; put one there"):
        AuxiliaryVariable(Rule(1.0, 0.5)).lower(place)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NMF(0, 2), "must be at least 1"),
        (lambda: NMF(4, 2, update="hal"), "Did you mean 'hals'"),
        (lambda: Quantize(1), "give at least 2"),
        (lambda: Quantize(3, margin=0.3), "further apart than two margins"),
        (lambda: TopK(0), "at least 1"),
    ],
    ids=["rank", "update", "count", "margin", "k"],
)
def test_wrong_options_are_one_line(make, message):
    with pytest.raises(UserError, match=message):
        make()
