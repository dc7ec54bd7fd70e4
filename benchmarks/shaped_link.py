"""Throughput over a slow line: two hosts, their line shaped step by step; `python -m` this module.

    host a: block 0   <-- 1 Gbit/s .. 50 Mbit/s, 0 .. 20 ms each way -->   host b: block 1

Two network namespaces (`decoupled.benchmarks.peers.network`) with one process of one thread each. A lap visits the
unshaped line and then one rate with every delay, and lets every contestant train there, one at a time, in turned order;
a round has a lap for every rate. Throughput is divided by the contestant's own unshaped throughput of the lap. Whether
a line can carry what a contestant sends at full speed follows from the bytes that were counted on the interfaces.
Results go to ``benchmarks/results/shaped_link.md`` and ``shaped_link.svg``. Exit code 77 where namespaces are not
permitted.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decoupled.benchmarks.page import environment, produce, table, task, verdict
from decoupled.benchmarks.peers import contest, data_parallel, pipelining, processes
from decoupled.benchmarks.peers.contest import WARMUP, Group
from decoupled.benchmarks.peers.host import Host
from decoupled.benchmarks.peers.network import Link, Network, Unavailable
from decoupled.benchmarks.peers.setting import Setting
from decoupled.benchmarks.plot import Axes, Panel, draw
from decoupled.benchmarks.speed import RESULTS, Spread, machine
from decoupled.benchmarks.two_hosts import SKIP

KEEPS, FALLS = 0.9, 0.5
RATES, DELAYS = (1000.0, 500.0, 50.0), (0.0, 5.0, 20.0)
FULL = Link()
_SHORT, _LEAST, _MOST = 4, 12, 48  # batches of the short run, and of the long one
DECOUPLED = ("greedy_local", "pipedream", "pipedream, free")


@dataclass(frozen=True)
class Options:
    """The command line; see `--help`."""

    rounds: int = 2
    seconds: float = 2.5
    rates: Sequence[float] = RATES
    delays: Sequence[float] = DELAYS
    credit: int = 4
    out: Path = RESULTS
    setting: Setting = field(default_factory=Setting)

    def laps(self) -> list[list[Link]]:
        """The lines that every lap of a round visits."""
        return [[FULL, *(Link(rate, delay) for delay in self.delays)] for rate in self.rates]


@dataclass(frozen=True)
class Run:
    """One contestant on one link in one lap: samples/s, and bytes per sample from host a and from host b."""

    speed: float
    sent: tuple[float, float]


Lap = Mapping[Link, Mapping[str, Run]]


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m decoupled.benchmarks.shaped_link", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=Options.rounds, help="default 2, which takes about 10 minutes on two cores")
    add("--seconds", type=float, default=Options.seconds, help="of one measured run, about (default 2.5)")
    add("--rates", type=float, nargs="+", default=RATES, help="Mbit/s (default 1000 500 50)")
    add("--delays", type=float, nargs="+", default=DELAYS, help="ms, each way (default 0 5 20); 0.01: the relay alone")
    add("--credit", type=int, default=Options.credit, help="of the free order (default 4)")
    add("--out", type=Path, default=RESULTS, help="folder of shaped_link.md and .svg")
    given = parser.parse_args(arguments)
    if min(given.rounds, given.credit) < 1 or min(given.seconds, *given.rates) <= 0 or min(given.delays) < 0:
        parser.error("rounds, credit, seconds and rates must be positive, delays not negative")
    return Options(**vars(given))


def groups(credit: int) -> list[Group]:
    """All contestants, two processes each."""
    ours = [{"method": "greedy_local"}, {"method": "pipedream"}, {"method": "pipedream", "credit": credit}]
    return [
        *(Group(processes.build, {"run": name}, 2, options=o) for name, o in zip(DECOUPLED, ours, strict=True)),
        Group(pipelining.build, {"1f1b 4": "torch 1F1B"}, 2),
        Group(data_parallel.build, {"run": "DDP"}, 2),
    ]


def hold_laps(options: Options, network: Network, say: Callable[[str], None]) -> Iterator[Lap]:
    """Yield one lap after the other, all rounds."""
    chosen = groups(options.credit)
    with contest.start(options.setting, chosen, network) as hosts:
        entries = [(n, host, run) for g, host in zip(chosen, hosts, strict=True) for run, n in g.runs.items()]
        for number, lap in itertools.product(range(options.rounds), options.laps()):
            turned = entries[number % len(entries) :] + entries[: number % len(entries)]
            found: dict[Link, dict[str, Run]] = {}
            for link in lap:
                network.shape(link)
                found[link] = {n: _measure(host, run, network, options) for n, host, run in turned}
                texts = ", ".join(f"{n} {found[link][n].speed:.0f}" for n, _, _ in entries)
                say(f"round {number + 1}/{options.rounds}: {link}: {texts} samples/s")
            yield found


def _measure(host: Host, run: str, network: Network, options: Options) -> Run:
    """The slope between a short and a long run, after a warm-up that says how many batches take the time meant.

    What every run pays once, whatever its length, drops out: round trips of its beginning and end, filling, draining.
    """
    pace = host.run(run, WARMUP).seconds / WARMUP
    batches = round(min(max(options.seconds / pace, _LEAST), _MOST))
    short = host.run(run, _SHORT).seconds
    before = network.sent()
    seconds = host.run(run, batches).seconds
    a, b = ((now - then) / batches for now, then in zip(network.sent(), before, strict=True))
    size = options.setting.batch_size
    return Run(size * (batches - _SHORT) / max(seconds - short, 1e-3), (a / size, b / size))


@dataclass(frozen=True)
class Findings:
    """What the laps say."""

    laps: Sequence[Lap]

    @property
    def names(self) -> list[str]:
        return [name for name in (*DECOUPLED, "torch 1F1B", "DDP") if name in self.laps[0][FULL]]

    @property
    def links(self) -> list[Link]:
        """The shaped ones."""
        return list(dict.fromkeys(link for lap in self.laps for link in lap if link != FULL))

    def speed(self, name: str) -> Spread:
        """Unshaped samples/s."""
        return Spread.of([lap[FULL][name].speed for lap in self.laps])

    def kept(self, name: str, link: Link) -> Spread:
        """Throughput on `link` over the unshaped one of the same lap."""
        return Spread.of([lap[link][name].speed / lap[FULL][name].speed for lap in self.laps if link in lap])

    def sent(self, name: str) -> tuple[float, float]:
        """Bytes per sample from a to b and from b to a, on the unshaped line."""
        a, b = zip(*(lap[FULL][name].sent for lap in self.laps), strict=True)
        return statistics.median(a), statistics.median(b)

    def needed(self, name: str) -> float:
        """Mbit/s in the busier direction at unshaped throughput."""
        return max(self.sent(name)) * self.speed(name).median * 8e-6

    def possible(self, name: str, link: Link) -> float:
        """The most that a line of this rate lets it keep."""
        return 1.0 if link.rate is None else min(1.0, link.rate / self.needed(name))

    def carries(self, name: str, link: Link) -> bool:
        """Whether the line has the rate that unshaped throughput needs."""
        return self.possible(name, link) >= 1.0

    def holds(self, name: str) -> bool | None:
        """Whether `name` keeps enough on every line that can carry its bytes; None if none can."""
        kept = [self.kept(name, link).median for link in self.links if self.carries(name, link)]
        return all(ratio >= KEEPS for ratio in kept) if kept else None


def page(found: Findings, options: Options, relayed: bool, facts: Mapping[str, Any], seconds: float) -> str:
    """The results as a page."""
    how = (
        "Host a holds block 0 (or a replica), host b block 1: two network namespaces joined by a veth pair, TCP; rate "
        "(tbf) and delay hold in each direction, so a round trip has twice the delay. "
        + ("The kernel has no netem: where there is a delay, packets pass a relay, which uses some of the cores. "
           if relayed else "Delays are made by netem. ")
        + f"The free order holds at most {options.credit} passes unanswered; torch 1F1B is Schedule1F1B with 4 "
        f"micro-batches. {options.rounds} rounds of a lap for every rate: the unshaped line, then every delay, and on "
        f"each line every contestant for about {options.seconds:g} s ({_LEAST} to {_MOST} batches), one at a time in "
        f"turned order. Throughput is the slope between that run and one of {_SHORT} batches, so what a run pays once "
        "(its first and last round trips, filling, draining) is not in it. Ratios are throughput over the contestant's "
        "own unshaped throughput of the lap, medians over the rounds. Figures hold for an idle machine."
    )  # fmt: skip
    parts = [
        "# Shaped line",
        f"{environment(facts, _command(options), seconds)} {task(options.setting)} {how}",
        "![throughput kept over the rate of the line, one panel per delay](shaped_link.svg)",
        f"## Where the line can carry the bytes, at least {KEEPS:g} of the throughput is kept",
        _verdicts(found),
        "## Throughput kept",
        _kept_table(found),
        "*of x*: the line's rate over what the contestant sends in the busier direction at unshaped throughput; no "
        "order of operations can keep more. Bold: below 0.9 although the line can carry the bytes.",
        f"## Where the peers fall below {FALLS:g}",
        _falls(found),
    ]
    return "\n\n".join(parts) + "\n"


def _command(options: Options) -> str:
    words = ["shaped_link", f"--rounds {options.rounds}", f"--seconds {options.seconds:g}"]
    for name, values in (("rates", options.rates), ("delays", options.delays)):
        words.append(f"--{name} {' '.join(f'{value:g}' for value in values)}")
    return " ".join([*words, f"--credit {options.credit}"])


def _verdicts(found: Findings) -> str:
    rows = []
    for name in found.names:
        speed, (up, down) = found.speed(name), found.sent(name)
        carrying = [found.kept(name, link).median for link in found.links if found.carries(name, link)]
        enough = sum(ratio >= KEEPS for ratio in carrying)
        lowest = f"{min(carrying):.2f}" if carrying else ""
        asked = verdict(found.holds(name)) if name in DECOUPLED else ""
        rows.append(
            [name, speed.text(".0f"), f"{up:.0f}", f"{down:.0f}", f"{found.needed(name):.0f}",
             f"{enough} of {len(carrying)}", lowest, asked]
        )  # fmt: skip
    header = ["contestant", "unshaped samples/s", "bytes per sample a to b", "b to a", "needs Mbit/s",
              f"lines that can carry it where >= {KEEPS:g} is kept", "least kept there", "reached"]  # fmt: skip
    return table(header, rows)


def _kept_table(found: Findings) -> str:
    rows = [[str(link), *(_cell(found, name, link) for name in found.names)] for link in found.links]
    return table(["line, each way", *found.names], rows)


def _cell(found: Findings, name: str, link: Link) -> str:
    kept = found.kept(name, link).median
    if not found.carries(name, link):
        return f"{kept:.2f} of {found.possible(name, link):.2f}"
    return f"{kept:.2f}" if kept >= KEEPS else f"**{kept:.2f}**"


def _falls(found: Findings) -> str:
    rows = []
    for name in found.names:
        for can, title in ((True, "the line can carry its bytes"), (False, "the line cannot")):
            links = [x for x in found.links if found.carries(name, x) == can and found.kept(name, x).median < FALLS]
            if links:
                rows.append([name, title, "; ".join(f"{x} ({found.kept(name, x).median:.2f})" for x in links)])
    return table(["contestant", "although / because", "below it on"], rows) if rows else "Nowhere."


def picture(found: Findings) -> str:
    """Throughput kept over rate: a panel per delay; dotted: what the rate lets the busiest contestant keep."""
    busiest = max(found.names, key=found.needed)
    panels = []
    for delay in sorted({link.delay for link in found.links}):
        links = [link for link in found.links if link.delay == delay and link.rate is not None]
        lines = {n: [(x.rate or 0.0, found.kept(n, x).median) for x in links] for n in found.names}
        limit = [(x.rate or 0.0, found.possible(busiest, x)) for x in links]
        panels.append(Panel(f"{delay:g} ms each way", lines, limit))
    rates = sorted({link.rate for link in found.links if link.rate is not None})
    axes = Axes("rate of the line, Mbit/s", "throughput / unshaped", rates, [0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1])
    return draw(panels, axes)


def run(options: Options, say: Callable[[str], None]) -> dict[str, str]:
    """Measure; returns the page and the picture by their file names.

    Raises:
        Unavailable: no namespaces here.
    """
    started, begun = datetime.datetime.now(datetime.UTC), time.monotonic()
    with Network() as network:
        found = Findings(list(hold_laps(options, network, say)))
        relayed = network.relays
    facts, seconds = machine(started), time.monotonic() - begun
    return {"shaped_link.md": page(found, options, relayed, facts, seconds), "shaped_link.svg": picture(found)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    options = parse(arguments)
    try:
        return produce(lambda say: run(options, say), options.out)
    except Unavailable as error:
        print(f"skipped, no network namespaces here: {error}", file=sys.stderr)
        return SKIP


if __name__ == "__main__":
    sys.exit(main())
