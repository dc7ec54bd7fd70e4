"""Layers with state or randomness: BatchNorm counts every pass once, in the forward; dropout repeats in a recompute."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from decoupled.messages import Data
from decoupled.randomness import seeded
from decoupled.retention import KeepGraph, KeepInputAndWeights
from decoupled.testing import OPTIMIZERS, Case, Tap, compare, label, point, train, variants

CASE = Case(widths=(4, 5, 3), cuts=(), sizes=(12, 12, 12, 12, 12, 10))


def network():
    """Three blocks with normalisation and dropout in each of the lower two; the first layer sees the raw data."""
    with seeded(0):
        blocks = [
            nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6), nn.Dropout(0.3), nn.Tanh()),
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5)),
            nn.Sequential(nn.Linear(6, 3)),
        ]
    return [block.double() for block in blocks]


def fit(method, blocks, **options):
    return train(CASE, method, blocks=blocks, optimizer=OPTIMIZERS["momentum"], **options)


@pytest.mark.costly
@pytest.mark.parametrize("runtime", ["simulated", "threads"])
@pytest.mark.parametrize("spec", variants(), ids=label)
def test_running_statistics_move_once_per_pass_in_the_forward(spec, runtime):
    """The first layer sees nothing but data, so its statistics are known beforehand, whatever the method does (D3)."""
    expected, tap = nn.BatchNorm1d(4).double(), Tap()
    blocks = network()
    run = fit(spec, blocks, epochs=2, runtime=runtime, observers=[tap])
    passes: list[Any] = []
    for x, y, _ in CASE.batches() * 2:
        passes += point(spec).feed.passes(Data(0, batch=0, inputs=x, targets=y))
    if point(spec).selection is not None:  # what came through, and not what was only looked at
        passes = [m for e, m in tap.messages if e.target == "block0" and isinstance(m, Data)]
    for one in passes:
        expected(one.inputs)
    assert blocks[0][0].num_batches_tracked == expected.num_batches_tracked
    if not point(spec).coupling.lossy:
        assert blocks[1][1].num_batches_tracked == expected.num_batches_tracked
    if run.trainer.workers[0].upper.streams > 1:  # then it sees more than the data
        return
    torch.testing.assert_close(blocks[0][0].running_mean, expected.running_mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(blocks[0][0].running_var, expected.running_var, rtol=0, atol=1e-14)


@pytest.mark.parametrize("spec", variants(), ids=label)
def test_evaluation_changes_nothing_and_restores_the_mode(spec):
    blocks = network()
    run = fit(spec, blocks)
    state = {k: v.clone() for k, v in nn.Sequential(*blocks).state_dict().items()}
    first, second = (run.trainer.evaluate(CASE.batches()) for _ in range(2))
    assert first == second
    assert all(torch.equal(v, state[k]) for k, v in nn.Sequential(*blocks).state_dict().items())
    assert all(module.training for block in blocks for module in block.modules())


FROZEN = [spec for spec in variants() if point(spec).facts.backward_weights not in ("current", "mixed")]


@pytest.mark.costly
@pytest.mark.parametrize("spec", FROZEN, ids=label)
def test_recomputing_with_the_same_weights_is_keeping_the_graph_bit_for_bit(spec):
    """Same masks, same batch statistics, same weights: S0 == S1 with dropout and BatchNorm in the net (B4, F8)."""
    runs = []
    for retention in (KeepGraph, KeepInputAndWeights):
        blocks = network()
        run = fit(replace(point(spec), retention=retention), blocks, epochs=2)
        runs.append((run.weights, {k: v.clone() for k, v in nn.Sequential(*blocks).state_dict().items()}))
    (kept, kept_state), (recomputed, recomputed_state) = runs
    compare(kept, recomputed, tolerance=0.0)
    assert all(torch.equal(v, recomputed_state[k]) for k, v in kept_state.items())


@pytest.mark.costly
@pytest.mark.parametrize("spec", variants(), ids=label)
def test_dropout_is_drawn_from_the_seed_alone(spec, monkeypatch):
    """Same seed, same masks, whatever the global generators have been used for, which go on; another seed, others."""
    runs, accelerators, blocks = [], [], [network() for _ in range(3)]
    monkeypatch.setattr(torch.cuda, "manual_seed_all", accelerators.append)
    for seed, noise in ((1, 0), (1, 17), (2, 0)):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        runs.append(fit(spec, blocks.pop(), seed=seed).weights)
        assert torch.equal(torch.get_rng_state(), before)
    assert accelerators == [0, 17, 0]
    compare(runs[0], runs[1], tolerance=0.0)
    with pytest.raises(AssertionError, match=r"differs by|updates instead of"):  # a selection draws from the seed, too
        compare(runs[0], runs[2])
