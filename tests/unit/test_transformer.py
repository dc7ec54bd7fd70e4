"""The Transformer: causal, replayable, trained by every kind of method, and clear about what it cannot take."""

from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled import Trainer, models
from decoupled.errors import OperationError, UserError
from decoupled.testing import Case, compare, flat, label, point, train, variants

CASE = Case(widths=(4, 5, 3), cuts=(1,), sizes=(4, 4))  # stands in where `train` asks for one


def units(dropout=0.0, **options):
    spec = {"name": "transformer", "width": 8, "depth": 2, "heads": 2, "dropout": dropout, **options}
    return [unit.double() for unit in models.build(spec, (6,), 11)]


def batches(count=4):
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(11, (count, 3, 7), generator=draw)
    return [(t[:, :-1], t[:, 1:], torch.arange(3 * n, 3 * n + 3)) for n, t in enumerate(tokens)]


def blocks(dropout=0.0):
    """Three blocks of the four units."""
    first, second, third, last = units(dropout)
    return [nn.Sequential(first), nn.Sequential(second), nn.Sequential(third, last)]


def test_shapes_and_number_of_parameters():
    made = units()
    x = batches()[0][0]
    shapes = []
    for unit in made:
        x = unit(x)
        shapes.append(tuple(x.shape))
    assert shapes == [(3, 6, 8)] * 3 + [(3, 11, 6)]
    count = [sum(p.numel() for p in unit.parameters()) for unit in made]
    block = 2 * 2 * 8 + (8 * 24 + 24) + (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8)
    assert count == [11 * 8 + 6 * 8, block, block, 2 * 8 + 8 * 11 + 11]


def test_a_position_sees_nothing_behind_it():
    network, (x, _, _) = nn.Sequential(*units()).eval(), batches()[0]
    with torch.no_grad():
        before = network(x)
        for i in range(6):
            changed = x.clone()
            changed[:, i] = (x[:, i] + 1) % 11
            moved = (network(changed) != before).any(1).any(0)
            assert moved.tolist() == [False] * i + [True] * (6 - i)


def test_attention_is_softmax_of_scaled_products():
    """Against a plain implementation with explicit masks and heads."""
    attention = cast(Any, units()[1]).attention[1]
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    query, key, value = (F.linear(x, w, b) for w, b in zip(
        attention.inward.weight.chunk(3), attention.inward.bias.chunk(3), strict=True))  # fmt: skip
    parts = []
    for head in range(2):
        q, k, v = (t[..., 4 * head : 4 * head + 4] for t in (query, key, value))
        scores = q @ k.transpose(1, 2) / 2
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
        parts.append(scores.softmax(-1) @ v)
    torch.testing.assert_close(attention(x), attention.outward(torch.cat(parts, -1)))


@pytest.mark.parametrize("spec", [s for s in variants() if set(s) == {"name"}], ids=label)
def test_every_method_either_trains_it_or_says_why_not(spec):
    try:
        run = train(CASE, spec, blocks=blocks(), batches=batches(), epochs=3)
    except (UserError, OperationError) as error:
        reason = error.__cause__ if isinstance(error, OperationError) else error
        assert isinstance(reason, UserError)
        assert "\n" not in str(reason)
        return
    moved = [not torch.equal(weights[0], weights[-1]) for weights in run.weights]
    assert moved == [bool(point(spec).facts.reach(k, len(moved))) for k in range(len(moved))]


def test_backpropagation_in_blocks_is_backpropagation():
    run = train(CASE, "backprop", blocks=blocks(), batches=batches())
    made = blocks()
    optimizer = torch.optim.SGD(nn.Sequential(*made).parameters(), lr=0.2)
    weights = [[flat(block)] for block in made]
    for x, y, _ in batches():
        optimizer.zero_grad()
        F.cross_entropy(nn.Sequential(*made)(x), y).backward()
        optimizer.step()
        for versions, block in zip(weights, made, strict=True):
            versions.append(flat(block))
    compare(run.weights, weights)


def test_dropout_is_replayed_in_a_recompute():
    specs = [{"name": "ddg", "recompute": recompute} for recompute in (False, True)]
    kept, recomputed = (train(CASE, spec, blocks=blocks(0.3), batches=batches()).weights for spec in specs)
    compare(kept, recomputed, tolerance=0.0)
    with pytest.raises(AssertionError, match="differs by"):
        compare(kept, train(CASE, specs[0], blocks=blocks(0.0), batches=batches()).weights)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ((1, 8, 8), {}, r"takes sequences of tokens \(length,\), got inputs of shape \(1, 8, 8\); use data"),
        (
            (64,),
            {"context": 32},
            "a sequence of 64 tokens does not fit the transformer's context of 32; give the model",
        ),
        ((64,), {"heads": 3}, "heads must divide the width, got 3 heads for width 128"),
        ((64,), {"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ((64,), {"depth": 0}, "transformer: depth must be an integer of at least 1, got 0"),
        ((64,), {"layers": 2}, "unknown option of model 'transformer': 'layers'"),
    ],
)
def test_what_it_cannot_be_built_with(inputs, options, message):
    with pytest.raises(UserError, match=message):
        models.build({"name": "transformer", **options}, inputs, 256)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 9, dtype=torch.int64), "a sequence of 9 tokens does not fit the transformer's context of 6"),
        (torch.zeros(3, 6), r"takes tokens \(N, length\) of type int64, got torch.float32 \(2, 6\)"),
    ],
)
def test_batches_it_cannot_take_are_one_line(x, message):
    with (
        Trainer(blocks(), "backprop", loss=F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)) as trainer,
        pytest.raises(UserError, match=message) as error,
    ):
        trainer.fit([(x, x.long())])
    assert "\n" not in str(error.value)
