"""Speed: this library against the plain PyTorch loop and what torch offers for two cores; `python -m` this module.

Every round runs every contestant for the same job, one at a time, in turned order; ratios are taken within a round, and
the table shows their median and range over the rounds. A measured run of a pipeline includes filling and draining it.
Results go to ``benchmarks/results/speed.md`` and ``speed.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from decoupled.benchmarks.page import machine, where, write
from decoupled.benchmarks.peers import contest, simulator
from decoupled.benchmarks.peers.contest import Measurement
from decoupled.benchmarks.peers.setting import Setting

RESULTS = Path(__file__).resolve().parent / "results"
Round = Mapping[str, Measurement]


@dataclass(frozen=True)
class Spread:
    """Median and range over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, form: str = ".2f") -> str:
        """E.g. ``1.90 (1.88 .. 1.93)``."""
        return f"{self.median:{form}} ({self.low:{form}} .. {self.high:{form}})"


@dataclass(frozen=True)
class Figure:
    """A throughput ratio: `ours` over the fastest contestant whose name begins with `theirs`, round by round.

    `must` is what the median must reach (`strict`: exceed), None for controls.
    """

    title: str
    ours: str
    theirs: str
    must: float | None = None
    strict: bool = False
    limit: str = ""  # which blocks of `balance` bound it

    def ratios(self, rounds: Sequence[Round]) -> list[float] | None:
        """One ratio per round, or None if a contestant did not run."""
        rivals = [name for name in rounds[0] if name == self.theirs or name.startswith(f"{self.theirs} ")]
        if self.ours not in rounds[0] or not rivals:
            return None
        return [min(r[name].seconds for name in rivals) / r[self.ours].seconds for r in rounds]

    def reached(self, median: float) -> bool | None:
        """Whether the median suffices; None if nothing is asked."""
        if self.must is None:
            return None
        return median > self.must if self.strict else median >= self.must


OURS = ("greedy_local", "pipedream", "greedy_local, processes", "pipedream, processes")


def _against(theirs: str, label: str, must: float, strict: bool = False) -> list[Figure]:
    return [Figure(f"{ours} / {label}", ours, theirs, must, strict) for ours in OURS]


FIGURES = [
    Figure("1 block through the runtime / plain loop, 1 thread each", "1 block", "plain", 0.97),
    Figure("greedy_local, 2 blocks / plain loop", "greedy_local", "plain", 1.85, limit="local"),
    Figure("pipedream, 2 blocks / plain loop", "pipedream", "plain", 1.80, limit="gradient"),
    Figure("greedy_local, 2 processes / plain loop", "greedy_local, processes", "plain", 1.85, limit="local"),
    Figure("pipedream, 2 processes / plain loop", "pipedream, processes", "plain", 1.80, limit="gradient"),
    *_against("pipelining", "best torch pipelining schedule of the round", 1.3),
    *_against("DDP", "DistributedDataParallel, 2 ranks", 1.0, strict=True),
    *_against("plain, 2 threads", "plain loop with 2 intra-op threads", 1.0, strict=True),
    Figure("control: 1 block / plain loop that keeps freed memory", "1 block", "plain, memory kept"),
    Figure("control: greedy_local / plain loop that keeps freed memory", "greedy_local", "plain, memory kept"),
    Figure("control: pipedream / plain loop that keeps freed memory", "pipedream", "plain, memory kept"),
]


@dataclass(frozen=True)
class Options:
    """The command line; see `--help`."""

    rounds: int = 5
    batches: int = 48
    blocks: int = 1024  # of the simulation
    patience: float = 0.0
    only: tuple[str, ...] = ()
    out: Path = RESULTS
    setting: Setting | None = None  # None: resnet20, cut by measured time


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m decoupled.benchmarks.speed", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, help="rounds (default 5, at least 5 for a result worth keeping)")
    add("--batches", type=int, help="batches per contestant and round (default 48; the flushing pipelines half of it)")
    add("--quick", action="store_true", help="2 rounds of 8 batches and a small simulation: does it work?")
    add("--patience", type=float, default=0.0, help="seconds to wait, before each run, for others to leave the cores")
    add("--only", default="", help="contestants, separated by ';' (default all), e.g. 'plain;pipedream'")
    add("--out", type=Path, default=RESULTS, help="folder of speed.json and speed.md")
    given = parser.parse_args(arguments)
    rounds, batches, blocks = (2, 8, 128) if given.quick else (Options.rounds, Options.batches, Options.blocks)
    rounds = rounds if given.rounds is None else given.rounds
    batches = batches if given.batches is None else given.batches
    if rounds < 1 or batches < 1:
        parser.error("--rounds and --batches must be at least 1")
    only = tuple(name.strip() for name in given.only.split(";") if name.strip())
    known = contest.names(contest.groups())
    if wrong := [name for name in only if name not in known]:
        parser.error(f"unknown contestant {wrong[0]!r}; known: {'; '.join(known)}")
    return Options(rounds, batches, blocks, given.patience, only, given.out)


def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything; returns the record that is written as speed.json."""
    started, begun = datetime.datetime.now(datetime.UTC), time.perf_counter()
    setting = options.setting
    if setting is None:
        setting = Setting(cut=contest.find_cut(Setting()))
    say(f"{setting.model}, cut before unit {setting.cut}; weighing the blocks")
    balance = contest.weigh_blocks(setting, options.rounds, max(1, options.batches // 8), options.patience)
    chosen = [g for g in contest.groups() if not options.only or set(g.runs.values()) & set(options.only)]
    rounds = list(contest.hold_rounds(setting, chosen, options.rounds, options.batches, options.patience, say))
    say(f"simulation of {options.blocks} blocks x {options.blocks} batches")
    simulated = simulator.measure(options.blocks, options.blocks)
    return {
        "machine": machine(started),
        "setting": asdict(setting),
        "options": {"rounds": options.rounds, "batches": options.batches, "patience": options.patience},
        "balance": balance,
        "rounds": [{name: asdict(m) for name, m in r.items()} for r in rounds],
        "figures": figures(rounds, balance),
        "simulator": simulated if isinstance(simulated, str) else asdict(simulated),
        "seconds": time.perf_counter() - begun,
    }


def figures(rounds: Sequence[Round], balance: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """One record per figure that could be measured."""
    records = []
    for figure in FIGURES:
        ratios = figure.ratios(rounds)
        if ratios is None:
            continue
        spread = Spread.of(ratios)
        records.append(
            {
                "title": figure.title,
                "must": figure.must,
                "strict": figure.strict,
                **asdict(spread),
                "limit": ideal(balance, figure.limit) if figure.limit else None,
                "reached": figure.reached(spread.median),
                "ratios": ratios,
            }
        )
    return records


def ideal(balance: Mapping[str, Sequence[float]], kind: str) -> float:
    """Whole network / slowest block: the speed-up of blocks that never wait."""
    seconds = {name: statistics.median(values) for name, values in balance.items()}
    return seconds["whole"] / max(seconds[f"{kind} 0"], seconds[f"{kind} 1"])


def markdown(record: Mapping[str, Any]) -> str:
    """The record as a page."""
    parts = [
        "# Speed",
        _how(record["machine"], record["options"], record["setting"], record["seconds"] / 60),
        _figures_table(record),
        "*Limit* is the whole network's time over the slowest block's, each alone and with freed memory kept: what "
        "blocks gain that never wait. The plain loop gives freed memory back to the system in every batch, which costs "
        "it time besides; the *controls* compare with one whose C library is told (`MALLOC_*` variables) to keep it.",
        "## Contestants",
        _contestants_table(record["rounds"], record["setting"]["batch_size"]),
        "*Processor* is the processor time of all threads and ranks. *New pages* are memory pages that the system had "
        "to provide. *Others* is how many cores other programs used meanwhile (median, worst round).",
        "## Balance of the cut",
        _balance_table(record["balance"]),
        "`gradient k`: block k of pipedream (block 1 with the loss and the gradient for its input); `local k`: block k "
        "of greedy local training (block 0 with its auxiliary head).",
    ]
    return "\n\n".join(parts) + "\n"


def _how(facts: Mapping[str, Any], options: Mapping[str, Any], setting: Mapping[str, Any], minutes: float) -> str:
    command = "python -m decoupled.benchmarks.speed"
    if options["patience"]:
        command += f" --patience {options['patience']:.0f}"
    return (
        f"{where(facts)}; `{command}`, {minutes:.1f} minutes. {setting['model']}, inputs "
        f"{'x'.join(map(str, setting['image']))}, batch {setting['batch_size']}, SGD with momentum, cross entropy, "
        f"synthetic data; two blocks, cut before unit {setting['cut']}. {options['rounds']} rounds of "
        f"{options['batches']} batches (half of it for torch's pipelines, which flush after every batch), every "
        "contestant in one or two processes of its own, one at a time, order turned from round to round. Ratios of "
        "throughput are taken within a round; shown are median (lowest .. highest). Warm-up is excluded; filling and "
        "draining a pipeline is included. Figures hold for an idle machine: the column *others* tells whether it was; "
        "with `--patience` a disturbed run is repeated, and the least disturbed one counts."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figures_table(record: Mapping[str, Any]) -> str:
    rows = []
    for f in record["figures"]:
        must = "" if f["must"] is None else f"{'> ' if f['strict'] else '>= '}{f['must']:.2f}"
        limit = "" if f["limit"] is None else f"{f['limit']:.2f}"
        verdict = {None: "", True: "yes", False: "**no**"}[f["reached"]]
        rows.append([f["title"], must, Spread(f["median"], f["low"], f["high"]).text(), limit, verdict])
    return _table(
        ["figure", "must reach", "measured", "limit", "reached"], [*rows, _simulator_row(record["simulator"])]
    )


def _simulator_row(found: str | Mapping[str, Any]) -> list[str]:
    must = "under 60 s, memory bounded"
    if isinstance(found, str):
        return ["simulator", must, found, "", "**no**"]
    mib = [found[name] / 2**20 for name in ("peak_bytes", "before_bytes")]
    title = f"simulator, {found['blocks']} blocks x {found['batches']} batches, {simulator.METHOD}"
    measured = f"{found['seconds']:.0f} s, peak {mib[0]:.0f} MiB ({mib[1]:.0f} before)"
    return [title, must, measured, "", "yes" if found["seconds"] < 60 else "**no**"]


def _contestants_table(rounds: Sequence[Mapping[str, Mapping[str, float]]], batch_size: int) -> str:
    rows = []
    for name in rounds[0]:
        seconds = Spread.of([r[name]["seconds"] for r in rounds])
        others = Spread.of([abs(r[name]["others"]) for r in rounds])
        milliseconds = Spread(*(value * 1e3 for value in (seconds.median, seconds.low, seconds.high)))
        rows.append(
            [
                name,
                milliseconds.text(".1f"),
                f"{batch_size / seconds.median:.0f}",
                f"{statistics.median(r[name]['processor'] for r in rounds) * 1e3:.1f}",
                f"{statistics.median(r[name]['faults'] for r in rounds):.0f}",
                f"{others.median:.2f}, {others.high:.2f}" if math.isfinite(others.median) else "unknown",
            ]
        )
    header = [
        "contestant",
        "ms per batch",
        "samples/s",
        "processor ms per batch",
        "new pages per batch",
        "others, cores",
    ]
    return _table(header, rows)


def _balance_table(balance: Mapping[str, Sequence[float]]) -> str:
    rows = [[name, Spread.of([s * 1e3 for s in seconds]).text(".1f")] for name, seconds in balance.items()]
    return _table(["alone on one core", "ms per batch"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that children are ended
    start = time.monotonic()
    try:
        record = run(options, lambda line: print(f"[{time.monotonic() - start:4.0f} s] {line}", flush=True))
    except KeyboardInterrupt:
        print("interrupted; nothing written", file=sys.stderr)
        return 130
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "speed.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    page = markdown(record)
    write(options.out / "speed.md", page)
    print(f"\n{page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
