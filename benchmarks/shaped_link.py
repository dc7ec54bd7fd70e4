"""Throughput over a slow line: two hosts, their line shaped step by step; `python -m` this module.

    host a: block 0   <-- 1 Gbit/s .. 50 Mbit/s, 0 .. 20 ms each way -->   host b: block 1

Two network namespaces (`decoupled.benchmarks.peers.network`) with one process of one thread each. On every line every
contestant trains once, one at a time, in turned order, and right before or after that, from line to line, on the
unshaped one, so that a machine whose pace drifts favours nobody. Whether a line can carry what a contestant sends at
full speed follows from the bytes that were counted on the interfaces; what its order lets it keep, from the passes that
it has under way. Results go to ``benchmarks/results/shaped_link.md`` and ``shaped_link.svg``. Exit code 77 where
namespaces are not permitted.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decoupled.benchmarks.page import environment, machine, produce, table, task, verdict
from decoupled.benchmarks.peers import contest, data_parallel, pipelining, processes
from decoupled.benchmarks.peers.contest import WARMUP, Group
from decoupled.benchmarks.peers.host import Host
from decoupled.benchmarks.peers.network import Link, Network, Unavailable
from decoupled.benchmarks.peers.setting import Setting
from decoupled.benchmarks.plot import Axes, Panel, draw
from decoupled.benchmarks.speed import RESULTS, Spread
from decoupled.benchmarks.two_hosts import SKIP

KEEPS, FALLS = 0.9, 0.5
RATES, DELAYS = (1000.0, 500.0, 50.0), (0.0, 5.0, 20.0)
FULL = Link()
_SHORT, _LEAST, _MOST = 4, 12, 48  # batches of the short run, and of the long one
DECOUPLED = ("greedy_local", "pipedream", "pipedream, free")
PASSES = {"pipedream": 2}  # that are under way at most in an order of two blocks; the free order: its credit


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

    def links(self) -> list[Link]:
        """The lines that every round visits."""
        return [Link(rate, delay) for rate in self.rates for delay in self.delays]


@dataclass(frozen=True)
class Run:
    """One contestant once on one line: samples/s, and bytes per sample from host a and from host b."""

    speed: float
    sent: tuple[float, float]


@dataclass(frozen=True)
class Pair:
    """One contestant on a line and, right before or after, on the unshaped one."""

    shaped: Run
    full: Run

    @property
    def kept(self) -> float:
        """Throughput on the line over the unshaped one."""
        return self.shaped.speed / self.full.speed


Round = Mapping[Link, Mapping[str, Pair]]


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m decoupled.benchmarks.shaped_link", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=Options.rounds, help="default 2, which takes half an hour on two cores")
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


def hold_rounds(options: Options, network: Network, say: Callable[[str], None]) -> Iterator[Round]:
    """Yield one round after the other."""
    chosen = groups(options.credit)
    with contest.start(options.setting, chosen, network) as hosts:
        entries = [(n, host, run) for g, host in zip(chosen, hosts, strict=True) for run, n in g.runs.items()]
        for number in range(options.rounds):
            turned = entries[number % len(entries) :] + entries[: number % len(entries)]
            found: dict[Link, dict[str, Pair]] = {}
            for place, link in enumerate(options.links()):
                pairs: dict[str, Pair] = {}
                for name, host, run in turned:
                    speeds = {}
                    for line in (link, FULL) if (number + place) % 2 else (FULL, link):
                        network.shape(line)
                        speeds[line] = _measure(host, run, network, options)
                    pairs[name] = Pair(speeds[link], speeds[FULL])
                texts = ", ".join(
                    f"{n} {pairs[n].shaped.speed:.0f} of {pairs[n].full.speed:.0f}" for n, _, _ in entries
                )
                say(f"round {number + 1}/{options.rounds}: {link}: {texts} samples/s")
                found[link] = pairs
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
    """What the rounds say; `passes`: how many of a contestant are under way at most, where its order limits them."""

    rounds: Sequence[Round]
    batch_size: int
    passes: Mapping[str, int]

    @property
    def names(self) -> list[str]:
        return [name for name in (*DECOUPLED, "torch 1F1B", "DDP") if name in self.rounds[0][self.links[0]]]

    @property
    def links(self) -> list[Link]:
        return list(self.rounds[0])

    def speed(self, name: str) -> Spread:
        """Unshaped samples/s."""
        return Spread.of([pair.full.speed for pair in self._pairs(name)])

    def kept(self, name: str, link: Link) -> Spread:
        """Throughput on `link` over the unshaped one beside it."""
        return Spread.of([one[link][name].kept for one in self.rounds])

    def sent(self, name: str) -> tuple[float, float]:
        """Bytes per sample from a to b and from b to a, on the unshaped line."""
        a, b = zip(*(pair.full.sent for pair in self._pairs(name)), strict=True)
        return statistics.median(a), statistics.median(b)

    def _pairs(self, name: str) -> list[Pair]:
        return [pairs[name] for one in self.rounds for pairs in one.values()]

    def needed(self, name: str) -> float:
        """Mbit/s in the busier direction at unshaped throughput."""
        return max(self.sent(name)) * self.speed(name).median * 8e-6

    def by_rate(self, name: str, link: Link) -> float:
        """The most that a line of this rate lets it keep."""
        return 1.0 if link.rate is None else min(1.0, link.rate / self.needed(name))

    def by_order(self, name: str, link: Link) -> float:
        """What its order lets it keep, about: each block takes a batch's time T, and a pass under way 2 T + 2 trips."""
        if name not in self.passes or link.rate is None:
            return 1.0
        batch = self.batch_size / self.speed(name).median
        trips = 2 * link.delay * 1e-3 + self.batch_size * sum(self.sent(name)) * 8e-6 / link.rate
        return min(1.0, self.passes[name] * batch / (2 * batch + trips))

    def carries(self, name: str, link: Link) -> bool:
        """Whether the line has the rate that unshaped throughput needs."""
        return self.by_rate(name, link) >= 1.0

    def holds(self, name: str) -> bool | None:
        """Whether `name` keeps enough on every line that can carry its bytes; None if none can."""
        kept = [self.kept(name, link).median for link in self.links if self.carries(name, link)]
        return all(ratio >= KEEPS for ratio in kept) if kept else None


def page(found: Findings, options: Options, line: str, facts: Mapping[str, Any], seconds: float) -> str:
    """The results as a page."""
    how = (
        "Host a holds block 0 (or a replica), host b block 1: two network namespaces joined by a veth pair; rate (tbf) "
        f"and delay hold in each direction, so a round trip has twice the delay. {line} The free order holds at most "
        f"{options.credit} passes unanswered; torch 1F1B is Schedule1F1B with 4 micro-batches. {options.rounds} "
        "rounds; in each, every contestant is timed on every line and right beside "
        "that, before it on one line and after it on the next, on the unshaped one, for about "
        f"{options.seconds:g} s each ({_LEAST} to {_MOST} batches), one at a time. Throughput is "
        f"the slope between that run and one of {_SHORT} batches, so what a run pays once (its first and last round "
        "trips, filling, draining) is not in it. Ratios are taken within such a pair; medians over the rounds. Figures "
        "hold for an idle machine."
    )  # fmt: skip
    parts = [
        "# Shaped line",
        f"{environment(facts, _command(options), seconds)} {task(options.setting)} {how}",
        "![throughput kept over the rate of the line, one panel per delay](shaped_link.svg)",
        f"## Where the line can carry the bytes, at least {KEEPS:g} of the throughput is kept",
        _verdicts(found),
        "## Throughput kept",
        _kept_table(found),
        "*of x*: what can be kept at most, where that is less than everything. By rate: the line's over what the "
        "contestant sends in the busier direction at unshaped throughput; no order of operations can keep more. By "
        "order: pipedream has two passes under way, the free order its credit, and each takes two batches' time and a "
        "trip in both directions; about, because the blocks are taken as equal. Bold: below 0.9 although the line can "
        "carry the bytes.",
        f"## Who falls below {FALLS:g}, and where",
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
    kept, possible = found.kept(name, link).median, min(found.by_rate(name, link), found.by_order(name, link))
    text = f"{kept:.2f}" if kept >= KEEPS or not found.carries(name, link) else f"**{kept:.2f}**"
    return text if possible >= 1 else f"{text} of {possible:.2f}"


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
        limit = [(x.rate or 0.0, found.by_rate(busiest, x)) for x in links]
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
        passes = {**PASSES, "pipedream, free": options.credit}
        found = Findings(list(hold_rounds(options, network, say)), options.setting.batch_size, passes)
        line = f"TCP with {network.control[-1] if network.control else 'the congestion control of the system'}. " + (
            "The kernel has no netem: where there is a delay, packets pass a relay, which uses some of the cores."
            if network.relays
            else "Delays are made by netem."
        )
    facts, seconds = machine(started), time.monotonic() - begun
    return {"shaped_link.md": page(found, options, line, facts, seconds), "shaped_link.svg": picture(found)}


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
