"""Optimizers that see a weight as a matrix: against AdamW and torch's Muon, and what an eigenbasis is for."""

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from decoupled.config import Recipe
from decoupled.errors import UserError
from decoupled.experiment import optimizer_for
from decoupled.optimizers import Muon, Soap
from decoupled.registry import make
from decoupled.testing import Case, compare, train

CASE = Case(widths=(4, 5, 3, 4, 3), cuts=(1, 2, 3), sizes=(6,) * 9)
ADAM = partial(torch.optim.AdamW, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
SOAP = partial(Soap, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1, frequency=1)
BOTH = pytest.mark.parametrize("optimizer", [partial(Soap, lr=0.02, frequency=3), partial(Muon, lr=0.02)])


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trajectory(make_optimizer, start, gradients):
    """The weight after every update with these gradients."""
    weight = nn.Parameter(start.clone())
    optimizer, found = make_optimizer([weight]), []
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        found.append(weight.detach().clone())
    return found


def assert_close(mine, theirs, tolerance=1e-12):
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- soap ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [SOAP, partial(Muon, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)])
def test_vectors_are_updated_as_by_adamw(other):
    gradients = draws(8, 5)
    assert_close(trajectory(other, draws(5), gradients), trajectory(ADAM, draws(5), gradients))


def test_where_rows_and_columns_are_uncorrelated_it_is_adamw():
    """Diagonal gradients, whose sizes change places: so do the columns of the bases, and the squares with them."""
    start, sizes = draws(4, 4), draws(12, 4)
    first = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    gradients = [torch.diag(size * 3 ** ((torch.arange(4) + t) % 4)) for t, size in enumerate(sizes)]
    found = trajectory(SOAP, start, [first, *gradients])
    assert torch.equal(found[0], start * (1 - 0.02 * 0.1))  # the first update only finds the bases
    assert_close(found[1:], trajectory(ADAM, found[0], gradients), 1e-6)  # zeros that were turned are 1e-17 over eps


def quadratic(make_optimizer, turn_left, turn_right, steps=40):
    """The weight on its way to the least of |A W B - C|^2, seen in another basis, and turned back."""
    A, B, C = draws(4, 4, seed=1), draws(4, 4, seed=2), draws(4, 4, seed=3)
    weight = nn.Parameter(turn_left @ draws(4, 4) @ turn_right)
    optimizer, found = make_optimizer([weight]), []
    for _ in range(steps):
        optimizer.zero_grad()
        (A @ turn_left.T @ weight @ turn_right.T @ B - C).square().sum().backward()
        optimizer.step()
        found.append((turn_left.T @ weight @ turn_right.T).detach())
    return found


def test_the_basis_that_a_weight_is_written_in_does_not_matter_to_soap():
    """What it is for: Adam goes another way in another basis, and oscillates where the two disagree."""
    straight = torch.eye(4, dtype=torch.float64)
    turned = [torch.linalg.qr(draws(4, 4, seed=seed))[0] for seed in (4, 5)]
    for optimizer, same in ((partial(Soap, lr=0.02), True), (partial(torch.optim.AdamW, lr=0.02), False)):
        mine, theirs = quadratic(optimizer, straight, straight), quadratic(optimizer, *turned)
        far = max((a - b).abs().max().item() for a, b in zip(mine, theirs, strict=True))
        assert (far < 1e-6) == same
        assert far < 1e-6 or far > 0.05


def test_bases_come_to_diagonalise_the_covariances_and_are_refreshed_when_due():
    mix = draws(6, 6, seed=7)
    weight = nn.Parameter(draws(6, 3))
    optimizer = Soap([weight], lr=0.0, betas=(0.9, 0.99), frequency=5)
    bases = []
    for gradient in draws(151, 6, 3, seed=8):
        weight.grad = mix @ gradient
        optimizer.step()
        bases.append(optimizer.state[weight]["bases"][0])
    changed = [t for t in range(1, 151) if not torch.equal(bases[t], bases[t - 1])]
    assert changed == list(range(5, 151, 5))
    covariance, U = optimizer.state[weight]["covariances"][0], bases[-1]
    torch.testing.assert_close(U.T @ U, torch.eye(6, dtype=torch.float64))
    inside = U.T @ covariance @ U
    assert (inside - torch.diag(inside.diag())).norm() < 0.05 * inside.norm()
    assert (covariance - torch.diag(covariance.diag())).norm() > 0.3 * inside.norm()  # in the basis of the weight


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (5, 5)])
def test_a_side_that_is_too_long_keeps_its_basis(monkeypatch, shape):
    """With both too long it is AdamW, and gradients are left as they are."""
    monkeypatch.setattr("decoupled.optimizers.LARGEST", 4)
    weight, unused = nn.Parameter(draws(*shape)), nn.Parameter(draws(2, 2))
    optimizer, before = SOAP([weight, unused]), unused.detach().clone()
    gradients = draws(6, *shape)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(weight.grad, gradient)
    bases = optimizer.state[weight]["bases"]
    assert [None if basis is None else len(basis) for basis in bases] == [n if n <= 4 else None for n in shape]
    assert torch.equal(unused, before)  # it had no gradient
    if shape == (5, 5):
        first = trajectory(SOAP, draws(*shape), gradients[:1])[0]
        assert_close([weight.detach()], trajectory(ADAM, first, gradients[1:])[-1:])


def test_tokens_that_never_come_break_no_basis():
    """Whole rows of the gradient are zero, in single precision: eigh fails on such a matrix as it is."""
    torch.manual_seed(0)
    embedding = nn.Embedding(512, 32)
    optimizer = Soap(embedding.parameters(), 1e-3, frequency=1)
    for _ in range(3):
        optimizer.zero_grad()
        embedding(torch.randint(512, (64,))).square().sum().backward()
        optimizer.step()
    assert embedding.weight.isfinite().all()
    left, right = optimizer.state[embedding.weight]["bases"]
    for basis in (left, right):
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis)), rtol=0, atol=1e-4)


def test_the_first_gradient_weighs_in_the_covariances_as_any_other():
    gradients, weight = draws(7, 3, 4), nn.Parameter(draws(3, 4))
    optimizer = SOAP([weight])
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    weights = [0.05 * 0.95**age for age in reversed(range(7))]
    expected = sum(w * g @ g.T for w, g in zip(weights, gradients, strict=True))
    torch.testing.assert_close(optimizer.state[weight]["covariances"][0], expected)


@pytest.mark.parametrize("value", [0.0, float("nan")])
@BOTH
def test_gradients_of_nothing_and_gradients_that_are_not_numbers(optimizer, value):
    """Zeros move nothing; NaN goes on into the weights, where the loss shows it, as with torch's optimizers."""
    weight = nn.Parameter(draws(4, 3))
    made, before = optimizer([weight]), weight.detach().clone()
    for _ in range(4):
        weight.grad = torch.full_like(weight, value)
        made.step()
    assert torch.equal(weight, before) if value == 0 else weight.isnan().all()


# --- muon ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_muon_is_torchs_on_matrices(shape):
    """torch iterates in bfloat16, whose last digit is 1/256; ours in the weight's own precision."""
    gradients, start = draws(6, *shape), draws(*shape)
    theirs = partial(torch.optim.Muon, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    mine = trajectory(partial(Muon, lr=0.1, weight_decay=0.1), start, gradients)
    for a, b, before in zip(mine, trajectory(theirs, start, gradients), [start, *mine], strict=False):
        assert (a - b).norm() < 0.06 * (a - before).norm()


def test_directions_are_nearly_orthogonal():
    weight = nn.Parameter(torch.zeros(8, 3, 2, dtype=torch.float64))  # a matrix of 8 x 6
    weight.grad = draws(8, 3, 2)
    Muon([weight], lr=1.0).step()
    values = torch.linalg.svdvals(weight.detach().flatten(1)) / (0.2 * 8**0.5)
    assert 0.6 < values.min() <= values.max() < 1.3
    assert torch.linalg.svdvals(weight.grad.flatten(1)).max() > 3 * torch.linalg.svdvals(weight.grad.flatten(1)).min()


# --- both, in trainers --------------------------------------------------------------------------------------------


@BOTH
def test_runtimes_agree_bit_for_bit(optimizer):
    runs = [train(CASE, make("pipedream"), optimizer=optimizer, runtime=r) for r in ("simulated", "threads")]
    compare(runs[0].weights, runs[1].weights, tolerance=0.0)
    assert all(not torch.equal(block[0], block[-1]) for block in runs[0].weights)


@BOTH
def test_their_state_is_saved_and_goes_on(optimizer):
    def update(weights, made, gradients):
        for gradient in gradients:
            weights[0].grad, weights[1].grad = gradient.clone(), gradient[:, 0].clone()
            made.step()

    gradients, weights = draws(9, 4, 3), [nn.Parameter(draws(4, 3)), nn.Parameter(draws(4))]
    made = optimizer(weights)
    update(weights, made, gradients[:5])
    again = [nn.Parameter(weight.detach().clone()) for weight in weights]
    other = optimizer(again)
    other.load_state_dict(deepcopy(made.state_dict()))
    update(weights, made, gradients[5:])
    update(again, other, gradients[5:])
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))


@BOTH
def test_a_closure_is_evaluated_with_gradients(optimizer):
    weight = nn.Parameter(draws(3, 3))
    made = optimizer([weight])

    def closure():
        made.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert made.step(closure) > made.step(closure) > 0 or isinstance(made, Soap)  # whose first step moves nothing


@pytest.mark.parametrize("name", ["soap", "muon"])
def test_recipes_name_them(name):
    made = optimizer_for(Recipe(optimizer=name, lr=0.003, weight_decay=0.1))([nn.Parameter(torch.zeros(2, 2))])
    assert type(made).__name__.lower() == name
    assert (made.defaults["lr"], made.defaults["weight_decay"]) == (0.003, 0.1)


def test_bad_values_are_one_line():
    with pytest.raises(UserError, match="optimizer muon: lr, eps and weight_decay must be at least 0"):
        optimizer_for(Recipe(optimizer="muon", weight_decay=-1))
    wrong: list[dict[str, Any]] = [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1e-8}]
    for options in wrong:
        with pytest.raises(ValueError, match="must be at least 0"):
            Soap([nn.Parameter(draws(2))], **options)
    with pytest.raises(ValueError, match="momentum in"):
        Muon([nn.Parameter(draws(2))], momentum=1.0)
    with pytest.raises(ValueError, match="frequency must be at least 1, got 0"):
        Soap([nn.Parameter(draws(2))], frequency=0)
    with pytest.raises(UserError, match=r"unknown optimizer 'shampoo'.*adamw.*muon.*soap"):
        optimizer_for(Recipe(optimizer="shampoo"))


@BOTH
def test_corrections_that_read_a_momentum_they_do_not_know_say_so(optimizer):
    spec = {"name": "pipedream", "corrections": ["linear_prediction"]}
    with pytest.raises(UserError, match="cannot read the momentum of"):
        train(CASE, make(spec), optimizer=optimizer)
