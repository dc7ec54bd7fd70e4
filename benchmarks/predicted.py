"""Predicted speed: `decoupled simulate profile=DIR` against the run of the same configuration; `python -m` this module.

Every round trains each method twice on two workers, once with events recorded (the profile) and once without (the
measurement), in turned order. The prediction is the time that the simulation gives an epoch of as many minibatches,
filling and draining included; it is compared with the last epoch of the measured run. The last column predicts from the
profile of `backprop`, whose blocks never run at the same time. Results go to ``benchmarks/results/predicted.md``.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from decoupled.benchmarks.page import environment, machine, produce, table, verdict
from decoupled.benchmarks.speed import RESULTS, Spread
from decoupled.config import Recipe, TrainConfig
from decoupled.experiment import Setting
from decoupled.runtime.timing import Timing
from decoupled.simulate import Load, simulate
from decoupled.simulate.profile import load_profile
from decoupled.train import train

METHODS = ("backprop", "pipedream", "features_replay", "one_f_one_b", "greedy_local")
WITHIN = 0.10


@dataclass(frozen=True)
class Options:
    """The command line; see `--help`."""

    rounds: int = 3
    epochs: int = 2
    model: str = "resnet20"
    data: str = "digits"
    out: Path = RESULTS


def run(options: Options, say: Callable[[str], None]) -> dict[str, str]:
    """Measure; returns the page by its file name."""
    started, begun = datetime.datetime.now(datetime.UTC), time.monotonic()
    torch.set_num_threads(2)  # one per block
    ratios: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    cuts = Setting.prepare(TrainConfig(data=options.data, model=options.model, blocks=2, method=METHODS[0])).cuts
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            measured: dict[str, float] = {}
            batches = 1
            for method in METHODS[number % len(METHODS) :] + METHODS[: number % len(METHODS)]:
                recipe = Recipe(lr=0.05, epochs=options.epochs)
                config = TrainConfig(data=options.data, model=options.model, blocks=cuts, recipe=recipe, method=method)
                for profiled in (True, False) if number % 2 else (False, True):
                    out = Path(folder) / method if profiled else None
                    found = train(config, out, events=2000 if profiled else 0, quiet=True)
                    assert found is not None
                    if not profiled:
                        measured[method] = found["history"][-1]["seconds"]
                        batches = -(-int(found["history"][-1]["samples"]) // recipe.batch_size)
            for method in METHODS:
                own, other = (predict(Path(folder) / source, method, batches) for source in (method, "backprop"))
                ratios[method].append((own / measured[method], other / measured[method]))
                say(f"round {number + 1}: {method}: predicted / measured {own / measured[method]:.3f}")
    return {"predicted.md": page(ratios, options, machine(started), time.monotonic() - begun)}


def predict(folder: Path, method: str, batches: int) -> float:
    """Seconds of an epoch."""
    profile = load_profile(folder)
    timing = Timing(profile.forward, profile.backward, profile.step, latency=profile.latency)
    load = Load(profile.activation, profile.graph, profile.weights)
    return simulate(method, profile.blocks, batches, timing, load=load).time


def page(ratios: dict[str, list[tuple[float, float]]], options: Options, facts: dict[str, Any], seconds: float) -> str:
    """The results as a page."""
    rows = []
    for method, found in ratios.items():
        own, other = (Spread.of([pair[i] for pair in found]) for i in (0, 1))
        rows.append([method, own.text(), verdict(abs(own.median - 1) <= WITHIN), other.text()])
    header = ["predicted / measured seconds", "from its own profile", "within 10 %", "from the profile of backprop"]
    text = (
        f" {options.model} on {options.data}, batch {Recipe.batch_size}, two blocks (cut by measured time) on the "
        f"runtime `threads`. {options.rounds} rounds; shown are median (lowest .. highest) of the time predicted for "
        "an epoch over the time measured in another run of the same round."
    )
    command = f"predicted --rounds {options.rounds} --epochs {options.epochs}"
    return "\n\n".join(["# Predicted speed", environment(facts, command, seconds) + text, table(header, rows)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m decoupled.benchmarks.predicted", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=Options.rounds, help=f"default {Options.rounds}")
    add("--epochs", type=int, default=Options.epochs, help=f"of every run (default {Options.epochs})")
    add("--model", default=Options.model, help=f"default {Options.model}")
    add("--data", default=Options.data, help=f"default {Options.data}")
    add("--out", type=Path, default=RESULTS, help="folder of predicted.md")
    given = parser.parse_args(arguments)
    if min(given.rounds, given.epochs) < 1:
        parser.error("--rounds and --epochs must be at least 1")
    options = Options(**vars(given))
    return produce(lambda say: run(options, say), options.out)


if __name__ == "__main__":
    sys.exit(main())
