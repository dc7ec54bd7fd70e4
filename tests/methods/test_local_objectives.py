"""Decoupled greedy learning, PredSim and InfoPro: each step against formulas written out here, and what they refuse."""

import itertools
import math
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled import Trainer
from decoupled.errors import UserError
from decoupled.methods.local_parallelism.objectives import _zero_classifier, contrastive, similarity
from decoupled.randomness import seeded
from decoupled.testing import OPTIMIZERS, Case, compare, flat, train

CASE = Case(widths=(4, 5, 3, 4, 5, 6, 3), cuts=(1, 2, 4, 5), sizes=(6, 6, 6, 6, 5))
K = CASE.K
INNER = K - 1


def oracle(spec, objective):
    """The trajectory when inner block k steps on `objective(k, half's modules, y, x, target)` and the top on its loss.

    The initial weights of the local networks are those of the library; everything else is plain torch.
    """
    blocks, locals_ = CASE.blocks(), fresh(spec)
    made = [OPTIMIZERS["momentum"](list(m.parameters())) for m in [*blocks, *locals_]]
    weights = [[flat(block)] for block in blocks]
    for x, target, _ in CASE.batches() * 2:
        h = x
        for k, block in enumerate(blocks):
            y = block(h.detach())
            loss = F.cross_entropy(y, target) if k == INNER else objective(k, locals_[k], y, x, target)
            loss.backward()
            h = y
        for optimizer in made:
            optimizer.step()
            optimizer.zero_grad()
        for versions, block in zip(weights, blocks, strict=True):
            versions.append(flat(block))
    return weights


def fresh(spec) -> list[Any]:
    case = Case(CASE.widths, CASE.cuts, CASE.sizes[:1], CASE.seed)
    run = train(case, spec, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    return [cast(nn.Module, worker.lower.module) for worker in run.trainer.workers[:INNER]]


def check(spec, objective):
    compare(train(CASE, spec, optimizer=OPTIMIZERS["momentum"], epochs=2).weights, oracle(spec, objective))


# --- dgl ----------------------------------------------------------------------------------------------------------


def test_dgl_is_a_three_layer_classifier_per_block():
    def objective(k, head, y, x, target):
        one, two, three = (layer for layer in head.modules() if isinstance(layer, nn.Linear))
        h = (y @ one.weight.T + one.bias).clamp(min=0)
        h = (h @ two.weight.T + two.bias).clamp(min=0)
        return F.cross_entropy(h @ three.weight.T + three.bias, target)

    check("dgl", objective)


@pytest.mark.parametrize("head", ["mlp", "mlp_sr", "cnn"])
def test_dgl_is_greedy_with_its_heads(head):
    """On images, bit for bit."""
    runs = []
    for name in ("dgl", "greedy_local"):
        with seeded(0):
            blocks = images()
            x, y = torch.randn(6, 2, 8, 8), torch.randint(3, (6,))
        runs.append(train(CASE, {"name": name, "head": head}, blocks=blocks, batches=[(x, y)] * 3).weights)
    compare(*runs, tolerance=0.0)
    assert all(not torch.equal(versions[0], versions[-1]) for versions in runs[0])


def images():
    body = [nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU())]
    return [*body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))]


# --- predsim ------------------------------------------------------------------------------------------------------


def cosines(z):
    """Sample by sample, from the definition."""
    rows = [row - sum(row) / len(row) for row in z]
    return torch.stack([torch.stack([a @ b / (a.norm() * b.norm()) for b in rows]) for a in rows]).clamp(-1, 1)


def matching(linear, y, target):
    wanted = cosines(torch.eye(3, dtype=torch.float64)[target])
    return ((cosines(y @ linear.weight.T) - wanted) ** 2).mean()


def prediction(linear, y, target):
    return F.cross_entropy(y @ linear.weight.T + linear.bias, target)


def test_predsim_by_hand():
    def objective(k, parts, y, x, target):
        predict, match = (layer for layer in parts.modules() if isinstance(layer, nn.Linear))
        assert match.bias is None
        return 0.3 * prediction(predict, y, target) + 0.7 * matching(match, y, target)

    check({"name": "predsim", "beta": 0.7}, objective)


@pytest.mark.parametrize(("mode", "term"), [("pred", prediction), ("sim", matching)])
def test_predsim_with_one_term(mode, term):
    def objective(k, parts, y, x, target):
        (linear,) = (layer for layer in parts.modules() if isinstance(layer, nn.Linear))
        return term(linear, y, target)

    check({"name": "predsim", "mode": mode}, objective)


def test_predsim_without_similarity_is_prediction():
    """A11 of the notes: beta = 0 is `pred`, beta = 1 is `sim`, bit for bit."""
    for mode, beta in (("pred", 0.0), ("sim", 1.0)):
        one, other = (train(CASE, {"name": "predsim", **how}).weights for how in ({"mode": mode}, {"beta": beta}))
        compare(one, other, tolerance=0.0)


def test_the_prediction_starts_at_zero():
    for parts in fresh({"name": "predsim", "mode": "pred"}):
        assert all(not p.any() for p in parts.parameters())


@pytest.mark.parametrize(
    ("shape", "features"),
    [((4, 4, 64), 1024), ((2, 32, 32), 2048), ((8, 16, 16), 2048), ((8, 32, 32), 2048), ((16, 8, 64), 1024),
     ((3000, 2, 2), 3000), ((5,), 5)],
)  # fmt: skip
def test_images_are_pooled_for_the_prediction_only_beyond_the_bound(shape, features):
    """4 x 4 x 64 was pooled to 4 x 4 x 4."""
    predict = _zero_classifier(shape, 3)
    assert predict[-1].weight.shape == (3, features)
    assert predict(torch.randn(2, *shape)).shape == (2, 3)


def test_similarity_of_images_is_that_of_deviations_over_space():
    z = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    spread = torch.stack([torch.stack([channel.std() for channel in image]) for image in z])
    torch.testing.assert_close(similarity(z), cosines(spread))
    single = torch.randn(4, 3, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(similarity(single), cosines(single.flatten(1)))


def test_similarity_has_finite_gradients_where_features_are_constant():
    for z in (torch.zeros(3, 4), torch.zeros(3, 2, 4, 4), torch.ones(1, 1)):
        z.requires_grad_()
        similarity(z).sum().backward()
        assert z.grad is not None
        assert z.grad.isfinite().all()


# --- infopro ------------------------------------------------------------------------------------------------------


def infopro_objective(lambda1, lambda2, told):
    def objective(k, parts, y, x, target):
        decoder, one, two = (layer for layer in parts.modules() if isinstance(layer, nn.Linear))
        kept = ((y @ decoder.weight.T + decoder.bias - x) ** 2).mean()
        aimed = (y @ one.weight.T + one.bias).clamp(min=0) @ two.weight.T + two.bias
        up = k / (INNER - 1)
        return lambda1 * (1 - up) * kept + (lambda2 + (1 - lambda2) * up) * told(aimed, target)

    return objective


def pairs_by_hand(z, target):
    z = z / z.norm(dim=1, keepdim=True)
    terms = []
    for a, b in itertools.permutations(range(len(z)), 2):
        if target[a] == target[b]:
            others = sum(torch.exp(z[a] @ z[c] / 0.07) for c in range(len(z)) if c != a)
            terms.append(-torch.log(torch.exp(z[a] @ z[b] / 0.07) / others))
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("contrast", "told"), [(False, F.cross_entropy), (True, pairs_by_hand)])
def test_infopro_by_hand(contrast, told):
    spec = {"name": "infopro", "lambda1": 2.0, "lambda2": 0.25, "contrast": contrast}
    check(spec, infopro_objective(2.0, 0.25, told))


def test_infopro_without_reconstruction_is_greedy_with_its_head():
    """A11 of the notes; with one inner block its weights are lambda1 and lambda2."""
    spec = {"name": "infopro", "lambda1": 0.0, "lambda2": 1.0}
    check(spec, infopro_objective(0.0, 1.0, F.cross_entropy))
    two = Case(widths=(4, 5, 3), cuts=(1,), sizes=(6,))
    run = train(two, {"name": "infopro", "lambda1": 3.0, "lambda2": 0.25})
    half: Any = run.trainer.workers[0].lower
    assert (half._lambda1, half._lambda2) == (3.0, 0.25)


def test_pairs_of_one_class_attract():
    z = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 0, 1, 1, 1, 2])
    torch.testing.assert_close(contrastive(z, target), pairs_by_hand(z, target))
    for nobody in (z[:1], z[[0, 2, 5]]):
        alone = nobody.clone().requires_grad_()
        value = contrastive(alone, target[: len(alone)] + 10 * torch.arange(len(alone)))
        value.backward()
        assert float(value.detach()) == 0
        assert alone.grad is not None
        assert not alone.grad.any()


def test_images_are_reconstructed_from_images_and_from_features():
    x, y = torch.randn(6, 2, 9, 7), torch.randint(3, (6,))
    body = [nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), nn.ReLU()), nn.Sequential(nn.Flatten(), nn.Linear(48, 5))]
    blocks = [*body, nn.Linear(5, 3)]
    run = train(CASE, "infopro", blocks=blocks, batches=[(x, y)] * 2)
    assert all(not torch.equal(versions[0], versions[-1]) for versions in run.weights)
    decoders = [cast(Any, worker.lower)._decoder for worker in run.trainer.workers[:2]]
    assert decoders[0](torch.randn(6, 4, 4, 3)).shape == x.shape
    assert decoders[1](torch.randn(6, 5)).shape == (6, math.prod(x.shape[1:]))


# --- what they refuse ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "predsim", "beta": 1.5}, r"predsim needs a beta from 0 to 1, got 1\.5"),
        ({"name": "predsim", "mode": "prd"}, r"unknown mode 'prd'\. Did you mean 'pred'\? Known: both, pred, sim"),
        ({"name": "infopro", "lambda1": -1.0}, r"infopro needs lambda1 >= 0 and lambda2 from 0 to 1, got -1\.0 and"),
        ({"name": "infopro", "lambda2": 2.0}, "infopro needs lambda1 >= 0"),
        ({"name": "dgl", "head": "cnn"}, "head 'cnn' reads images"),
        ({"name": "interlocking", "n": 0}, "interlocking needs an n of at least 1, got 0"),
    ],
    ids=str,
)
def test_impossible_options_are_one_line(spec, message):
    with pytest.raises(UserError, match=message):
        train(CASE, spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("predsim", r"similarity matching reads features .* the block ends in \(7, 4\) and the network in \(5, 7\)"),
        ({"name": "infopro", "head": "auto"}, "inputs of type torch.int64 cannot be reconstructed"),
    ],
)
def test_sequences_are_refused_in_one_line(spec, message):
    blocks = [nn.Embedding(5, 4), nn.Sequential(nn.Linear(4, 5), _Transpose())]
    x = torch.randint(5, (3, 7))
    with (
        Trainer(blocks, spec, loss=F.cross_entropy, optimizer=OPTIMIZERS["sgd"], runtime="simulated") as trainer,
        pytest.raises(Exception, match=message),
    ):
        trainer.fit([(x, x)])


class _Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)
