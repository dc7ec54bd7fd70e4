"""AMPNet's figures: throughput, epochs and staleness of graphs of nodes on two workers; `python -m` this module.

    throughput   list reduction: instances in flight against one at a time, and the synchronous model in one thread
    trees        ListOps: the Tree-LSTM against a loop over nodes and trees, and against minibatches by height
    epochs       list reduction: epochs until 97 % of the held-out sequences are right, graph against synchronous
    deduction    bAbI task 15: held-out graphs
    grid         min_update_frequency x max_active_keys: throughput, epochs, staleness, cache

Contestants of a timed part run one at a time in turned order, round by round, and ratios are taken within a round.
Every part is a section of ``benchmarks/results/ampnet.md`` with its command; the parts may be run separately.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from decoupled.benchmarks.page import environment, produce, table, verdict
from decoupled.benchmarks.peers.dynamic import Minibatch, Nodes, OneByOne, Reached, epochs_to
from decoupled.benchmarks.speed import RESULTS, Spread, machine
from decoupled.graph import Task
from decoupled.tasks.gated_graph import Babi15
from decoupled.tasks.recurrent import ListReduction
from decoupled.tasks.tree import ListOps

Say = Callable[[str], None]
TITLE = "# AMPNet: graphs of nodes on two workers"


@dataclass(frozen=True)
class Options:
    """The command line; see `--help`."""

    parts: tuple[str, ...] = ()
    rounds: int = 5
    instances: int = 100
    hidden: int = 128
    epochs: int = 25
    seeds: int = 1
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
        "epochs": "at most, where a target is waited for",
        "seeds": "of the parts that learn",
        "train": "training sequences of list reduction in `epochs`",
    }.items():
        add(f"--{name}", type=int, default=getattr(Options, name), help=f"{text} (default {getattr(Options, name)})")
    add("--runtime", choices=("threads", "processes"), default=Options.runtime, help="of the graphs")
    add("--out", type=Path, default=RESULTS, help="folder of ampnet.md")
    given = parser.parse_args(arguments)
    if wrong := [part for part in given.parts if part not in PARTS]:
        parser.error(f"unknown part {wrong[0]!r}; choose from {', '.join(PARTS)}")
    given.parts = tuple(given.parts or PARTS)
    return Options(**vars(given))


def interleaved(
    contestants: Mapping[str, Callable[[], Minibatch | Nodes]], rounds: int, say: Say
) -> dict[str, list[float]]:
    """Samples per second of every contestant in every round; each starts anew, and its first epoch is not measured."""
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            made = contestants[name]()
            with made if isinstance(made, Nodes) else contextlib.nullcontext():
                made.fit("validation")
                speeds[name].append(made.fit("train").speed)
        say(f"round {number + 1}: " + ", ".join(f"{name} {speeds[name][-1]:.0f}/s" for name in names))
    return speeds


def ratio(speeds: Mapping[str, Sequence[float]], ours: str, theirs: str) -> Spread:
    """Ratio of two contestants, round by round."""
    return Spread.of([a / b for a, b in zip(speeds[ours], speeds[theirs], strict=True)])


def throughput(options: Options, say: Say) -> str:
    sizes = {"train": 100 * options.instances, "validation": 1000, "test": 10}
    task = ListReduction(hidden=options.hidden, data=sizes)
    workers = {"workers": 2, "runtime": options.runtime, "min_update_frequency": 10}
    contestants: dict[str, Callable[[], Minibatch | Nodes]] = {
        f"max_active_keys={keys}": lambda keys=keys: Nodes(task, adam(), max_active_keys=keys, **workers)
        for keys in (1, 2, 4, 8)
    }
    first, *others = contestants
    contestants["max_active_keys=4, two of the recurrent node"] = lambda: Nodes(
        task, adam(), max_active_keys=4, replicas={"recurrent": 2}, **workers
    )
    contestants["synchronous, one thread"] = lambda: Minibatch(task, adam(), 1)
    speeds = interleaved(contestants, options.rounds, say)
    best = max(others, key=lambda name: Spread.of(speeds[name]).median)
    found = ratio(speeds, best, first)
    return "\n\n".join(
        [
            f"List reduction, hidden {options.hidden}, instances of at most 100 sequences; {task.description}. Two "
            f"workers ({options.runtime}), nodes placed by measured cost, min_update_frequency 10.",
            figure(f"best max_active_keys ({best.split('=')[1]}) / max_active_keys=1", found, 1.6),
            table(
                ["contestant", "sequences/s", "over max_active_keys=1"],
                [
                    [name, Spread.of(values).text(".0f"), ratio(speeds, name, first).text()]
                    for name, values in speeds.items()
                ],
            ),
        ]
    )


def figure(title: str, found: Spread, must: float | None) -> str:
    """A table of one figure."""
    reached = None if must is None else found.median >= must
    row = [title, "" if must is None else f">= {must}", found.text(), verdict(reached)]
    return table(["figure", "must reach", "measured", "reached"], [row])


def trees(options: Options, say: Say) -> str:
    task = ListOps(hidden=options.hidden, data={"train": options.instances, "validation": 20, "test": 1})
    how: dict[str, Any] = {"max_active_keys": 8, "min_update_frequency": 16}
    two: dict[str, Any] = how | {"replicas": {"branch": 2}}
    contestants: dict[str, Callable[[], Minibatch | Nodes]] = {
        "graph, two threads": lambda: Nodes(task, adam(), workers=2, runtime="threads", **two),
        "graph, two processes": lambda: Nodes(task, adam(), workers=2, runtime="processes", **two),
        "graph, one worker": lambda: Nodes(task, adam(), workers=1, runtime="threads", **how),
        "loop": lambda: OneByOne(task, adam(), 16),
        "by height": lambda: Minibatch(task, adam(), 16),
    }
    speeds = interleaved(contestants, options.rounds, say)
    ours = max(list(contestants)[:2], key=lambda name: Spread.of(speeds[name]).median)
    nodes = sum(len(tree) for tree in task.data.train) / options.instances
    rows = [(ours, "loop", 1.5), (ours, "by height", None), ("graph, one worker", "loop", None)]
    lines = [(f"{a} / {b}", ratio(speeds, a, b), must) for a, b, must in rows]
    return "\n\n".join(
        [
            f"Tree-LSTM, hidden {options.hidden}; {task.description}; {nodes:.0f} nodes per tree. `loop`: plain "
            "PyTorch, node after node and tree after tree, one thread; `by height`: 16 trees at a time, all nodes of "
            "one height in one call, one thread; both step after 16 trees. The graph has max_active_keys 8, "
            "min_update_frequency 16 (gradients of a node), and on two workers two of the branch node.",
            "\n".join([figure(*lines[0]), *(figure(*line).splitlines()[-1] for line in lines[1:])]),
            table(["contestant", "trees/s"], [[name, Spread.of(v).text(".0f")] for name, v in speeds.items()]),
        ]
    )


def epochs(options: Options, say: Say) -> str:
    task = ListReduction(hidden=options.hidden, data={"train": options.train})
    rows, ratios = [], []
    for seed in range(options.seeds):
        say(f"synchronous, seed {seed}")
        plain = epochs_to(Minibatch(task, adam(RATE), 1, seed), 0.97, options.epochs, say)
        say(f"graph, seed {seed}")
        with Nodes(task, adam(RATE), seed, **LEARNING, runtime=options.runtime) as nodes:
            graph = epochs_to(nodes, 0.97, options.epochs, say)
        relative = graph.epochs / plain.epochs if graph.epochs and plain.epochs else None
        ratios.append(relative)
        shown = [plain.text(), graph.text(), "" if relative is None else f"{relative:.2f}"]
        rows.append([str(seed), *shown, f"{plain.seconds:.0f}", f"{graph.seconds:.0f}"])
    reached = all(relative is not None and relative <= 1.2 for relative in ratios)
    header = ["seed", "epochs, synchronous", "epochs, graph", "ratio", "s, synchronous", "s, graph"]
    settings = ", ".join(f"{key}={value}" for key, value in LEARNING.items())
    return "\n\n".join(
        [
            f"List reduction until 97 % of the validation sequences are right, hidden {options.hidden}; "
            f"{task.description}. Adam with learning rate {RATE:g}; synchronous: a step after every instance of at "
            f"most 100 sequences; graph: {settings}, {options.runtime}.",
            f"Epochs within 1.2x of synchronous: {verdict(reached)}. The seconds were not taken on a quiet machine.",
            table(header, rows),
        ]
    )


RATE = 5e-4
LEARNING: dict[str, Any] = {
    "workers": 2, "max_active_keys": 2, "min_update_frequency": 6, "frequencies": {"out": 1},
}  # fmt: skip


def deduction(options: Options, say: Say) -> str:
    rows, task = [], Babi15()
    for seed in range(max(3, options.seeds)):
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
    target = 0.9
    task = ListReduction(hidden=options.hidden, data={"train": 20_000, "validation": 2_000, "test": 10})
    rows = []
    for muf in (1, 10, 50):
        for keys in (1, 4, 16):
            with Nodes(
                task, adam(), workers=2, max_active_keys=keys, min_update_frequency=muf, runtime=options.runtime
            ) as nodes:
                found = epochs_to(nodes, target, options.epochs, lambda line: None)
                rows.append([f"{muf} x {keys}", *_statistics(nodes, found)])
            say(" | ".join(rows[-1]))
    plain = epochs_to(Minibatch(task, adam(), 1), target, options.epochs, lambda line: None)
    rows.append(["synchronous", f"{_speed(task, plain):.0f}", plain.text(), "0", "0", ""])
    header = [
        "muf x max_active_keys",
        "sequences/s",
        f"epochs to {100 * target:.0f} %",
        "staleness, mean",
        "max",
        "peak cache",
    ]
    return "\n\n".join(
        [
            f"List reduction, hidden {options.hidden}; {task.description}; Adam with learning rate 0.001, two workers "
            f"({options.runtime}). Staleness is of the recurrent node: its own updates between forward and backward; "
            "peak cache: most states it remembered at once.",
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
    "throughput": throughput, "trees": trees, "epochs": epochs, "deduction": deduction, "grid": grid,
}  # fmt: skip


def run(options: Options, words: Sequence[str], say: Say) -> dict[str, str]:
    """Run the parts and put them into the page in place of what it said before."""
    path = options.out / "ampnet.md"
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
    return {"ampnet.md": "\n".join([f"{TITLE}\n", *body])}


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
