"""How local updates scale: two real workers, up to 64 simulated ones, memory and bytes; `python -m` this module.

    speed-up    on two cores, against a plain loop on one that does the same work, heads included (`peers.local`), and
                against plain backpropagation; rounds and turned order as in `decoupled.benchmarks.speed`
    simulated   2 to 64 equal blocks on the virtual clock, with the times of one residual block and of a head measured
                here; latency is a tenth of a forward
    memory      what the largest block holds at its peak, as the library tracks it, against all that backpropagation in
                one block holds; beside it one graph of that block, counted outside the library
    bytes       per sample and edge, as counted

Results go to ``benchmarks/results/local_scaling.md``.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from decoupled import Trainer, heads, split
from decoupled.benchmarks.page import environment, machine, produce, table, verdict
from decoupled.benchmarks.peers import contest, local, plain
from decoupled.benchmarks.peers.contest import Group, Measurement
from decoupled.benchmarks.peers.setting import CLASSES, Setting, sgd
from decoupled.benchmarks.speed import RESULTS, Figure, Spread
from decoupled.runtime.timing import Timing
from decoupled.simulate import simulate

BACKPROP = "plain backprop, 1 thread"
TWICE = "plain backprop, twice at once"
MUST = 1.85
CHUNKED: dict[str, Any] = {"name": "chunked_local", "chunks": 2}


@dataclass(frozen=True)
class Options:
    """The command line; see `--help`."""

    rounds: int = 3
    batches: int = 16
    most: int = 64
    out: Path = RESULTS
    setting: Setting = field(default_factory=Setting)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m decoupled.benchmarks.scaling", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=Options.rounds, help="default 3")
    add("--batches", type=int, default=Options.batches, help="per contestant and round (default 16)")
    add("--most", type=int, default=Options.most, help="blocks of the largest simulation (default 64)")
    add("--out", type=Path, default=RESULTS, help="folder of local_scaling.md")
    given = parser.parse_args(arguments)
    if min(given.rounds, given.batches) < 1 or given.most < 2:
        parser.error("--rounds and --batches must be at least 1, --most at least 2")
    return Options(**vars(given))


def groups(two: list[int], four: list[int]) -> list[Group]:
    """All contestants."""

    def alone(name: str, cuts: list[int], reach: int) -> Group:
        return Group(local.build, {"run": f"{name}, 1 thread"}, options={"cuts": cuts, "reach": reach})

    def ours(name: str, method: Any, cuts: list[int]) -> Group:
        return Group(local.on_threads, {"run": f"{name}, 2 workers"}, options={"method": method, "cuts": cuts})

    return [
        Group(plain.build, {"run": BACKPROP}),
        Group(plain.build, {"run": TWICE}, ranks=2),
        alone("greedy, 2 blocks", two, 1),
        ours("greedy, 2 blocks", "greedy_local", two),
        alone("two chunks, 4 blocks", four[1:2], 1),
        ours("two chunks, 4 blocks", CHUNKED, four),
        alone("overlapping, 4 blocks", four, 2),
        ours("overlapping, 4 blocks", "overlapping_local", four),
    ]


def bouts(chosen: Sequence[Group]) -> list[contest.Bout]:
    """Pairs: plain backprop once and twice, then every method at its own work and on two workers."""
    names = contest.names(chosen)
    return [[(one, one), (other, other)] for one, other in zip(names[::2], names[1::2], strict=True)]


def run(options: Options, say: Callable[[str], None]) -> dict[str, str]:
    """Measure everything; returns the page by its file name."""
    started, begun = datetime.datetime.now(datetime.UTC), time.monotonic()
    setting = options.setting
    inputs, _ = next(setting.batches(1))
    torch.set_num_threads(1)
    two, four = ([*itertools.accumulate(map(len, split(setting.units(), n, inputs)))][:-1] for n in (2, 4))
    chosen = groups(two, four)
    rounds = list(contest.hold_rounds(setting, chosen, options.rounds, options.batches, 0.0, say, bouts(chosen)))
    say("memory and bytes")
    held = [memory(setting, four, spec) for spec in ("backprop", "greedy_local", CHUNKED, "overlapping_local")]
    whole = memory(setting, [], "backprop")
    say("simulation")
    times = block_times(setting)
    parts = [
        "# How local updates scale",
        environment(machine(started), f"scaling --rounds {options.rounds} --batches {options.batches}",
                    time.monotonic() - begun) + f" {setting.model}, inputs {'x'.join(map(str, setting.image))}, batch "
        f"{setting.batch_size}, SGD with momentum, synthetic data; 2 blocks cut at {two}, 4 at {four} (by measured "
        "time).",
        *_speed(rounds, options),
        *_simulated(times, options.most),
        *_memory(whole, held, setting, four),
    ]  # fmt: skip
    return {"local_scaling.md": "\n\n".join(parts) + "\n"}


def _speed(rounds: Sequence[Mapping[str, Measurement]], options: Options) -> list[str]:
    limit = Spread.of([2 * r[BACKPROP].seconds / r[TWICE].seconds for r in rounds])
    rows = [["two plain loops at once: the machine's limit", "", "", "", limit.text()]]
    for name in ("greedy, 2 blocks", "two chunks, 4 blocks", "overlapping, 4 blocks"):
        own = Figure(name, f"{name}, 2 workers", f"{name}, 1 thread", MUST)
        spread = Spread.of(own.ratios(rounds) or [])
        other = Spread.of(Figure(name, f"{name}, 2 workers", BACKPROP).ratios(rounds) or [])
        rows.append([name, spread.text(), f">= {MUST}", verdict(own.reached(spread.median)), other.text()])
    times = [
        [name, Spread.of([r[name].seconds * 1e3 for r in rounds]).text(".1f"),
         f"{statistics.median(abs(r[name].others) for r in rounds):.2f}"] for name in rounds[0]
    ]  # fmt: skip
    return [
        "## Two workers",
        f"Threads with one intra-op thread each, on two cores. {options.rounds} rounds of {options.batches} batches; "
        "ratios of throughput within a round, median (lowest .. highest). What *own work* compares runs right after "
        "one another, in the opposite order every other round. *Own work*: a plain loop on one thread that "
        "does what the method does, heads included. With 2 blocks, overlapping (reach 2) is backpropagation, so it is "
        "cut into 4, whose threads share the two cores.",
        table(["method", "own work", "must reach", "reached", "backprop's work"], rows),
        table(["contestant", "ms per batch", "others, cores"], times),
    ]


def block_times(setting: Setting, repeats: int = 7) -> dict[str, float]:
    """Median seconds of one inner block on one thread: forward, backward, and of its head, both ways."""
    units, (x, y) = setting.units(), next(setting.batches(1))
    with torch.no_grad():
        x = units[0](x)
    block, leaf = units[1].train(), x.requires_grad_()
    head = heads.build("linear", tuple(units[1](x).shape[1:]), (CLASSES,))
    found: dict[str, list[float]] = {"forward": [], "backward": [], "head": []}
    for _ in range(repeats):
        marks = [time.perf_counter()]
        out = block(leaf)
        marks.append(time.perf_counter())
        out.backward(torch.ones_like(out))
        marks.append(time.perf_counter())
        F.cross_entropy(head(out.detach().requires_grad_()), y).backward()
        marks.append(time.perf_counter())
        for name, (begin, end) in zip(found, itertools.pairwise(marks), strict=True):
            found[name].append(end - begin)
    return {name: statistics.median(values) for name, values in found.items()}


def _simulated(times: Mapping[str, float], most: int) -> list[str]:
    counts = [n for n in (2, 4, 8, 16, 32, 64, 128, 256) if n <= most]
    forward, backward, head = times["forward"], times["backward"], times["head"]
    methods: dict[str, tuple[Any, float]] = {
        "backprop": ("backprop", 0.0),
        "one_f_one_b, 4 micro-batches": ("one_f_one_b", 0.0),
        "two chunks": (CHUNKED, 0.0),
        "four chunks": (CHUNKED | {"chunks": 4}, 0.0),
        "overlapping": ("overlapping_local", head),
        "greedy": ("greedy_local", head),
    }
    rows = []
    for name, (method, extra) in methods.items():
        cells = []
        for K in counts:
            timing = Timing(forward=forward + extra, backward=backward, latency=forward / 10)
            result = simulate(method, K, 64, timing)
            cells.append(f"{64 * K * (forward + backward) / result.time:.1f} ({sum(result.utilisation):.1f})")
        rows.append([name, *cells])
    milli = {name: f"{seconds * 1e3:.2f}" for name, seconds in times.items()}
    return [
        "## Simulated, a worker per block",
        f"Speed-up over backpropagation on one worker, in brackets the workers busy on average (the speed-up at the "
        f"method's own work). Measured for a residual block: forward {milli['forward']} ms, backward "
        f"{milli['backward']} ms, a head both ways {milli['head']} ms, which greedy and overlapping pay in every "
        f"block. 64 batches, filling and draining included. A backward without the input gradient is taken to cost "
        "half; bandwidth is not modelled.",
        table(["method", *(f"{K} blocks" for K in counts)], rows),
    ]


def memory(setting: Setting, cuts: list[int], method: str | Mapping[str, Any]) -> dict[str, Any]:
    """What the blocks hold at their peak, and send per sample, over a few batches on threads."""
    trainer = Trainer(
        nn.Sequential(*setting.units()),
        method,
        blocks=cuts or 1,
        loss=F.cross_entropy,
        optimizer=sgd,
        runtime="threads",
    )
    with trainer:
        trainer.fit(setting.batches(3))
        blocks = trainer.statistics()
    samples = 3 * setting.batch_size
    return {
        "method": method if isinstance(method, str) else "chunked_local(chunks=2)",
        "held": [block.peak_held_bytes for block in blocks],
        "up": [block.bytes_up / samples for block in blocks[:-1]],
        "down": [block.bytes_down / samples for block in blocks[1:]],
    }


def one_graph(setting: Setting, cuts: Sequence[int]) -> list[int]:
    """Bytes that autograd saves in one forward of each block, weights left out; every tensor once."""
    units, (x, _) = setting.units(), next(setting.batches(1))
    found = []
    for a, b in itertools.pairwise([0, *cuts, None]):
        block, kept = nn.Sequential(*units[a:b]).train(), {}
        weights = {p.untyped_storage().data_ptr() for p in (*block.parameters(), *block.buffers())}

        def note(tensor: torch.Tensor, kept: dict[int, int] = kept, weights: set[int] = weights) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        leaf = x.detach().requires_grad_(bool(a))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y = block(leaf)
        found.append(sum(kept.values()))
        x = y
    return found


def _memory(
    whole: Mapping[str, Any], held: Sequence[Mapping[str, Any]], setting: Setting, cuts: list[int]
) -> list[str]:
    total, graphs = max(whole["held"]), one_graph(setting, cuts)
    rows = []
    for found in held:
        largest = max(range(len(found["held"])), key=lambda k: found["held"][k])
        share = found["held"][largest] / graphs[largest]
        rows.append([
            found["method"], f"{found['held'][largest] / 2**20:.1f}", f"{found['held'][largest] / total:.2f}",
            f"{graphs[largest] / 2**20:.1f}", f"{share:.2f}", " / ".join(f"{n / 1024:.1f}" for n in found["up"]),
            " / ".join(f"{n / 1024:.1f}" for n in found["down"]),
        ])  # fmt: skip
    return [
        "## Memory and bytes, 4 blocks",
        f"The largest block's peak as the library tracks it; backpropagation in one block holds {total / 2**20:.1f} "
        f"MiB at batch {setting.batch_size}. *One graph* is what autograd saves in one forward of that block, counted "
        "outside the library: the cards' formula.",
        table(
            ["method", "largest block, MiB", "of backprop in one block", "one graph, MiB", "tracked / one graph",
             "KiB per sample up, per edge", "down"],
            rows,
        ),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    options = parse(arguments)
    return produce(lambda say: run(options, say), options.out)


if __name__ == "__main__":
    sys.exit(main())
