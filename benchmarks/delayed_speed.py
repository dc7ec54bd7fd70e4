"""Delayed gradients: how fast every method of the registry is on two workers; `python -m` this module.

    keeps graphs     throughput of two threads over the plain loop of torch
    replays          two threads against the method's own bound: its slower block alone on one core, replay included
    reverses         two threads against the method's own work in one thread, on a reversible network

Which methods these are follows from what they keep (`Method.retention`) and from gradients being late. The network is
cut as `decoupled.split` cuts it for blocks that replay where these do, so one kind may be cut in two places. *At once*
is what the machine allows: both blocks' own work side by side, nobody waits for anybody. What a ratio
compares runs right after one another, one at a time, in the opposite order every other round: laps of one contestant
can be 1.5 times apart on a machine that is shared, and its pace drifts. Results go to
``benchmarks/results/delayed_speed.md``.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from decoupled.benchmarks.page import environment, machine, produce, table, verdict
from decoupled.benchmarks.peers import alone, contest, library, plain
from decoupled.benchmarks.peers.contest import KEEP, WARMUP, Group, Measurement
from decoupled.benchmarks.peers.setting import Run, Setting
from decoupled.benchmarks.speed import RESULTS, Spread, ideal
from decoupled.method import Method
from decoupled.testing import label, point, variants

K = 2
KINDS = ("keeps graphs", "replays", "reverses")
PLAIN = "plain loop"
MUST = {"keeps graphs": 1.80, "replays": 0.95, "reverses": 1.70}
Round = Mapping[str, Measurement]
Specs = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """The command line; see `--help`."""

    rounds: int = 3
    batches: int = 24
    patience: float = 0.0
    kinds: tuple[str, ...] = KINDS
    only: tuple[str, ...] = ()
    out: Path = RESULTS
    setting: Setting | None = None  # None: resnet20 and revnet, cut by measured time
    reversible: Setting | None = None


def kind(method: Method) -> str | None:
    """Which of `KINDS` a method belongs to; None: its gradients are not late, it mutates weights under a graph, or its
    blocks run on other inputs besides (target propagation)."""
    late = method.facts.delay(0, K) > 0 and K - 1 in method.facts.reach(0, K)
    if not late or method.retention.live or method.coupling.substitutes:
        return None
    if not method.retention.recomputes:
        return "keeps graphs"
    return "reverses" if method.retention.keeps == "nothing" else "replays"


def contestants(wanted: str, only: Sequence[str] = ()) -> Specs:
    """label -> spec of every registered method of a kind: as it is by default, else the first variant that is one."""
    found: Specs = {}
    for spec in variants():
        if kind(point(spec)) == wanted and spec["name"] not in {other["name"] for other in found.values()}:
            found[label(spec)] = spec
    return {name: spec for name, spec in found.items() if not only or spec["name"] in only}


def alike(specs: Specs) -> list[tuple[tuple[bool, ...], Specs]]:
    """The methods that replay in the same blocks, which are the blocks that the network is cut for."""
    found: dict[tuple[bool, ...], Specs] = {}
    for name, spec in specs.items():
        found.setdefault(tuple(point(spec).replays(k, K) for k in range(K)), {})[name] = spec
    return sorted(found.items())


def build(setting: Setting, rank: int, specs: Specs) -> dict[str, Run]:
    """The library's contestants of one kind, in one process that only one of them uses at a time."""
    return {name: library.build(setting, rank, spec, K)["run"] for name, spec in specs.items()}  # type: ignore[arg-type]


def groups(wanted: str, specs: Specs) -> list[Group]:
    """The processes of one kind."""
    ours = Group(build, {name: name for name in specs}, options={"specs": specs})
    if wanted == "keeps graphs":
        return [Group(plain.build, {"run": PLAIN}, share=0.5), ours]
    parts = [part for name in specs for _, part in bout(wanted, name)[1:]]
    return [ours, Group(alone.build, {part: part for part in parts}, 1, 0.5, KEEP, {"specs": specs})]


def bout(wanted: str, name: str) -> contest.Bout:
    """A method, and what its figure compares it with."""
    if wanted == "keeps graphs":
        return [(name, name), (f"{name} {PLAIN}", PLAIN)]
    parts = alone.PARTS if wanted == "reverses" else alone.PARTS[1:]
    return [(one, one) for one in (name, *(f"{name} {part}" for part in parts))]


def ratio(wanted: str, name: str, round: Round) -> tuple[float, float]:
    """The figure of one method in one round, and the most that it could be."""
    ours = round[name].seconds
    if wanted == "keeps graphs":
        return round[f"{name} {PLAIN}"].seconds / ours, float("nan")
    slower = max(round[f"{name} block {k}"].seconds for k in range(K))
    if wanted == "replays":
        return slower / ours, 1.0
    serial = round[f"{name} serial"].seconds
    return serial / ours, serial / slower


def run(options: Options, say: Callable[[str], None]) -> dict[str, str]:
    """Measure; returns the page by its file name."""
    started, begun = datetime.datetime.now(datetime.UTC), time.monotonic()
    jobs = [
        (wanted, _setting(options, wanted, where), where, specs)
        for wanted in options.kinds
        for where, specs in alike(contestants(wanted, options.only))
    ]
    parts, limits = [], {}
    for wanted, setting, where, specs in jobs:
        say(f"{wanted}: {', '.join(specs)}; {setting.model}, cut before unit {setting.cut}")
        if wanted == "keeps graphs":
            limits = contest.weigh_blocks(setting, options.rounds, max(1, options.batches // 8), options.patience)
        bouts = [bout(wanted, name) for name in specs]
        held = contest.hold_rounds(
            setting, groups(wanted, specs), options.rounds, options.batches, options.patience, say, bouts
        )
        parts.append(section(wanted, setting, specs, list(held), limits, everywhere=all(where)))
    facts = machine(started)
    return {"delayed_speed.md": page(parts, options, facts, time.monotonic() - begun)}


def _setting(options: Options, wanted: str, where: Sequence[bool]) -> Setting:
    given = options.reversible if wanted == "reverses" else options.setting
    if given is not None:
        return given
    setting = Setting(model="revnet") if wanted == "reverses" else Setting()
    return replace(setting, cut=contest.find_cut(setting, where.__getitem__))


def section(
    wanted: str, setting: Setting, specs: Specs, rounds: Sequence[Round], limits: Mapping[str, Sequence[float]],
    everywhere: bool = False,
) -> str:  # fmt: skip
    """One kind of method as a part of the page."""
    titles = {
        "keeps graphs": ("## Methods that keep graphs", "two threads / plain loop"),
        "replays": ("## Methods that replay", "own bound / two threads"),
        "reverses": ("## Methods that reverse", "own work in one thread / two threads"),
    }
    title, figure = titles[wanted]
    rows = []
    for name in specs:
        found = [ratio(wanted, name, one) for one in rounds]
        spread, most = Spread.of([a for a, _ in found]), Spread.of([b for _, b in found])
        rows.append(
            [
                name,
                f">= {MUST[wanted]:.2f}",
                spread.text(),
                "" if most.median != most.median else f"{most.median:.2f}",
                verdict(spread.median >= MUST[wanted]),
                *_times(wanted, name, rounds),
            ]
        )
    columns = ["two threads, ms per batch", "others, cores"]
    columns += [] if wanted == "keeps graphs" else ["alone: block 0, block 1, ms", "at once / two threads"]
    header = ["method", "must", figure, "limit", "reached", *columns]
    title += ", the top block too" if everywhere else ""
    return "\n\n".join([title, _task(wanted, setting, limits, everywhere), table(header, rows)])


def _times(wanted: str, name: str, rounds: Sequence[Round]) -> list[str]:
    def milliseconds(who: str) -> str:
        return f"{Spread.of([one[who].seconds * 1e3 for one in rounds]).median:.1f}"

    cells = [milliseconds(name), f"{max(abs(one[name].others) for one in rounds):.2f}"]
    if wanted == "keeps graphs":
        return cells
    together = Spread.of([one[f"{name} at once"].seconds / one[name].seconds for one in rounds])
    return [*cells, ", ".join(milliseconds(f"{name} block {k}") for k in range(K)), together.text()]


def _task(wanted: str, setting: Setting, limits: Mapping[str, Sequence[float]], everywhere: bool) -> str:
    image = "x".join(map(str, setting.image))
    text = f"{setting.model}, inputs {image}, batch {setting.batch_size}, two blocks, cut before unit {setting.cut}."
    if wanted == "keeps graphs":
        times = f"{ideal(limits, 'gradient'):.2f} times"
        return f"{text} Blocks that never wait are {times} as fast there as the whole network; all keep freed memory."
    which = "Every block" if everywhere else "Every block below the top"
    does = "makes its input again from its output" if wanted == "reverses" else "replays what it has not kept"
    return (
        f"{text} {which} {does}; *alone* is one block on one core, given the messages of a run, *at once* the same for "
        "both blocks side by side, which never wait for one another."
    )


def page(parts: Sequence[str], options: Options, facts: Mapping[str, Any], seconds: float) -> str:
    """The results as a page."""
    how = (
        "SGD with momentum, cross entropy, synthetic data; one intra-op thread per worker. "
        f"{options.rounds} rounds of {options.batches} batches (half of it for what runs on one core) after {WARMUP} "
        "batches of warm-up; what a ratio compares runs right after one another, in the opposite order every other "
        "round; shown are median (lowest .. highest). Filling and draining are included. *Others*: cores that other "
        "programs used in the worst round; figures hold for an idle machine. What methods hold per block is tested to "
        "equal the formula of their cards exactly: `pytest tests/zoo/test_memory.py`."
    )
    head = f"{environment(facts, _command(options), seconds)} {how}"
    return "\n\n".join(["# Speed of methods with late gradients", head, *parts]) + "\n"


def _command(options: Options) -> str:
    words = f"delayed_speed --rounds {options.rounds} --batches {options.batches}"
    words += f" --patience {options.patience:g}" if options.patience else ""
    words += f" --kinds '{';'.join(options.kinds)}'" if options.kinds != KINDS else ""
    return words + (f" --only '{';'.join(options.only)}'" if options.only else "")


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m decoupled.benchmarks.delayed_speed", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=Options.rounds, help="default 3")
    add("--batches", type=int, default=Options.batches, help="per contestant and round (default 24)")
    add("--patience", type=float, default=0.0, help="seconds to wait, before each run, for others to leave the cores")
    add("--kinds", default=";".join(KINDS), help=f"which, separated by ';' (default all): {'; '.join(KINDS)}")
    add("--only", default="", help="methods, separated by ';' (default all)")
    add("--out", type=Path, default=RESULTS, help="folder of delayed_speed.md")
    given = vars(parser.parse_args(arguments))
    for name in ("kinds", "only"):
        given[name] = tuple(word.strip() for word in given[name].split(";") if word.strip())
    known = {spec["name"] for wanted in KINDS for spec in contestants(wanted).values()}
    if wrong := [word for word in given["kinds"] if word not in KINDS] + [w for w in given["only"] if w not in known]:
        parser.error(f"unknown {wrong[0]!r}; kinds: {'; '.join(KINDS)}; methods: {'; '.join(sorted(known))}")
    if given["rounds"] < 1 or given["batches"] < 1 or given["batches"] % (2 * alone.CHUNK):
        parser.error(f"--rounds must be at least 1, and --batches a multiple of {2 * alone.CHUNK}")
    return Options(**given)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    options = parse(arguments)
    return produce(lambda say: run(options, say), options.out)


if __name__ == "__main__":
    sys.exit(main())
