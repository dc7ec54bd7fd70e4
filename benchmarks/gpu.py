"""On one GPU: the runtime's cost, blocks on streams of their own, peak memory, and edges between two processes.

    cost     1 block through the runtime / the plain loop; must reach 0.97
    streams  2 and 4 blocks, a thread and a stream each / the plain loop; half as many batches
    memory   peak of greedy_local and of backprop, at 2, 4 and 8 blocks, at once (threads) and in turn (simulated)
    edges    a ring in the GPU's memory (CUDA IPC), pinned memory and a ring in the host's, bare Gloo

Every round lets every contestant train the same batches in turned order, one at a time, and waits for the GPU before
the clock is read; ratios are taken within a round. Results go to ``benchmarks/results/gpu.md``.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from decoupled import Trainer, models
from decoupled.benchmarks.page import environment, machine, produce, table, verdict
from decoupled.benchmarks.peers import gpu_edges
from decoupled.benchmarks.speed import RESULTS, Spread

MUST = 0.97
METHODS = ("backprop", "pipedream", "greedy_local")
PRECISIONS = {"float32": None, "bf16": torch.bfloat16}
MIB = 2**20
FIRST = torch.device("cuda", 0)
Batch = tuple[Tensor, Tensor]
Run = Callable[[Sequence[Batch]], object]
Record = dict[str, float]


@dataclass(frozen=True)
class Task:
    """A network and its batches (noise): speed does not depend on what is learned."""

    model: Mapping[str, Any]
    inputs: tuple[int, ...]
    classes: int
    batch_size: int

    def units(self) -> list[nn.Module]:
        return models.build(self.model, self.inputs, self.classes)

    def batches(self, count: int) -> list[Batch]:
        """In CPU memory, four different ones in turn."""
        draw = torch.Generator().manual_seed(0)
        shape, tokens = (self.batch_size, *self.inputs), len(self.inputs) == 1
        kept = []
        for _ in range(min(count, 4)):
            x = torch.randint(self.classes, shape, generator=draw) if tokens else torch.randn(shape, generator=draw)
            targets = shape if tokens else shape[:1]
            kept.append((x, torch.randint(self.classes, targets, generator=draw)))
        return list(itertools.islice(itertools.cycle(kept), count))

    def text(self) -> str:
        options = ", ".join(f"{key} {value}" for key, value in self.model.items() if key != "name")
        return f"{self.model['name']} ({options}), inputs {'x'.join(map(str, self.inputs))}, batch {self.batch_size}"


TASKS = {
    "ResNet": Task({"name": "resnet", "depth": 20, "width": 64}, (3, 32, 32), 10, 512),
    "Transformer": Task({"name": "transformer", "width": 512, "depth": 8, "heads": 8}, (256,), 256, 64),
    "wide Transformer": Task({"name": "transformer", "width": 1024, "depth": 12, "heads": 16}, (512,), 256, 32),
}
SMALL = {
    "ResNet": Task({"name": "resnet", "depth": 8, "width": 4}, (3, 8, 8), 10, 4),
    "Transformer": Task({"name": "transformer", "width": 8, "depth": 3, "heads": 2}, (8,), 16, 4),
}


@dataclass(frozen=True)
class Options:
    """The command line; see `--help`."""

    rounds: int = 7
    batches: int = 16
    device: torch.device = FIRST
    parts: tuple[str, ...] = ("cost", "streams", "memory", "edges")
    small: bool = False
    out: Path = RESULTS

    @property
    def tasks(self) -> Mapping[str, Task]:
        """By name."""
        return SMALL if self.small else TASKS


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of every contestant."""
    return torch.optim.SGD(parameters, lr=0.001, momentum=0.9)


def wait(device: torch.device) -> None:
    """Until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- cost and streams ------------------------------------------------------------------------------------------------


def plain(task: Task, precision: str, device: torch.device, reads: bool) -> Run:
    """The loop of the PyTorch tutorials; `reads`: the loss of every batch, as the library does to notice NaN."""
    network = nn.Sequential(*task.units()).to(device)
    optimizer, half = sgd(network.parameters()), PRECISIONS[precision]

    def run(batches: Sequence[Batch]) -> float:
        total = torch.zeros((), device=device)
        read = 0.0
        for x, y in batches:
            optimizer.zero_grad()
            with torch.autocast(device.type, half, enabled=half is not None):
                loss = F.cross_entropy(network(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            if reads:
                read += loss.item()
            else:
                total += loss.detach()
        return read + total.item()

    return run


def trained(task: Task, method: str, blocks: Any, precision: str, device: torch.device, runtime: str) -> Trainer:
    """A trainer; all its blocks are on the device."""
    given: dict[str, Any] = {"loss": F.cross_entropy, "optimizer": sgd, "runtime": runtime, "devices": [device]}
    return Trainer(nn.Sequential(*task.units()), method, blocks=blocks, precision=precision, **given)


def alone(task: Task, precision: str, device: torch.device, stack: ExitStack) -> dict[str, Run]:
    """What the runtime's cost is told from."""
    trainer = stack.enter_context(trained(task, "backprop", 1, precision, device, "threads"))
    return {
        "plain": plain(task, precision, device, reads=True),
        "1 block": trainer.fit,
        "loss not read": plain(task, precision, device, reads=False),
    }


def in_blocks(task: Task, precision: str, device: torch.device, stack: ExitStack) -> dict[str, Run]:
    """What streams give."""
    found = {"plain": plain(task, precision, device, reads=True)}
    for blocks in (2, 4):
        cuts: Any = blocks
        for method in METHODS:
            trainer = stack.enter_context(trained(task, method, cuts, precision, device, "threads"))
            trainer.fit(task.batches(1))
            cuts = trainer.cuts  # the same for all methods
            found[f"{method}, {blocks}"] = trainer.fit
    return found


def hold_rounds(runs: Mapping[str, Run], batches: Sequence[Batch], options: Options) -> list[Record]:
    """One record per round: contestant -> seconds per batch."""
    for one in runs.values():
        one(batches[:3])
    rounds = []
    for number in range(options.rounds):
        names, record = list(runs), Record()
        turn = number % len(names)
        for who in names[turn:] + names[:turn]:
            wait(options.device)
            start = time.perf_counter()
            runs[who](batches)
            wait(options.device)
            record[who] = (time.perf_counter() - start) / len(batches)
        rounds.append(record)
    return rounds


def busy(run: Run, batches: Sequence[Batch]) -> float:
    """Share of a run's time in which the GPU computes; below 1 it waits for the host."""
    run(batches)
    torch.cuda.synchronize()
    start = time.perf_counter()
    run(batches)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        run(batches)
        torch.cuda.synchronize()
    kernels = [e for e in seen.events() or () if str(e.device_type).endswith("CUDA")]
    return sum(e.device_time for e in kernels) / 1e6 / seconds


def cost(options: Options, say: Callable[[str], None]) -> list[str]:
    """The section on what the runtime costs."""
    rows = []
    for (name, task), precision in itertools.product(options.tasks.items(), PRECISIONS):
        if name.startswith("wide") and precision == "float32":
            continue  # the other networks keep the GPU busy in float32
        batches = task.batches(options.batches)
        with ExitStack() as stack:
            runs = alone(task, precision, options.device, stack)
            rounds = hold_rounds(runs, batches, options)
        share = f"{busy(runs['plain'], batches[:4]):.2f}" if options.device.type == "cuda" else "unknown"
        ratio = {who: Spread.of([r["plain"] / r[who] for r in rounds]) for who in runs}
        plainly = Spread.of([r["plain"] * 1e3 for r in rounds]).text(".1f")
        reached = verdict(ratio["1 block"].median >= MUST)
        shown = [plainly, share, f">= {MUST}", ratio["1 block"].text(), reached, ratio["loss not read"].text()]
        rows.append([f"{name}, {precision}", *shown])
        say(f"cost: {name}, {precision}")
        del runs
        gc.collect()
    header = [
        "network",
        "plain, ms per batch",
        "GPU busy",
        "must reach",
        "1 block / plain",
        "reached",
        "loss not read / plain",
    ]
    return [
        "## What the runtime costs",
        f"{'; '.join(f'{name}: {task.text()}' for name, task in options.tasks.items())}. {options.batches} batches of "
        "noise in CPU memory per contestant and round, SGD with momentum. The plain loop reads the loss of every "
        "batch, as the library does; the last column is the same loop without that. *GPU busy*: share of the plain "
        "loop's time in which a kernel runs; where it is low the host's Python decides.",
        table(header, rows),
    ]


def streams(options: Options, say: Callable[[str], None]) -> list[str]:
    """The section on blocks that share the GPU."""
    rows = []
    for (name, task), precision in itertools.product(list(options.tasks.items())[:2], PRECISIONS):
        with ExitStack() as stack:
            runs = in_blocks(task, precision, options.device, stack)
            rounds = hold_rounds(runs, task.batches(max(1, options.batches // 2)), options)
        for blocks in (2, 4):
            ratios = ([r["plain"] / r[f"{method}, {blocks}"] for r in rounds] for method in METHODS)
            rows.append([f"{name}, {precision}, {blocks} blocks", *(Spread.of(one).text() for one in ratios)])
        say(f"streams: {name}, {precision}")
        del runs
        gc.collect()
    return [
        "## Blocks on streams of one GPU",
        "Throughput over the plain loop's. All blocks share the GPU: what they gain is what one stream leaves idle.",
        table(["network", *METHODS], rows),
    ]


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(options: Options, say: Callable[[str], None]) -> dict[tuple[str, int], dict[str, float]]:
    """(runtime, blocks) -> method -> MiB that one training takes at its peak, weights and batches included."""
    task, found = options.tasks["ResNet"], {}
    for runtime, blocks in [("threads", 1), *itertools.product(("threads", "simulated"), (2, 4, 8))]:
        for method in ("backprop", "greedy_local") if blocks > 1 else ("backprop",):
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            cuts = even(len(task.units()), blocks)
            with trained(task, method, cuts, "float32", options.device, runtime) as trainer:
                trainer.fit(task.batches(12))
            peak = torch.cuda.max_memory_allocated() - before
            found.setdefault((runtime, blocks), {})[method] = peak / MIB
        say(f"memory, {runtime}, {blocks} blocks")
    return found


def even(units: int, blocks: int) -> list[int]:
    """Cuts into blocks of equally many units, as far as that goes."""
    return [round(units * k / blocks) for k in range(1, blocks)]


# --- the page --------------------------------------------------------------------------------------------------------


def run(options: Options, say: Callable[[str], None]) -> dict[str, str]:
    """Measure; returns the page by its file name."""
    started, begun = datetime.datetime.now(datetime.UTC), time.monotonic()
    sections: list[str] = []
    if "cost" in options.parts:
        sections += cost(options, say)
    if "streams" in options.parts:
        sections += streams(options, say)
    if "memory" in options.parts and options.device.type == "cuda":
        sections += memory_section(memory(options, say), options)
    if "edges" in options.parts:
        sections += edges_section(gpu_edges.measure(options.device, options.rounds, options.small, say))
    gpu = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else "no GPU: a trial on the CPU"
    command = f"gpu --rounds {options.rounds} --batches {options.batches}" + " --small" * options.small
    if options.parts != Options.parts:
        command += f" --parts {' '.join(options.parts)}"
    how = environment(machine(started), command, time.monotonic() - begun)
    head = f"{gpu}. {how} {options.rounds} rounds; median (lowest .. highest) of ratios within a round."
    return {"gpu.md": "\n\n".join(["# One GPU", head, *sections]) + "\n"}


def memory_section(found: Mapping[tuple[str, int], Mapping[str, float]], options: Options) -> list[str]:
    """Peaks of a training."""
    whole, rows = found["threads", 1]["backprop"], []
    for (runtime, blocks), peaks in found.items():
        if blocks > 1:
            mine, theirs = peaks["greedy_local"], peaks["backprop"]
            shown = [f"{theirs:.0f}", f"{mine:.0f}", f"{mine / theirs:.2f}", f"{mine / whole:.2f}"]
            rows.append([f"{runtime}, {blocks} blocks", *shown])
    task = options.tasks["ResNet"]
    return [
        "## Peak memory",
        f"{task.text()}, float32, blocks of equally many units; what PyTorch's allocator had given out at most, in "
        f"MiB. One block: {whole:.0f} MiB. On `threads` the blocks work on different batches at the same time; on "
        "`simulated` one after the other.",
        table(["runtime", "backprop", "greedy_local", "greedy_local / backprop", "/ one block"], rows),
    ]


def edges_section(found: Sequence[Record]) -> list[str]:
    """GB/s between two processes of one GPU."""
    rows = []
    for size in gpu_edges.SIZES:
        speeds = [Spread.of([r[f"{name} {size}"] for r in found]) for name in gpu_edges.CONTESTANTS]
        rows.append([size, *(one.text(".2f") for one in speeds)])
    trips = [[name, Spread.of([r[f"{name} trip"] for r in found]).text(".3f")] for name in gpu_edges.EDGES]
    return [
        "## Edges between two processes of this GPU",
        "GB/s, one way, from tensors on the GPU to tensors on the GPU, at most four messages under way. *GPU ring*: "
        "memory of the GPU that both processes map (CUDA IPC), what the runtime takes. *Pinned, ring*: pinned memory, "
        "then shared memory of the host. *Gloo*: a bare send/recv loop between pinned buffers.",
        table(["message", *gpu_edges.CONTESTANTS], rows),
        table(["round trip of 4 KiB", "ms (median of 100)"], trips),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m decoupled.benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=Options.rounds, help=f"default {Options.rounds}")
    add("--batches", type=int, default=Options.batches, help=f"per contestant and round (default {Options.batches})")
    add("--device", type=torch.device, default=Options.device, help="default cuda:0; cpu tries the commands out")
    add("--parts", nargs="+", choices=Options.parts, default=Options.parts, help="default: all")
    add("--small", action="store_true", help="tiny networks and messages")
    add("--out", type=Path, default=RESULTS, help="folder of gpu.md")
    given: dict[str, Any] = vars(parser.parse_args(arguments))
    if given["rounds"] < 1 or given["batches"] < 1:
        parser.error("--rounds and --batches must be at least 1")
    if given["device"].type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --small tries the commands out")
    given["parts"] = tuple(given["parts"])
    options = Options(**given)
    return produce(lambda say: run(options, say), options.out)


if __name__ == "__main__":
    sys.exit(main())
