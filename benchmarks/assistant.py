"""What the assistant costs the boss: its throughput with an assistant that lets everything through, over without one.

    python -m decoupled.benchmarks.assistant [--rounds 7] [--batches 48]

    without   one block trained by backpropagation: two processes, the block in one, what feeds it in the other
              (uniform with fraction 1: no assistant, no losses told); threads: plain backprop
    with      autoassist, gamma = 1, lag = 0: the same boss, and an assistant that learns from its losses

Two workers in both cases. gamma = 1 accepts every sample, so both train on the same batches; the assistant has to keep
up with its learning beside. Ratios are taken within a round, the order turns from round to round.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from decoupled import Trainer, models
from decoupled.benchmarks.page import environment, machine, produce, table, verdict
from decoupled.benchmarks.speed import RESULTS
from decoupled.runtime.contract import intra_op_threads

LIMIT = 0.97
CONTESTANTS: dict[str, Any] = {
    "without, two processes": {"name": "uniform", "fraction": 1.0},
    "with, two processes": {"name": "autoassist", "gamma": 1.0},
    "without, threads": "backprop",
    "with, threads": {"name": "autoassist", "gamma": 1.0},
}


def data(batches: int, size: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Random images and labels."""
    draw = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, 1, 28, 28, generator=draw),
            torch.randint(10, (size,), generator=draw),
            torch.arange(n * size, (n + 1) * size),
        )
        for n in range(batches)
    ]


def trainer(name: str) -> Trainer:
    """One contestant, made ready."""
    runtime: Any = {"name": "processes", "processes": 2} if "processes" in name else "threads"
    network = nn.Sequential(*models.build({"name": "resnet", "depth": 20}, (1, 28, 28), 10, seed=0))
    return Trainer(
        [network], CONTESTANTS[name], loss=nn.functional.cross_entropy, runtime=runtime,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    )  # fmt: skip


def measure(rounds: int, batches: int, say: Callable[[str], None]) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Samples per second of every contestant in every round, and what the selectors counted."""
    given, rates = data(batches, 64), {name: list[float]() for name in CONTESTANTS}
    trainers = {name: trainer(name) for name in CONTESTANTS}
    try:
        for one in trainers.values():
            one.fit(given[:4], epochs=2)  # warm-up: in the first epoch the assistant is not asked
        names = list(CONTESTANTS)
        for number in range(rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                rates[name].append(trainers[name].fit(given)[0]["samples_per_second"])
            say(f"round {number + 1}: " + ", ".join(f"{name} {rates[name][-1]:.0f}" for name in names))
        return rates, {name: one.selected() for name, one in trainers.items() if "with," in name}
    finally:
        for one in trainers.values():
            one.close()


def page(rates: dict[str, list[float]], counted: dict[str, Any], head: str) -> str:
    """The page."""
    rows = []
    for where in ("two processes", "threads"):
        pairs = zip(rates[f"with, {where}"], rates[f"without, {where}"], strict=True)
        ratios = [mine / theirs for mine, theirs in pairs]
        middle = median(ratios)
        asked = f">= {LIMIT}" if where == "two processes" else ""
        reached = verdict(middle >= LIMIT if asked else None)
        rows.append([where, asked, f"{middle:.3f} ({min(ratios):.3f} .. {max(ratios):.3f})", reached])
    told = [f"{name}: {c.packets} messages with losses used, {c.dropped} dropped" for name, c in counted.items()]
    used = "; ".join(told)
    return "\n\n".join(
        [
            "# What the assistant costs the boss",
            f"{head} ResNet-20, inputs 1x28x28, batch 64, random data, one block. Throughput with an assistant that "
            "accepts everything (gamma = 1) and learns beside, over the same without it: median (least .. most). In "
            "two processes the boss has one of its own, and so has what feeds it, in both cases.",
            table(["boss in", "must reach", "with / without", "reached"], rows),
            used + ".",
        ]
    ) + "\n"  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(prog="python -m decoupled.benchmarks.assistant", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=48, help="of 64 samples, in every round")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page")
    given = parser.parse_args(arguments)
    if min(given.rounds, given.batches) < 1:
        parser.error("rounds and batches must be at least 1")
    began, start = datetime.now(UTC), time.monotonic()

    def make(say: Callable[[str], None]) -> dict[str, str]:
        with intra_op_threads(1):
            rates, counted = measure(given.rounds, given.batches, say)
        words = f"assistant --rounds {given.rounds} --batches {given.batches}"
        return {"assistant.md": page(rates, counted, environment(machine(began), words, time.monotonic() - start))}

    return produce(make, given.out)


if __name__ == "__main__":
    sys.exit(main())
