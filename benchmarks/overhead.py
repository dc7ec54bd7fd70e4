"""Overhead: the library's own Python per operation, on a network too small to hide it; `python -m` this module.

    overhead = (the library's threads - a loop written by hand for the same method) / (batches x blocks x 3)

The toy is two linear layers, a block each: F, B and S per block and batch. The loops do the same tensor work (frozen
copies, replays and heads where the method has them) block after block on one thread. Rounds take all contestants in
turn, twice: on one processor core, where processor time is what the interpreter works; and on all, where in CPython two
threads also hand the interpreter lock to each other. The control shows what that alone costs: two bare threads, a block
each, without any message. Results go to ``benchmarks/results/overhead.md``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled import Trainer
from decoupled.benchmarks.page import environment, machine, produce, table, verdict
from decoupled.benchmarks.speed import RESULTS, Spread

MUST = 60.0  # microseconds per operation, on one core
OPERATIONS = 6  # per batch: F, B and S of two blocks
METHODS = ("backprop", "pipedream", "features_replay", "greedy_local")
CONTROL = "two bare threads"
Batches = Sequence[tuple[Tensor, Tensor]]
Loop = Callable[[Batches], object]
Times = dict[str, tuple[float, float]]  # contestant -> (processor, wall) microseconds per batch


@dataclass(frozen=True)
class Options:
    """The command line; see `--help`."""

    rounds: int = 7
    batches: int = 500
    out: Path = RESULTS


def toy() -> list[nn.Module]:
    """The network: one block per layer."""
    torch.manual_seed(0)
    return [nn.Linear(16, 16), nn.Linear(16, 4)]


def sgd(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of every contestant."""
    return torch.optim.SGD(parameters, lr=0.01)


def batches(count: int) -> Batches:
    """Noise."""
    kept = [(torch.randn(8, 16), torch.randint(4, (8,))) for _ in range(8)]
    return [kept[i % 8] for i in range(count)]


class Half:
    """A block by hand."""

    def __init__(self, layer: nn.Module, head: nn.Module | None = None) -> None:
        self.layer, self.head = layer, head
        modules = [layer] if head is None else [layer, head]
        self.optimizers = [sgd(list(module.parameters())) for module in modules]

    def forward(self, x: Tensor, copies: bool = False) -> Tensor:
        """F; `copies`: over frozen copies of the weights."""
        if not copies:
            return self.layer(x)
        return F.linear(x, *(p.detach().clone().requires_grad_() for p in self.layer.parameters()))

    def loss(self, y: Tensor, targets: Tensor) -> Tensor:
        """Gradient of the block's own objective for its output."""
        leaf = y.detach().requires_grad_()
        objective = F.cross_entropy(leaf if self.head is None else self.head(leaf), targets)
        float(objective.detach())
        objective.backward()
        assert leaf.grad is not None
        return leaf.grad

    def step(self) -> None:
        """S."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def by_hand(method: str) -> Loop:
    """The loop for a method: its tensor work and nothing else."""
    first, second = toy()
    local, replays = method == "greedy_local", method == "features_replay"
    lower, upper = Half(first, nn.Linear(16, 4) if local else None), Half(second)

    def run(given: Batches) -> None:
        for x, targets in given:
            with torch.set_grad_enabled(not replays):
                h = lower.forward(x, copies=method == "pipedream")
            x2 = h.detach().requires_grad_(not local)
            with torch.set_grad_enabled(not replays):
                y = upper.forward(x2)
            if replays:
                y = upper.forward(x2)
            y.backward(upper.loss(y, targets))
            upper.step()
            if replays:
                h = lower.forward(x)
            gradient = lower.loss(h, targets) if local else x2.grad
            h.backward(gradient)
            lower.step()

    return run


def two_threads() -> Loop:
    """The blocks of `backprop` in a thread each, without messages: neither waits for the other."""
    lower, upper = (Half(layer) for layer in toy())
    gradient = torch.randn(8, 16)

    def below(given: Batches) -> None:
        for x, _ in given:
            lower.forward(x).backward(gradient)
            lower.step()

    def above(given: Batches) -> None:
        for x, targets in given:
            y = upper.forward(x.detach().requires_grad_())
            y.backward(upper.loss(y, targets))
            upper.step()

    def run(given: Batches) -> None:
        threads = [threading.Thread(target=half, args=(given,)) for half in (below, above)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return run


def rounds(count: int, size: int) -> list[Times]:
    """All contestants in this process, `count` times in turn."""
    torch.set_num_threads(1)
    given: Batches = batches(size)
    loops: dict[str, Loop] = {f"{method}, by hand": by_hand(method) for method in METHODS} | {CONTROL: two_threads()}
    trainers = {
        method: Trainer(toy(), method, loss=F.cross_entropy, optimizer=sgd, runtime="threads") for method in METHODS
    }
    loops |= {method: trainer.fit for method, trainer in trainers.items()}
    for loop in loops.values():
        loop(given[:50])
    found = []
    for _ in range(count):
        times = {}
        for name, loop in loops.items():
            processor, wall = time.process_time(), time.perf_counter()
            loop(given)
            times[name] = (
                (time.process_time() - processor) / size * 1e6,
                (time.perf_counter() - wall) / size * 1e6,
            )
        found.append(times)
    for trainer in trainers.values():
        trainer.close()
    return found


def elsewhere(options: Options, cores: Sequence[int]) -> list[Times]:
    """`rounds` in a process of its own on these cores."""
    command = [sys.executable, "-m", "decoupled.benchmarks.overhead", "--cores", *map(str, cores)]
    command += ["--rounds", str(options.rounds), "--batches", str(options.batches)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def run(options: Options, say: Callable[[str], None]) -> dict[str, str]:
    """Measure; returns the page by its file name."""
    started, begun = datetime.datetime.now(datetime.UTC), time.monotonic()
    cores = sorted(os.sched_getaffinity(0))
    say("on one core")
    one = elsewhere(options, cores[:1])
    say(f"on {len(cores)} cores")
    return {"overhead.md": page(one, elsewhere(options, cores), options, machine(started), time.monotonic() - begun)}


def over(found: Sequence[Times], name: str, loop: str, which: int) -> Spread:
    """Microseconds per operation of `name` over those of `loop`, round by round."""
    return Spread.of([(times[name][which] - times[loop][which]) / OPERATIONS for times in found])


def page(one: list[Times], several: list[Times], options: Options, facts: dict, seconds: float) -> str:
    """The results as a page."""
    rows = []
    for method in METHODS:
        loop = f"{method}, by hand"
        alone = over(one, method, loop, 0)
        rows.append(
            [
                method,
                f"{statistics.median(times[loop][0] for times in one):.0f}",
                f"<= {MUST:.0f}",
                alone.text(".0f"),
                verdict(alone.median <= MUST),
                over(several, method, loop, 1).text(".0f"),
            ]
        )
    lock = over(several, CONTROL, "backprop, by hand", 1)
    rows.append(
        [f"control: {CONTROL}", "", "", over(one, CONTROL, "backprop, by hand", 0).text(".0f"), "", lock.text(".0f")]
    )
    header = [
        "microseconds",
        "by hand, per batch",
        "must reach",
        "over it, per operation, one core",
        "reached",
        "wall, all cores",
    ]
    parts = [
        "# Overhead per operation",
        environment(facts, f"overhead --rounds {options.rounds} --batches {options.batches}", seconds)
        + " Two linear layers (16 to 16 to 4), batch 8, SGD, two blocks on the runtime `threads`; F, B and S per block "
        f"and batch. {options.rounds} rounds of {options.batches} batches; shown are median (lowest .. highest) of "
        "what the library takes beyond a loop written by hand for the same tensor work, divided by the operations: "
        "processor time on one core, wall time on all.",
        table(header, rows),
        "On one core this is what the library's Python costs. On several, CPython's threads also pass the interpreter "
        "lock from core to core at every small tensor operation (the control, two threads that never exchange "
        "anything, pays for nothing else) and wake each other, which takes a core longer than an operation here.",
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m decoupled.benchmarks.overhead", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=Options.rounds, help=f"default {Options.rounds}")
    add("--batches", type=int, default=Options.batches, help=f"per contestant and round (default {Options.batches})")
    add("--cores", type=int, nargs="+", help="measure on these cores only, and print JSON")
    add("--out", type=Path, default=RESULTS, help="folder of overhead.md")
    given = parser.parse_args(arguments)
    if given.rounds < 1 or given.batches < 50:
        parser.error("--rounds must be at least 1, --batches at least 50")
    if given.cores:
        os.sched_setaffinity(0, given.cores)
        print(json.dumps(rounds(given.rounds, given.batches)))
        return 0
    options = Options(given.rounds, given.batches, given.out)
    return produce(lambda say: run(options, say), options.out)


if __name__ == "__main__":
    sys.exit(main())
