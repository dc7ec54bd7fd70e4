"""Layer-parallel training: the speed-up its model promises, and the one measured; `python -m` this module.

    rho(K) = (T_d + T_f + T_b) / (T_d + (T_f + T_b)/K + t_psi + t_f + t_b)         ideal, K equal stages

    T_d  loading a batch          T_f, T_b  forward and backward of the whole network, one core
    t_psi  objective, variable and multiplier of an edge, and its filter            t_f, t_b  of a generator (auxnet)

The form is derived from a description of Eq. (27) of arXiv 2112.05387, which could not be read. Every round runs every
contestant on the same batches, one at a time, in turned order; ratios are taken within a round. The hybrid is measured
in its parallel epochs. Results go to ``benchmarks/results/layer_parallel_speed.md``.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled import models
from decoupled.benchmarks.page import environment, machine, produce, table, verdict
from decoupled.benchmarks.peers.noise import QUIET, busy_seconds, wait_quiet
from decoupled.benchmarks.speed import RESULTS, Spread
from decoupled.build import probe
from decoupled.coupling import Place
from decoupled.data import Augment, Loader, Split
from decoupled.messages import Data
from decoupled.methods.auxiliary_variables.mgrit import Multigrid
from decoupled.partition import split
from decoupled.randomness import seeded
from decoupled.registry import make
from decoupled.trainer import Trainer

SERIAL, MUST = "backprop", 1.7
PARALLEL = 10**6  # epochs of a parallel phase: all that come
CONTESTANTS: dict[str, dict[str, Any]] = {
    SERIAL: {"name": "backprop"},
    "hybrid, AL": {"name": "hybrid", "parallel": PARALLEL, "beta": 0.001, "eta": 500.0},
    "hybrid, penalty": {
        "name": "hybrid",
        "parallel": PARALLEL,
        "beta": 0.002,
        "eta": 250.0,
        "sigma": None,
        "sweep": True,
    },
    "hybrid, AL, r = 2": {"name": "hybrid", "parallel": PARALLEL, "beta": 0.001, "eta": 500.0, "downsample": 2},
    "auxnet": {"name": "auxnet", "beta": 0.001, "eta": 20.0},
}


@dataclass(frozen=True)
class Costs:
    """Seconds per batch; the names are those of the formula."""

    T_d: float
    T_f: float
    T_b: float
    t_psi: float = 0.0
    t_f: float = 0.0
    t_b: float = 0.0

    def speedup(self, K: float) -> float:
        """rho(K); `K` may be infinite."""
        serial = self.T_d + self.T_f + self.T_b
        return serial / (self.T_d + (self.T_f + self.T_b) / K + self.t_psi + self.t_f + self.t_b)

    def least_stages(self) -> float:
        """More stages than this are needed to be faster than serial; infinite if no number is enough."""
        work, extra = self.T_f + self.T_b, self.t_psi + self.t_f + self.t_b
        return work / (work - extra) if work > extra else float("inf")


@dataclass(frozen=True)
class Job:
    """What everybody trains."""

    cut: int
    batches: int
    model: str = "resnet20"
    image: tuple[int, int, int] = (1, 28, 28)
    batch_size: int = 64

    def units(self) -> list[nn.Module]:
        return models.build(self.model, self.image, 10)

    def loader(self) -> Loader:
        """Noise with random labels, cropped and flipped: speed does not depend on what is learned."""
        draw, count = torch.Generator().manual_seed(0), self.batches * self.batch_size
        inputs, targets = torch.randn(count, *self.image, generator=draw), torch.randint(10, (count,), generator=draw)
        return Loader(Split(inputs, targets), self.batch_size, shuffle=True, augment=Augment(2, True))

    def trainer(self, method: Mapping[str, Any]) -> Trainer:
        return Trainer(
            nn.Sequential(*self.units()), method, [self.cut], loss=F.cross_entropy,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        )  # fmt: skip


def seconds(work: Callable[[], object], times: int = 7) -> float:
    """Median duration of a call, the first one left out."""
    taken = []
    for _ in range(times + 1):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken[1:])


def serial_costs(job: Job) -> Costs:
    """T_d, T_f and T_b on one core."""
    network, batches = nn.Sequential(*job.units()).train(), list(job.loader())
    x, y = batches[0].inputs, batches[0].targets
    loading = seconds(lambda: list(job.loader())) - seconds(job.loader)
    forward = seconds(lambda: F.cross_entropy(network(x), y))
    both = seconds(lambda: F.cross_entropy(network(x), y).backward())
    return Costs(loading / job.batches, forward, both - forward)


def edge_costs(job: Job, serial: Costs, method: Mapping[str, Any]) -> Costs:
    """The costs of a method: what its halves of the edge do in one round, timed apart from the blocks."""
    units, coupling = job.units(), make(method).coupling
    modules = (nn.Sequential(*units[: job.cut]), nn.Sequential(*units[job.cut :]))
    batch = next(iter(job.loader()))
    shapes, *_ = probe(modules, batch.inputs)
    places = [Place(k, 2, F.cross_entropy, shapes, job.image, modules) for k in range(2)]
    lower, upper = coupling.lower(places[0]), coupling.upper(places[1])
    lower.begin(1)
    upper.begin(1)
    y, g = (torch.randn(len(batch.inputs), *shapes[0]) / scale for scale in (1.0, size(shapes[0])))
    parts: dict[str, list[float]] = {"offer": [], "objective": [], "answer": []}

    def timed(part: str, work: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = work()
        parts[part].append(time.perf_counter() - begun)
        return result

    def objective(data: Data, offered: Any) -> tuple[Tensor, ...]:
        leaf = y.clone().requires_grad_()
        up = lower.emit(leaf, data)
        value = lower.objective(leaf, data)
        if value is not None:
            value.backward(inputs=[leaf])
        upper.receive(offered or up, data)
        return upper.reply(g)

    for key in range(8):  # the first meets all samples for the first time
        data = Data(key, batch=0, indices=batch.indices, inputs=batch.inputs, targets=batch.targets)
        up = timed("offer", lambda d=data: lower.offer(d))
        down = timed("objective", lambda d=data, u=up: objective(d, u))
        timed("answer", lambda d=down: lower.answer(d))
    offer, middle, answer = (statistics.median(spent[1:]) for spent in parts.values())
    if lower.module is None:
        return Costs(serial.T_d, serial.T_f, serial.T_b, offer + middle + answer)
    return Costs(serial.T_d, serial.T_f, serial.T_b, middle, offer, answer)


def size(shape: Sequence[int]) -> float:
    """Numbers in one sample."""
    return float(torch.Size(shape).numel())


Took = tuple[float, float]  # seconds per batch; cores that others used meanwhile


def measure(job: Job, rounds: int, patience: float, say: Callable[[str], None]) -> list[dict[str, Took]]:
    """What every contestant took in every round."""
    held, loader = [], job.loader()
    with ExitStack() as stack:
        trainers = {name: stack.enter_context(job.trainer(method)) for name, method in CONTESTANTS.items()}
        for name, trainer in trainers.items():  # warms up; the hybrids have their serial epoch, then a parallel one
            trainer.fit(loader, epochs=2)
            say(f"{name}: warmed up")
        names = list(trainers)
        for number in range(rounds):
            turned = names[number % len(names) :] + names[: number % len(names)]
            took = {name: one_run(trainers[name], loader, job.batches, patience) for name in turned}
            say("  ".join(f"{name} {took[name][0] * 1e3:.1f} ms ({took[name][1]:.2f})" for name in names))
            held.append(took)
    return held


def one_run(trainer: Trainer, loader: Loader, batches: int, patience: float) -> Took:
    """An epoch; with patience, the least disturbed of those that fit into the time."""
    deadline, best = time.monotonic() + patience, None
    while True:
        if patience:
            wait_quiet(deadline)
        before, own = busy_seconds(), time.process_time()
        spent = trainer.fit(loader)[0]["seconds"]
        others = (busy_seconds() - before - (time.process_time() - own)) / spent
        if best is None or others < best[1]:
            best = spent / batches, others
        if not others > QUIET or time.monotonic() > deadline:
            return best


def multigrid(job: Job, layers: int = 16, channels: int = 16, coarsening: int = 4) -> list[list[str]]:
    """Rows on multigrid in layers: error of output and gradient, and the pace of two threads against serial layers."""
    with seeded(0):
        functions = [
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(1, channels), nn.ReLU())
            for _ in range(layers)
        ]
        x = torch.randn(job.batch_size, channels, 14, 14)
    weights = [p for function in functions for p in function.parameters()]

    def solve(network: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        y = network(x)
        return y.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(y.square().mean(), weights)])

    rows = []
    for relax, iterations in ((False, 1), (True, 1), (True, 2)):
        solver = Multigrid(functions, coarsening, 1 / layers, iterations, iterations, relax, threads=2)
        exact = solve(solver.serial)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(solve(solver), exact, strict=True)]
        cosine = float(F.cosine_similarity(solve(solver)[1], exact[1], dim=0))
        pace = seconds(lambda s=solver: solve(s.serial)) / seconds(lambda s=solver: solve(s))
        name = f"{iterations} iteration{'s' * (iterations > 1)}, {'with' if relax else 'no'} relaxation"
        rows.append([name, f"{errors[0]:.1e}", f"{errors[1]:.1e}", f"{cosine:.4f}", f"{pace:.2f}"])
    return rows


def page(
    job: Job, costs: Mapping[str, Costs], held: Sequence[Mapping[str, Took]], grid: Sequence[Sequence[str]], head: str
) -> str:
    """The results as a page."""
    must = {"hybrid, AL": MUST, "hybrid, penalty": MUST}
    rows, parts = [], []
    for name, cost in costs.items():
        spread = Spread.of([r[SERIAL][0] / r[name][0] for r in held])
        reached = spread.median >= must[name] if name in must else None
        asked = f">= {must[name]:.2f}" if name in must else ""
        bound, limit, least = cost.speedup(2), cost.speedup(float("inf")), cost.least_stages()
        rows.append([name, asked, spread.text(), verdict(reached), f"{bound:.2f}", f"{limit:.1f}", f"{least:.2f}"])
        parts.append([name, *(f"{1e3 * getattr(cost, part):.1f}" for part in Costs.__dataclass_fields__)])
    paces = [
        [n, Spread.of([1e3 * r[n][0] for r in held]).text(".1f"), Spread.of([abs(r[n][1]) for r in held]).text()]
        for n in CONTESTANTS
    ]
    what = (
        f"{job.model}, inputs {'x'.join(map(str, job.image))} of noise, augmented, batch {job.batch_size}, SGD with "
        f"momentum; two blocks on two threads with one intra-op thread each, cut before unit {job.cut} (balanced by "
        f"measured time). {len(held)} rounds of {job.batches} batches, contestants one at a time in turned order; "
        "median (lowest .. highest) of ratios within a round. The bound is rho(2), the limit rho(infinity), with the "
        "costs below; K0 is how many stages it takes to be faster than serial. hybrid is measured in its parallel "
        "epochs only; *others* is how many cores other programs used. A bound below what is measured means that costs "
        "counted in t_psi ran beside the other block."
    )
    columns = ["method", "must reach", "measured over backprop", "reached", "bound, K = 2", "limit", "K0"]
    return "\n\n".join([
        "# Layer-parallel training",
        f"{head} {what}",
        table(columns, rows),
        "Costs, ms per batch on one core:",
        table(["method", *Costs.__dataclass_fields__], parts),
        "Pace:",
        table(["contestant", "ms per batch", "others, cores"], paces),
        "The iterative-exact peer, multigrid in layers: 16 residual layers (3x3 convolution, GroupNorm, ReLU) of 16 "
        f"channels, 14x14, batch {job.batch_size}, weights as initialised, intervals of 4 layers, two threads; "
        "forward and backward, against serial propagation on one core.",
        table(["multigrid", "error of output", "error of gradient", "cosine of gradient", "speed-up"], grid),
    ]) + "\n"  # fmt: skip


def run(rounds: int, batches: int, patience: float, say: Callable[[str], None]) -> dict[str, str]:
    """Measure; returns the page by its file name."""
    started, begun = datetime.datetime.now(datetime.UTC), time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first = Job(1, batches)
        sample: tuple[Tensor, Tensor] = next(iter(first.loader()))[:2]
        job = Job(len(split(first.units(), 2, sample)[0]), batches)
        serial = serial_costs(job)
        costs = {name: edge_costs(job, serial, m) for name, m in CONTESTANTS.items() if name != SERIAL}
        say(f"costs measured, cut {job.cut}")
        grid = multigrid(job)
        held = measure(job, rounds, patience, say)
    finally:
        torch.set_num_threads(threads)
    waits = f" --patience {patience:g}" if patience else ""
    command = f"layer_parallel --rounds {rounds} --batches {batches}{waits}"
    head = environment(machine(started), command, time.monotonic() - begun)
    return {"layer_parallel_speed.md": page(job, costs, held, grid, head)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m decoupled.benchmarks.layer_parallel", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--batches", type=int, default=12, help="per contestant and round (default 12)")
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait for others to leave the cores")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of layer_parallel_speed.md")
    given = parser.parse_args(arguments)
    if min(given.rounds, given.batches) < 1:
        parser.error("--rounds and --batches must be at least 1")
    return produce(lambda say: run(given.rounds, given.batches, given.patience, say), given.out)


if __name__ == "__main__":
    sys.exit(main())
