"""One slow block: who waits for it? Two processes, the upper block at half speed with jitter; `python -m` this module.

    lower block, its own speed  --activation-->  upper block, twice its time on average, unevenly
                                <--gradient----

The slow block sleeps after every forward and every backward r times the processor time that took; r goes through
1/8 .. 15/8 in random order from a fixed seed (`decoupled.benchmarks.peers.slowed`). The contestants differ in the
order: free(credit), where every block takes what has arrived; pipedream's fixed 1F1B; and 1F1B with a flush after every
batch, cut into micro-batches. Results go to ``benchmarks/results/slow_block.md``.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decoupled.benchmarks.page import environment, machine, produce, table, task, verdict
from decoupled.benchmarks.peers import contest, processes
from decoupled.benchmarks.peers.contest import Group, Measurement
from decoupled.benchmarks.peers.setting import Setting
from decoupled.benchmarks.speed import RESULTS, Figure, Spread

MICROBATCHES = (2, 4, 8)
MUST = 1.2
FREE, FIXED, FLUSH, WHOLE = "free", "one_f_one_b", "one_f_one_b_flush", "one_f_one_b, not slowed"
FIGURES = [
    Figure("free(credit) / the fastest one_f_one_b_flush of the round", FREE, FLUSH, MUST),
    *(Figure(f"free(credit) / one_f_one_b_flush({M})", FREE, f"{FLUSH} M={M}") for M in MICROBATCHES),
    Figure("free(credit) / one_f_one_b without flush", FREE, FIXED),
    Figure("what the slowing costs: not slowed / slowed, one_f_one_b without flush", WHOLE, FIXED),
]


@dataclass(frozen=True)
class Options:
    """The command line; see `--help`."""

    rounds: int = 5
    batches: int = 24
    credit: int = 4
    patience: float = 0.0
    out: Path = RESULTS
    setting: Setting = field(default_factory=Setting)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m decoupled.benchmarks.slow_block", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=Options.rounds, help="default 5")
    add("--batches", type=int, default=Options.batches, help="per contestant and round (default 24)")
    add("--credit", type=int, default=Options.credit, help="of the free order (default 4)")
    add("--patience", type=float, default=0.0, help="seconds to wait, before each run, for others to leave the cores")
    add("--out", type=Path, default=RESULTS, help="folder of slow_block.md")
    given = parser.parse_args(arguments)
    if min(given.rounds, given.batches, given.credit) < 1:
        parser.error("--rounds, --batches and --credit must be at least 1")
    return Options(**vars(given))


def groups(credit: int) -> list[Group]:
    """All contestants; the last one is not slowed."""
    flushing = {f"{FLUSH} M={M}": {"method": {"name": "one_f_one_b", "microbatches": M}} for M in MICROBATCHES}
    slowed: dict[str, dict[str, Any]] = {
        FREE: {"method": "pipedream", "credit": credit},
        FIXED: {"method": "pipedream"},
        **flushing,
    }
    return [
        *(
            Group(processes.build, {"run": name}, 2, options=options | {"slow": True})
            for name, options in slowed.items()
        ),
        Group(processes.build, {"run": WHOLE}, 2, options={"method": "pipedream"}),
    ]


def run(options: Options, say: Callable[[str], None]) -> dict[str, str]:
    """Measure; returns the page by its file name."""
    started, begun = datetime.datetime.now(datetime.UTC), time.monotonic()
    held = contest.hold_rounds(
        options.setting, groups(options.credit), options.rounds, options.batches, options.patience, say
    )
    rounds = list(held)
    return {"slow_block.md": page(rounds, options, machine(started), time.monotonic() - begun)}


def page(
    rounds: Sequence[Mapping[str, Measurement]], options: Options, facts: Mapping[str, Any], seconds: float
) -> str:
    """The results as a page."""
    asked = []
    for figure in FIGURES:
        spread = Spread.of(figure.ratios(rounds) or [float("nan")])
        must = "" if figure.must is None else f">= {figure.must:.2f}"
        asked.append([figure.title, must, spread.text(), verdict(figure.reached(spread.median))])
    speeds = [
        [
            f"free({options.credit})" if name == FREE else name,
            Spread.of([r[name].seconds * 1e3 for r in rounds]).text(".1f"),
            f"{options.setting.batch_size / statistics.median(r[name].seconds for r in rounds):.0f}",
            Spread.of([abs(r[name].others) for r in rounds]).text(),
        ]
        for name in rounds[0]
    ]
    how = (
        "The upper block sleeps after each of its forwards and backwards r times the processor time that took; r goes "
        "through 1/8, 3/8, .. 15/8 in an order drawn from a fixed seed, over and over: twice its time on average, with "
        "jitter, and equally much for everybody. The lower block runs at its "
        "own speed. free and one_f_one_b are pipedream (weights as at the forward, one step per batch); "
        "one_f_one_b_flush steps after M micro-batches that make up the same batch, with the exact gradient. "
        f"{options.rounds} rounds of {options.batches} batches, contestants one at a time in turned order; ratios of "
        "throughput are taken within a round; shown are median (lowest .. highest). Warm-up is excluded, filling and "
        "draining are included. *Others* is how many cores other programs used."
    )
    return (
        "\n\n".join(
            [
                "# One slow block",
                f"{environment(facts, _command(options), seconds)} {task(options.setting)} {how}",
                table(["figure", "must reach", "measured", "reached"], asked),
                table(["contestant", "ms per batch", "samples/s", "others, cores"], speeds),
            ]
        )
        + "\n"
    )


def _command(options: Options) -> str:
    patience = f" --patience {options.patience:g}" if options.patience else ""
    return f"slow_block --rounds {options.rounds} --batches {options.batches} --credit {options.credit}{patience}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    options = parse(arguments)
    return produce(lambda say: run(options, say), options.out)


if __name__ == "__main__":
    sys.exit(main())
