"""Every registered method with its blocks on one GPU: the same weights as on the CPU, after every update."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled.testing import OPTIMIZERS, Case, Run, compare, label, point, train, variants
from decoupled.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CASE = Case(widths=(4, 5, 3, 4, 5, 3), cuts=(1, 2, 4), sizes=(6,) * 7 + (5,))
GPU = ["cuda:0"]
FIXED = [spec for spec in variants() if point(spec).fixed]
NAMES = [spec for spec in FIXED if set(spec) == {"name"}]


def on(device: list[str], spec: Any, runtime: str) -> Run:
    return train(CASE, spec, optimizer=OPTIMIZERS["momentum"], epochs=2, runtime=runtime, devices=device)


def weights(run: Run) -> list[list[torch.Tensor]]:
    return [[vector.cpu() for vector in block] for block in run.weights]


@pytest.mark.parametrize("spec", variants(), ids=label)
def test_a_gpu_computes_what_the_cpu_computes(spec: Any) -> None:
    gpu = on(GPU, spec, "simulated")
    assert all(vector.is_cuda for block in gpu.weights for vector in block)
    compare(weights(gpu), weights(on(["cpu"], spec, "simulated")), tolerance=1e-9)


@pytest.mark.parametrize("spec", FIXED, ids=label)
def test_streams_compute_what_one_thread_computes(spec: Any) -> None:
    compare(weights(on(GPU, spec, "threads")), weights(on(GPU, spec, "simulated")), tolerance=1e-9)


DRAW = torch.Generator().manual_seed(0)
BATCHES = [
    (torch.randn(8, 4, generator=DRAW), torch.randint(3, (8,), generator=DRAW), torch.arange(8 * n, 8 * n + 8))
    for n in range(6)
]


def trainer(spec: Any, **options: Any) -> Trainer:
    """Three blocks with dropout and running statistics."""
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3)),
        nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.3)),
        nn.Linear(16, 3),
    ]
    given: dict[str, Any] = {"loss": F.cross_entropy, "optimizer": OPTIMIZERS["momentum"], "devices": GPU}
    return Trainer(blocks, spec, **given | options)


@pytest.mark.parametrize("spec", NAMES, ids=label)
def test_a_run_goes_on_where_it_was_saved(spec: Any) -> None:
    """With dropout, whose generator lives on the GPU."""
    with trainer(spec, runtime="threads") as whole:
        whole.fit(BATCHES, epochs=1)
        state = copy.deepcopy(whole.state_dict())
        expected = whole.fit(BATCHES, epochs=1)[-1]["loss"]
    with trainer(spec, runtime="threads") as resumed:
        resumed.load_state_dict(state)
        found = resumed.fit(BATCHES, epochs=1)[-1]["loss"]
        held_out = resumed.evaluate(BATCHES)
    assert found == pytest.approx(expected, rel=1e-5)
    assert held_out["loss"] > 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("spec", NAMES, ids=label)
def test_half_precision_stays_near_single_precision(spec: Any, precision: str) -> None:
    losses = []
    for name in ("float32", precision):
        slowly = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.01)}
        with trainer(spec, runtime="threads", precision=name, **slowly) as one:
            losses.append([row["loss"] for row in one.fit(BATCHES, epochs=2)])
    assert losses[1] != losses[0]  # it did compute in another precision
    assert losses[1] == pytest.approx(losses[0], rel=0.1, abs=0.05)


@pytest.mark.parametrize("method", ["greedy_local", "pipedream"])
def test_the_trained_network_leaves_the_gpu(method: str) -> None:
    """Statistics of BatchNorm, evaluation and the state are usable on the CPU afterwards."""
    with trainer(method, runtime="threads") as one:
        one.fit(BATCHES, epochs=1)
        one.update_bn(BATCHES)
        held_out = one.evaluate(BATCHES)
        model = copy.deepcopy(one.model).cpu().eval()
    with torch.no_grad():
        found = sum(F.cross_entropy(model(x), y).item() for x, y, _ in BATCHES) / len(BATCHES)
    assert found == pytest.approx(held_out["loss"], rel=1e-5)
