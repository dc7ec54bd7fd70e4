"""AMPNet's figures: throughput, epochs and staleness of graphs of nodes on two workers; `python -m` this module.

    throughput   list reduction: instances in flight against one at a time, and the synchronous model in one thread
    trees        ListOps: the Tree-LSTM against a loop over nodes and trees, and against minibatches by height
    reduction    list reduction: epochs until 97 % of the held-out sequences are right, graph against synchronous,
                 each with the best of as many settings
    deduction    bAbI task 15: held-out graphs
    grid         min_update_frequency x max_active_keys: throughput, epochs, staleness, cache

Contestants of a timed part run one at a time in turned order, round by round, and ratios are taken within a round.
Every part is a section of ``benchmarks/results/ampnet_figures.md`` with its command; the parts may be run separately,
and `python -m decoupled.benchmarks.publish` carries the page into the card.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from decoupled.benchmarks.page import environment, machine, produce, table, verdict
from decoupled.benchmarks.peers.dynamic import Minibatch, Nodes, OneByOne, Reached, epochs_to
from decoupled.benchmarks.speed import RESULTS, Spread
from decoupled.graph import Task
from decoupled.steps import MakeScheduler
from decoupled.tasks.gated_graph import Babi15
from decoupled.tasks.recurrent import ListReduction
from decoupled.tasks.tree import ListOps

Say = Callable[[str], None]
TITLE = "# AMPNet: graphs of nodes on two workers"
PAGE = "ampnet_figures.md"


@dataclass(frozen=True)
class Options:
    """The command line; see `--help`."""

    parts: tuple[str, ...] = ()
    rounds: int = 5
    instances: int = 100
    hidden: int = 128
    epochs: int = 15
    seeds: int = 3
    train: int = 100_000
    runtime: str = "threads"
    out: Path = RESULTS


def adam(rate: float = 1e-3) -> Callable[[Any], torch.optim.Optimizer]:
    """Adam for every node, or for the whole synchronous model."""
    return lambda parameters: torch.optim.Adam(parameters, rate)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m decoupled.benchmarks.ampnet", description=__doc__)
    add = parser.add_argument
    add("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    for name, text in {
        "rounds": "of the timed parts",
        "instances": "per contestant and round",
        "hidden": "width of all models but bAbI's",
        "epochs": "at most, where a target is waited for; in `reduction` the learning rate falls to zero over them",
        "seeds": "of the parts that learn",
        "train": "training sequences of list reduction in `reduction`",
    }.items():
        add(f"--{name}", type=int, default=getattr(Options, name), help=f"{text} (default {getattr(Options, name)})")
    add("--runtime", choices=("threads", "processes"), default=Options.runtime, help="of the graphs")
    add("--out", type=Path, default=RESULTS, help="folder of the page")
    given = parser.parse_args(arguments)
    if wrong := [part for part in given.parts if part not in PARTS]:
        parser.error(f"unknown part {wrong[0]!r}; choose from {', '.join(PARTS)}")
    given.parts = tuple(given.parts or PARTS)
    return Options(**vars(given))


def interleaved(
    contestants: Mapping[str, Callable[[], Minibatch | Nodes]], rounds: int, say: Say
) -> dict[str, list[float]]:
    """Samples per second of every contestant in every round; the first epoch of each is not measured."""
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    with contextlib.ExitStack() as open_:
        made: dict[str, Minibatch | Nodes] = {}
        for name in names:
            one = contestants[name]()
            made[name] = open_.enter_context(one) if isinstance(one, Nodes) else one
            one.fit("validation")
        for number in range(rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                speeds[name].append(made[name].fit("train").speed)
            say(f"round {number + 1}: " + ", ".join(f"{name} {speeds[name][-1]:.0f}/s" for name in names))
    return speeds


def ratio(speeds: Mapping[str, Sequence[float]], ours: str, theirs: str) -> Spread:
    """Ratio of two contestants, round by round."""
    return Spread.of([a / b for a, b in zip(speeds[ours], speeds[theirs], strict=True)])


KEYS = (1, 2, 4, 8, 16)


def throughput(options: Options, say: Say) -> str:
    sizes = {"train": 100 * options.instances, "validation": 1000, "test": 10}
    task = ListReduction(hidden=options.hidden, data=sizes)
    how: dict[str, Any] = {"workers": 2, "runtime": options.runtime, "min_update_frequency": 10}
    contestants: dict[str, Callable[[], Minibatch | Nodes]] = {}
    for copies in (1, 2):
        for keys in KEYS:
            more = how | {"max_active_keys": keys, "replicas": {"recurrent": copies}}
            contestants[_named(keys, copies)] = lambda more=more: Nodes(task, adam(), **more)
    contestants["synchronous, one thread"] = lambda: Minibatch(task, adam(), 1)
    speeds = interleaved(contestants, options.rounds, say)
    figures, best = [], {copies: max(KEYS, key=lambda k: median(speeds[_named(k, copies)])) for copies in (1, 2)}
    for copies, keys in best.items():
        found = ratio(speeds, _named(keys, copies), _named(1, copies))
        figures.append((f"{_named(keys, copies)} / {_named(1, copies)}", found, 1.6))
    rows = [[name, Spread.of(v).text(".0f"), ratio(speeds, name, _named(1, 1)).text()] for name, v in speeds.items()]
    return "\n\n".join(
        [
            f"List reduction, hidden {options.hidden}, instances of at most 100 sequences; {task.description}. Two "
            f"workers ({options.runtime}), nodes placed by measured cost, min_update_frequency 10. The figure is the "
            "best max_active_keys over 1, with one recurrent node and with two (replicas, averaged after an epoch).",
            figure(*figures),
            table(["contestant", "sequences/s", f"over {_named(1, 1)}"], rows),
        ]
    )


def _named(keys: int, copies: int) -> str:
    return f"{keys} key{'s' * (keys > 1)}" + (f", {copies} recurrent nodes" if copies > 1 else "")


def median(speeds: Sequence[float]) -> float:
    return Spread.of(speeds).median


def figure(*rows: tuple[str, Spread, float | None]) -> str:
    """A table of figures: title, what was found, what must be reached."""
    cells = []
    for title, found, must in rows:
        reached = None if must is None else found.median >= must
        cells.append([title, "" if must is None else f">= {must}", found.text(), verdict(reached)])
    return table(["figure", "must reach", "measured", "reached"], cells)


STEP = 16  # trees per step


def trees(options: Options, say: Say) -> str:
    task = ListOps(hidden=options.hidden, data={"train": options.instances, "validation": 20, "test": 1})
    nodes = sum(len(tree) for tree in task.data.train) / options.instances
    inner = {"branch": round(STEP * (nodes - 1) / 2)}  # gradients of as many trees
    alone: dict[str, Any] = {"max_active_keys": 8, "min_update_frequency": STEP, "frequencies": inner}
    alone["replicas"] = {"branch": 2}
    together = {
        "max_active_keys": 16, "min_update_frequency": STEP, "frequencies": inner, "backward_first": False,
        "batches": dict.fromkeys(("leaf", "branch", "out"), 16),
    }  # fmt: skip

    def graph(how: dict[str, Any], workers: int, runtime: str) -> Callable[[], Nodes]:
        return lambda: Nodes(task, adam(), workers=workers, runtime=runtime, **how)

    contestants: dict[str, Callable[[], Minibatch | Nodes]] = {
        "batches, two threads": graph(together, 2, "threads"),
        "batches, two processes": graph(together, 2, "processes"),
        "singly, two threads": graph(alone, 2, "threads"),
        "singly, two processes": graph(alone, 2, "processes"),
        "batches, one worker": graph(together, 1, "threads"),
        "singly, one worker": graph(alone, 1, "threads"),
        "loop": lambda: OneByOne(task, adam(), STEP),
        "by height": lambda: Minibatch(task, adam(), STEP),
    }
    speeds = interleaved(contestants, options.rounds, say)
    batches, singly = (
        max((f"{how}, two {kind}" for kind in ("threads", "processes")), key=lambda name: median(speeds[name]))
        for how in ("batches", "singly")
    )
    pairs = [(batches, "loop", 1.5), (batches, "by height", None), (singly, "loop", None), (singly, "by height", None)]
    return "\n\n".join(
        [
            f"Tree-LSTM, hidden {options.hidden}; {task.description}; {nodes:.0f} nodes per tree. `loop`: plain "
            "PyTorch, node after node and tree after tree, one thread; `by height`: 16 trees at a time, all nodes of "
            "one height in one call, one thread. All step after the gradients of 16 trees. `singly`: every message by "
            "itself, as in the paper: max_active_keys 8, answers first, two of the branch node. `batches`: the option "
            "of this library to handle up to 16 messages that wait at a node in one call: max_active_keys 16, messages "
            "as they come.",
            figure(*[(f"{a} / {b}", ratio(speeds, a, b), must) for a, b, must in pairs]),
            table(
                ["contestant", "trees/s", "over the loop"],
                [[name, Spread.of(v).text(".0f"), ratio(speeds, name, "loop").text()] for name, v in speeds.items()],
            ),
        ]
    )


GOAL = 0.97
RATES = (2e-3, 1e-3)
LEARNING: dict[str, Any] = {
    "workers": 2, "max_active_keys": 2, "min_update_frequency": 6, "frequencies": {"out": 1},
}  # fmt: skip


def reduction(options: Options, say: Say) -> str:
    task = ListReduction(hidden=options.hidden, data={"train": options.train})
    falling = cosine(options.epochs)

    def run(kind: str, rate: float, seed: int) -> Reached:
        say(f"{kind}, learning rate {rate:g}, seed {seed}")
        if kind == "synchronous":
            return epochs_to(Minibatch(task, adam(rate), 1, seed, falling), GOAL, options.epochs, say)
        how = LEARNING | {"runtime": options.runtime, "scheduler": falling}
        with Nodes(task, adam(rate), seed, **how) as nodes:
            return epochs_to(nodes, GOAL, options.epochs, say)

    kinds = ("synchronous", "graph")
    tried = {(kind, rate): run(kind, rate, 0) for rate in RATES for kind in kinds}
    best = {kind: min(RATES, key=lambda r: tried[kind, r].epochs or 1 << 30) for kind in kinds}
    found = {(kind, 0): tried[kind, best[kind]] for kind in kinds}
    found |= {(kind, seed): run(kind, best[kind], seed) for seed in range(1, options.seeds) for kind in kinds}
    rows = []
    for seed in range(options.seeds):
        plain, graph = (found[kind, seed] for kind in kinds)
        relative = f"{graph.epochs / plain.epochs:.2f}" if graph.epochs and plain.epochs else ""
        shown = [plain.text(), graph.text(), relative]
        rows.append([str(seed), *shown, *(f"{100 * max(one.scores):.2f} %" for one in (plain, graph))])
    all_reached = all(one.epochs for one in found.values())
    totals = {kind: sum(found[kind, seed].epochs or 0 for seed in range(options.seeds)) for kind in kinds}
    relative = totals["graph"] / totals["synchronous"] if all_reached else math.nan
    settings = ", ".join(f"{key}={value}" for key, value in LEARNING.items())
    return "\n\n".join(
        [
            f"List reduction until 97 % of the validation sequences are right, hidden {options.hidden}; "
            f"{task.description}. Adam, the learning rate falls to zero over {options.epochs} epochs as a cosine, from "
            "epoch to epoch; synchronous: a step after every instance of at most 100 sequences; graph: "
            f"{settings}, {options.runtime}.",
            "Settings tried on seed 0, as many for both; the best of each was taken for the other seeds:",
            table(
                ["learning rate", *(f"epochs, {kind}" for kind in kinds)],
                [[f"{rate:g}", *(tried[kind, rate].text() for kind in kinds)] for rate in RATES],
            ),
            "Validation of 97 % with every seed, in at most 1.2x the epochs of synchronous over all seeds: "
            f"{verdict(relative <= 1.2)}" + (f", {relative:.2f}." if all_reached else ", not reached with every seed."),
            table(["seed", *(f"epochs, {kind}" for kind in kinds), "ratio", *(f"best, {k}" for k in kinds)], rows),
        ]
    )


def cosine(epochs: int) -> MakeScheduler:
    """The learning rate falls to zero over so many epochs."""

    def factor(epoch: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(epoch, epochs) / epochs))

    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def deduction(options: Options, say: Say) -> str:
    rows, task = [], Babi15()
    for seed in range(options.seeds):
        task = Babi15(data={"seed": seed})
        with Nodes(task, adam(0.01), seed, workers=2, max_active_keys=4, runtime=options.runtime) as nodes:
            found = epochs_to(nodes, 1.0, options.epochs, say)
            rows.append([str(seed), found.text(), f"{100 * nodes.evaluate('test'):.1f} %"])
    return "\n\n".join(
        [
            f"GGSNN, hidden 5, 2 steps; {task.description}. Adam with learning rate 0.01, max_active_keys 4, "
            f"min_update_frequency 1, two workers ({options.runtime}); the seed is of data and weights.",
            table(["seed", "epochs to 100 % of validation", "test"], rows),
        ]
    )


def grid(options: Options, say: Say) -> str:
    target = 0.8
    task = ListReduction(hidden=options.hidden, data={"train": 20_000, "validation": 2_000, "test": 10})
    rows = []
    for muf in (1, 6, 30):
        how: dict[str, Any] = {"min_update_frequency": muf, "frequencies": {"out": max(1, muf // 6)}}
        for keys in (1, 4, 16):
            how |= {"max_active_keys": keys, "runtime": options.runtime}
            with Nodes(task, adam(RATES[0]), workers=2, **how) as nodes:
                found = epochs_to(nodes, target, options.epochs, lambda line: None)
                rows.append([f"{muf} x {keys}", *_statistics(nodes, found)])
            say(" | ".join(rows[-1]))
    plain = epochs_to(Minibatch(task, adam(RATES[0]), 1), target, options.epochs, lambda line: None)
    rows.append(["synchronous", f"{_speed(task, plain):.0f}", plain.text(), "0", "0", ""])
    learned = f"epochs to {100 * target:.0f} %"
    header = ["muf x max_active_keys", "sequences/s", learned, "staleness, mean", "max", "peak cache"]
    return "\n\n".join(
        [
            f"List reduction, hidden {options.hidden}; {task.description}; Adam with learning rate {RATES[0]:g}, two "
            f"workers ({options.runtime}). min_update_frequency is that of the embedding and the recurrent node, which "
            "get a gradient per token; `out`, which gets one per instance, has a sixth of it. Staleness is of the "
            "recurrent node: its own updates between forward and backward; peak cache: most states it remembered at "
            "once.",
            table(header, rows),
        ]
    )


def _speed(task: Task, found: Reached) -> float:
    return sum(i.size for i in task.instances("train")) * len(found.scores) / found.seconds


def _statistics(nodes: Nodes, found: Reached) -> list[str]:
    """Cells of one setting: speed, epochs, staleness and cache of the recurrent node."""
    node = nodes.node("recurrent")
    mean = sum(late * count for late, count in node.staleness.items()) / sum(node.staleness.values())
    return [
        f"{_speed(nodes.task, found):.0f}", found.text(), f"{mean:.2f}", f"{max(node.staleness)}",
        f"{node.peak_kept} ({node.peak_held_bytes / 2**20:.1f} MiB)",
    ]  # fmt: skip


PARTS: dict[str, Callable[[Options, Say], str]] = {
    "throughput": throughput, "trees": trees, "reduction": reduction, "deduction": deduction, "grid": grid,
}  # fmt: skip


def run(options: Options, words: Sequence[str], say: Say) -> dict[str, str]:
    """Run the parts and put them into the page in place of what it said before."""
    path = options.out / PAGE
    sections = read(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for part in options.parts:
        say(part)
        torch.set_num_threads(1)
        started, clock = datetime.datetime.now(datetime.UTC), time.monotonic()
        others = [word for word in words if word not in (*PARTS, "--out", str(options.out))]
        text = PARTS[part](options, say)
        facts = environment(machine(started), " ".join(["ampnet", part, *others]), time.monotonic() - clock)
        sections[part] = f"{text}\n\n{facts}"
    body = [f"## {part}\n\n{sections[part].strip()}\n" for part in PARTS if part in sections]
    return {PAGE: "\n".join([f"{TITLE}\n", *body])}


def read(page: str) -> dict[str, str]:
    """Return the sections of a page."""
    _, *pieces = re.split(r"^## (\w+)\n", page, flags=re.MULTILINE)
    return dict(zip(pieces[::2], pieces[1::2], strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(words)
    return produce(lambda say: run(options, words, say), options.out)


if __name__ == "__main__":
    sys.exit(main())
