"""Peak activation memory of every block, tracked while it trains, against the formula of its card.

    M_k = A(f_k) + A(J_k)      A: bytes of a pass until its backward: input, output, and what autograd saves

Tracked is what is alive: every tensor that autograd saves is counted from the moment it is saved until the node that
saved it lets go of it, tensors that share memory once, weights not at all; inputs and outputs as long as the block
keeps them.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled import registry
from decoupled.intake import Intake
from decoupled.messages import Data
from decoupled.runtime.simulated import Simulated
from decoupled.runtime.timing import Timing
from decoupled.testing import Case, label, train
from decoupled.worker import Worker

CASE = Case(widths=(24, 48, 40, 56, 32, 64, 10), cuts=(1, 2, 4, 5), sizes=(30,) * 6)
K, N, BYTES = CASE.K, CASE.sizes[0], 8
FAMILY = [name for name in registry.methods() if registry.family(name) == "local_parallelism"]
SPECS: list[Any] = [
    *({"name": name} for name in FAMILY),
    {"name": "greedy_local", "head": "mlp"},
    {"name": "chunked_local", "chunks": 3},
    {"name": "overlapping_local", "reach": 3},
    {"name": "interlocking", "n": 3},
    {"name": "infopro", "contrast": True},
]


class Meter:
    """Bytes of saved tensors that are alive, and the most there have been."""

    def __init__(self) -> None:
        self.alive: dict[int, list[int]] = {}  # storage -> [bytes, how often it is saved]
        self.kept: dict[int, int] = {}  # storage -> bytes, of what the block itself keeps
        self.weights: set[int] = set()
        self.peak = 0

    def pack(self, t: Tensor) -> _Saved:
        return _Saved(self, t if t.is_leaf else t.detach())

    def look(self) -> None:
        whole = self.kept | {pointer: size for pointer, (size, _) in self.alive.items()}
        self.peak = max(self.peak, sum(size for pointer, size in whole.items() if pointer not in self.weights))

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda saved: saved.tensor)


class _Saved:
    def __init__(self, meter: Meter, tensor: Tensor) -> None:
        self.meter, self.tensor, self.at = meter, tensor, tensor.untyped_storage().data_ptr()
        entry = meter.alive.setdefault(self.at, [0, 0])
        entry[:] = max(entry[0], size(tensor)), entry[1] + 1
        meter.look()

    def __del__(self) -> None:
        entry = self.meter.alive[self.at]
        entry[1] -= 1
        if not entry[1]:
            del self.meter.alive[self.at]


def size(t: Tensor) -> int:
    return t.numel() * t.element_size()


def storages(*tensors: Tensor) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): size(t) for t in tensors}


def tracked(spec: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[list[Meter], list[int], Any]:
    """Peak of every block and of every intake, over the second epoch and later."""
    meters, intakes = [Meter() for _ in range(K)], [0] * K
    handle, take = Worker.handle, Intake._take

    def metered(self: Worker, want: Any, messages: Any) -> Any:
        meter, retention = meters[self.k], self.retention
        modules = [self.block.module, *(half.module for half in (self.lower, self.upper) if half.module is not None)]
        meter.weights = set(storages(*(t for m in modules for t in [*m.parameters(), *m.buffers()])))
        with meter.hooks():
            outcome = handle(self, want, messages)
        tapes = [kept[0] if isinstance(kept, tuple) else kept for kept in retention._kept.values()]
        meter.kept = storages(*(t for tape in tapes for t in (tape.x, tape.y)))
        meter.look()
        return outcome

    def weighed(self: Intake, message: Any) -> None:
        take(self, message)
        k = int(self.name.removeprefix("intake"))
        intakes[k] = max(intakes[k], sum(slot.message.nbytes for slot in self._kept))  # type: ignore[attr-defined]

    monkeypatch.setattr(Worker, "handle", metered)
    monkeypatch.setattr(Intake, "_take", weighed)
    run = train(CASE, spec, epochs=2, **options)
    return meters, intakes, run.trainer


def needed(run: Any, meter: Meter, leaf: Tensor) -> Tensor:
    """Run something, with everything it saves on the meter."""
    with meter.hooks(), torch.enable_grad():
        out = run(leaf)
    meter.kept |= storages(leaf, out)
    meter.look()
    return out


def formula(worker: Any, rows: int) -> int:
    """A(f_k) + A(J_k), each counted alone on one made-up pass."""
    place = worker.place
    module, inputs = worker.block.module, (place.inputs if not worker.k else place.shapes[worker.k - 1])
    meter = Meter()
    halves = [half.module for half in (worker.lower, worker.upper) if half.module is not None]
    meter.weights = set(storages(*(p for m in [module, *halves] for p in m.parameters())))
    x = torch.randn(rows, *inputs, dtype=torch.float64)
    if not worker.lower.has_objective and not worker.lower.awaits:  # not trained: no graph
        return BYTES * rows * (inputs[0] + place.shapes[worker.k][0])
    y = needed(module, meter, x.requires_grad_(worker.upper.replies and worker.upper.differentiates))
    if worker.lower.has_objective:
        data = Data(0, batch=0, inputs=torch.randn(N, CASE.widths[0]).double(), targets=torch.randint(10, (N,)))
        objective = needed(lambda leaf: worker.lower.objective(leaf, data), meter, y.detach().requires_grad_())
        assert objective.dim() == 0
    return meter.peak


@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_peak_activation_memory_is_what_the_card_says(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    meters, intakes, trainer = tracked(spec, monkeypatch)
    monkeypatch.undo()
    slots = registry.options(spec["name"]).get("slots", 0)
    for k, worker in enumerate(trainer.workers):
        expected = formula(worker, N * worker.upper.streams)
        assert meters[k].peak == pytest.approx(expected, rel=0.1), f"block {k}"
        arriving = N * (BYTES * CASE.widths[CASE.cuts[k - 1]] + 8) if k and slots else 0
        assert intakes[k] <= slots * arriving


def test_a_slow_block_s_buffer_is_full_and_no_fuller(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"name": "dgl_async", "slots": 3}
    _, intakes, _ = tracked(spec, monkeypatch, runtime=Simulated(Timing(slow={2: 20.0})))
    assert intakes[2] == 3 * N * (BYTES * CASE.widths[CASE.cuts[1]] + 8)


@pytest.mark.parametrize("reach", [1, 2, 3])
def test_in_numbers(reach: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula of the overlapping card with the widths of this network put in; reach 1 is greedy."""
    meters, _, _ = tracked({"name": "overlapping_local", "reach": reach}, monkeypatch)
    edges = [0, *CASE.cuts, len(CASE.widths) - 1]
    for k, (first, last) in enumerate(itertools.pairwise(edges)):
        widths = CASE.widths[first : last + 1]
        own = k >= reach - 1
        scores = 10 if own else 0  # the probabilities of the classes
        block = BYTES * N * (sum(widths) + scores) + 8 * N * own
        assert meters[k].peak == pytest.approx(block, rel=0.1), f"block {k}"


def test_the_meter_sees_a_graph_that_is_kept_too_long() -> None:
    """The control: two passes alive are twice one."""
    layer, peaks = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), []
    for passes in (1, 2):
        meter = Meter()
        meter.weights = set(storages(*layer.parameters()))
        outputs = [needed(layer, meter, torch.randn(5, 8)) for _ in range(passes)]
        peaks.append(meter.peak)
        F.mse_loss(outputs[0], outputs[-1])
    assert peaks[1] == 2 * peaks[0]
