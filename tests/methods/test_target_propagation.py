"""Target propagation: an update by hand, what its way back is worth with an exact inverse and a transpose (A4, A9)."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled.coupling import Place
from decoupled.errors import UserError
from decoupled.methods.target_propagation.method import Back, Targets, dtp
from decoupled.methods.target_propagation.networks import Feedback, Noise
from decoupled.testing import Case, compare, flat, train

CASE = Case(widths=(4, 5, 4, 3), cuts=(1, 2), sizes=(6,) * 9 + (4,))
K, LR = CASE.K, 0.2
DOUBLE = torch.float64


def by_hand(name, step, noise, penultimate):
    """All blocks on clean inputs; the ways back, and the noise they learn at, as a trainer makes them."""
    spec = {"name": name, "lr": 0.0, "penultimate": penultimate}
    first = CASE.batches()[:1]
    made: Any = train(CASE, spec, batches=first, optimizer=lambda p: torch.optim.SGD(p, 0.0)).trainer.workers
    back = {k: [p.detach().clone().requires_grad_() for p in w.upper.module.parameters()] for k, w in enumerate(made)
            if w.upper.module is not None}  # fmt: skip
    draw = {k: made[k].upper._noise for k in back}
    for one in draw.values():
        one._generator.manual_seed(one._generator.initial_seed())
    blocks, moved = CASE.blocks(), []
    history = [[flat(block)] for block in blocks]
    for x, y, _ in CASE.batches():
        h = [x]
        for block in blocks:
            h.append(block(h[-1]).detach())
        e = {k: draw[k](h[k], noise) for k in back}  # before the way back draws
        out = h[-1].clone().requires_grad_()
        last = h[-2].clone().requires_grad_()
        size = len(x)
        if penultimate:
            (g,) = torch.autograd.grad(F.cross_entropy(blocks[-1](last), y), [last])
            d = {K - 2: -step * size * g}
        else:
            (g,) = torch.autograd.grad(F.cross_entropy(out, y), [out])
            d = {K - 1: -step * size * g}
        steps = {}
        for k in sorted(back, reverse=True):
            W, b = back[k]

            def G(t, W=W, b=b):
                return t @ W.T + b

            noisy = blocks[k](h[k] + e[k]).detach()
            if name == "dtp":
                lesson = ((G(noisy) - h[k] - e[k]) ** 2).mean()
            else:
                z = draw[k](h[k + 1], noise)
                along = (e[k] * (G(noisy) - G(h[k + 1]))).mean() / (e[k] ** 2).mean()
                lesson = ((z @ W.T) ** 2).mean() / (z**2).mean() - 2 * along
            steps[k] = torch.autograd.grad(lesson, [W, b], allow_unused=True)
            d[k - 1] = (d[k] @ W.T).detach()
        for k, block in enumerate(blocks):
            made_here = block(h[k])
            if k == K - 1:
                loss = F.cross_entropy(made_here, y)
            else:  # its gradient is that of the squared distance to the target
                loss = ((made_here - (h[k + 1] + d[k])) ** 2).sum() / (2 * step * size)
            with torch.no_grad():
                for p, g in zip(block.parameters(), torch.autograd.grad(loss, list(block.parameters())), strict=True):
                    p.sub_(LR * g)
            history[k].append(flat(block))
        with torch.no_grad():
            for k, gradients in steps.items():
                for p, g in zip(back[k], gradients, strict=True):
                    p.sub_(0 if g is None else LR * g)
        moved.append({k: [p.detach().clone() for p in back[k]] for k in back})
    return history, moved[-1]


@pytest.mark.parametrize("penultimate", [False, True])
@pytest.mark.parametrize("name", ["dtp", "l_drl"])
def test_every_block_follows_its_target_and_learns_its_way_back(name, penultimate):
    found = train(CASE, {"name": name, "lr": 0.0, "step": 0.7, "noise": 0.3, "penultimate": penultimate})
    history, back = by_hand(name, 0.7, 0.3, penultimate)
    compare(found.weights, history)
    for k, expected in back.items():
        torch.testing.assert_close(list(found.trainer.workers[k].upper.module.parameters()), expected)
    assert set(back) == ({1} if penultimate else {1, 2})


@pytest.mark.parametrize("name", ["dtp", "l_drl"])
def test_a_first_target_at_the_penultimate_block_makes_the_last_two_blocks_those_of_backpropagation(name):
    spec = {"name": name, "penultimate": True}
    mine, theirs = (train(CASE, one, batches=CASE.batches()[:1]).weights for one in (spec, "backprop"))
    compare(mine[-2:], theirs[-2:], 1e-15)
    assert torch.equal(mine[0][0], mine[0][1])  # the way back is zero at first
    two = Case(widths=CASE.widths, cuts=(2,), sizes=CASE.sizes)
    compare(train(two, spec).weights, train(two, "backprop").weights, 1e-13)
    compare(train(two, {**spec, "pipelined": True}).weights, train(two, "pipedream").weights, 1e-13)


def test_with_a_linear_way_back_the_length_of_the_step_does_not_matter():
    long, short = (train(CASE, {"name": "dtp", "step": step, "lr": 0.03}).weights for step in (5.0, 0.01))
    compare(long, short, 1e-12)
    long, short = (train(CASE, {"name": "dtp", "step": step, "lr": 0.03, "hidden": 6}).weights for step in (5.0, 0.01))
    assert float((long[0][-1] - short[0][-1]).abs().max()) > 1e-3


def upper(goal, W, lr=0.0) -> Any:
    """The upper half of the last of two linear blocks, y = x W^T."""
    n = len(W)
    torch.manual_seed(0)
    half = Back(Place(1, 2, F.cross_entropy, ((n,), (n,))), Targets(goal, 0.5, 0.1, 0, lr, False))
    half.module.to(DOUBLE)
    return half


def told(half, W, h, g):
    """What it sends down for the gradient `g` of the loss for the outputs, as a gradient for the inputs."""
    x = half.receive((h,), None)
    (d,) = half.reply_with(None, x, x @ W.T, (torch.cat((g, torch.zeros_like(g))),))
    return d / (-0.5 * len(h))


def angle(a, b):
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def drawn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def test_with_an_exact_inverse_what_comes_down_is_the_inverse_in_the_place_of_the_transpose():
    """A9: g W^-T, the step of Gauss and Newton; that of backpropagation, g W, only if W is orthogonal."""
    W, h, g = drawn(5, 5), drawn(7, 5, seed=2), drawn(7, 5, seed=3)
    for weights in (W, torch.linalg.qr(W).Q):
        half = upper("inverse", weights)
        half._back.layers[0].weight.data = torch.linalg.inv(weights)
        half._back.layers[0].bias.data.zero_()
        found = told(half, weights, h, g)
        torch.testing.assert_close(found, g @ torch.linalg.inv(weights).T)
        gradients = [p.grad for p in half.module.parameters()]
        torch.testing.assert_close(gradients, [torch.zeros_like(p) for p in gradients])  # nothing left to learn
        assert (angle(found, g @ weights) > 1 - 1e-12) == (weights is not W)


@pytest.mark.parametrize(("goal", "least", "most"), [("inverse", -1.0, 0.8), ("transpose", 0.99, 1.0)])
def test_the_way_back_learns_what_it_should(goal, least, most):
    """A9: with the transpose as its goal, what comes down turns into the gradient; with the inverse it does not."""
    W, g = drawn(5, 5), drawn(64, 5, seed=3)
    half = upper(goal, W)
    made = torch.optim.Adam(half.module.parameters(), 3e-2)
    batches = [drawn(64, 5, seed=seed) for seed in range(10, 20)]
    first = angle(told(half, W, batches[0], g), g @ W)
    for h in itertools.islice(itertools.cycle(batches), 600):
        made.zero_grad()
        told(half, W, h, g)
        made.step()
    found = told(half, W, batches[0], g)
    assert abs(first) < 0.7
    assert least < angle(found, g @ W) <= most
    if goal == "inverse":
        assert angle(found, g @ torch.linalg.inv(W).T) > 0.99


@pytest.mark.parametrize("hidden", [0, 6])
def test_images_and_features_go_back_to_the_shape_they_came_from(hidden):
    for outputs, inputs in (((6, 4, 4), (3, 8, 8)), ((6, 7, 5), (6, 7, 5)), ((10,), (3, 8, 8)), ((10,), (7,))):
        made = Feedback(outputs, inputs, hidden)
        assert made(torch.randn(2, *outputs)).shape == (2, *inputs)
    blocks = [
        nn.Sequential(nn.Conv2d(1, 3, 3, stride=2), nn.BatchNorm2d(3), nn.Tanh()).double(),
        nn.Sequential(nn.Conv2d(3, 2, 1), nn.Tanh()).double(),
        nn.Sequential(nn.Flatten(), nn.Linear(2 * 3 * 3, 4)).double(),
    ]
    batches = [(drawn(5, 1, 7, 7, seed=n), torch.arange(5) % 4) for n in range(4)]
    run = train(CASE, {"name": "l_drl", "hidden": hidden}, blocks=blocks, batches=batches)
    assert all(not torch.equal(versions[0], versions[-1]) for versions in run.weights)


def test_noise_is_a_part_of_what_it_is_added_to_and_can_be_saved():
    noise, x = Noise(), torch.full((100, 50), 3.0)
    state = noise.state_dict()
    first = noise(x, 0.1)
    assert float(first.std()) == pytest.approx(0.3, rel=0.05)
    assert abs(float(first.mean())) < 0.01
    second = noise(x, 0.1)
    assert not torch.equal(first, second)
    noise.load_state_dict(state)
    assert torch.equal(noise(x, 0.1), first)
    assert torch.isfinite(noise(torch.zeros(3, 2), 0.1)).all()
    for size in (1e-4, 1e4):  # whose squares float16 does not have
        half = noise(torch.full((100, 50), size, dtype=torch.float16), 0.1)
        assert half.dtype == torch.float16
        assert float(half.float().std()) == pytest.approx(0.1 * size, rel=0.05)
    seeds = {w.upper._noise._generator.initial_seed() for w in train(CASE, "l_drl").trainer.workers[1:]}  # type: ignore
    assert len(seeds) == 2


def test_ways_back_have_an_optimizer_of_their_own_unless_told_otherwise():
    for lr, kinds in ((1e-4, ["SGD", "Adam"]), (0.0, ["SGD", "SGD"])):
        run = train(CASE, {"name": "l_drl", "lr": lr},
                    scheduler=lambda made: torch.optim.lr_scheduler.StepLR(made, 100))  # fmt: skip
        first, *above = run.trainer.workers
        assert [type(made).__name__ for made in first.steps.optimizers] == ["SGD"]
        for worker in above:
            assert [type(made).__name__ for made in worker.steps.optimizers] == kinds
            assert worker.steps.optimizers[1].param_groups[0]["lr"] == (lr or LR)
            assert [s.last_epoch for s in worker.steps.schedulers] == [len(CASE.sizes)] * 2


def test_what_is_refused():
    with pytest.raises(UserError, match="step and noise must be positive, hidden and lr at least 0, got step=0, noise"):
        dtp(step=0)
    blocks = [nn.Unflatten(1, (2, 2)).double(), nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()]
    with pytest.raises(UserError, match=r"block1 maps \(2, 2\) to \(3,\); target propagation is for features or ima"):
        train(CASE, "l_drl", blocks=blocks)
