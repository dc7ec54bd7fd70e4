"""The contestants of the speed benchmark, and rounds in which each of them runs once, one at a time."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from decoupled import split
from decoupled.benchmarks.peers import balance, data_parallel, library, pipelining, plain
from decoupled.benchmarks.peers.host import Build, Host
from decoupled.benchmarks.peers.network import Network
from decoupled.benchmarks.peers.noise import QUIET, busy_seconds, wait_quiet
from decoupled.benchmarks.peers.setting import Setting

Bout = Sequence[tuple[str, str]]  # of several measurements: what each is called, and the contestant
WARMUP = 2  # batches before every measured run, not measured
# glibc gives freed memory back to the system and has to ask for it again in the next batch; these settings keep it.
KEEP = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


@dataclass(frozen=True)
class Group:
    """Contestants that share processes: `runs` maps the names of `build`'s runs to the contestants' names.

    `share` is the part of the round's batches they train: less where a batch costs the same whatever comes before it.
    """

    build: Build
    runs: dict[str, str]
    ranks: int = 1
    share: float = 1.0
    environment: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """One contestant in one round: per batch, wall and processor seconds and new pages; cores others used meanwhile."""

    seconds: float
    processor: float
    faults: float
    others: float


def _one(name: str, build: Build, environment: dict[str, str] | None = None, **options: Any) -> Group:
    return Group(build, {"run": name}, environment=environment or {}, options=options)


def groups() -> list[Group]:
    """All contestants, the plain loop first."""
    schedules = {name: f"pipelining {name}" for name in pipelining.names()}
    return [
        _one("plain", plain.build),
        _one("plain, memory kept", plain.build, KEEP),
        _one("plain, 2 threads", plain.build, threads=2),
        _one("1 block", library.build, method="backprop", blocks=1),
        _one("greedy_local", library.build, method="greedy_local", blocks=2),
        _one("pipedream", library.build, method="pipedream", blocks=2),
        _one("greedy_local, processes", library.build, method="greedy_local", blocks=2, processes=True),
        _one("pipedream, processes", library.build, method="pipedream", blocks=2, processes=True),
        Group(data_parallel.build, {"run": "DDP"}, ranks=2),
        Group(pipelining.build, schedules, ranks=2, share=0.5),
    ]


def names(chosen: Sequence[Group]) -> list[str]:
    """The contestants of these groups."""
    return [name for group in chosen for name in group.runs.values()]


def find_cut(setting: Setting, replays: Callable[[int], bool] = lambda k: False, tries: int = 5) -> int:
    """The cut that `decoupled.split` finds most often by measured time (on one thread); `replays` as there."""
    inputs, _ = next(setting.batches(1))
    return statistics.mode(len(split(setting.units(), 2, inputs, replays=replays)[0]) for _ in range(tries))


def hold_rounds(
    setting: Setting,
    chosen: Sequence[Group],
    rounds: int,
    batches: int,
    patience: float,
    say: Callable[[str], None],
    bouts: Sequence[Bout] | None = None,
) -> Iterator[dict[str, Measurement]]:
    """Yield one round after the other: name -> measurement, where to begin rotated between rounds.

    Args:
        bouts: what is compared runs right after one another, in the opposite order every other round, so that a machine
            whose pace drifts favours nobody; by default every contestant has a bout of its own.
    """
    with start(setting, chosen) as hosts:
        entries = {
            name: (hosts[i], run, max(1, round(batches * group.share)))
            for i, group in enumerate(chosen)
            for run, name in group.runs.items()
        }
        for name, (host, run, _) in entries.items():
            say(f"warm-up: {name}")
            host.run(run, WARMUP)
        order: Sequence[Bout] = [[(name, name)] for name in entries] if bouts is None else bouts
        for number in range(rounds):
            first = number * max(1, len(order) // rounds) % len(order)
            results = {}
            for bout in itertools.chain(order[first:], order[:first]):
                for name, contestant in bout[:: -1 if number % 2 else 1]:
                    results[name] = _measure(*entries[contestant], patience)
                    say(f"round {number + 1}/{rounds}: {name:22} {_text(results[name])}")
            yield results


def weigh_blocks(setting: Setting, rounds: int, batches: int, patience: float) -> dict[str, list[float]]:
    """Seconds per batch of the whole network and of each block alone, one entry per round; see `balance`."""
    group = Group(balance.build, {name: name for name in balance.NAMES}, environment=KEEP)
    found: dict[str, list[float]] = {name: [] for name in balance.NAMES}
    for results in hold_rounds(setting, [group], rounds, batches, patience, lambda line: None):
        for name, measurement in results.items():
            found[name].append(measurement.seconds)
    return found


@contextmanager
def start(setting: Setting, chosen: Sequence[Group], network: Network | None = None) -> Iterator[list[Host]]:
    """The groups' processes, on this host or the two of `network`; ended whatever happens."""
    hosts: list[Host] = []
    try:
        for group in chosen:
            hosts.append(Host(group.build, setting, group.ranks, group.environment, network=network, **group.options))
        for host in hosts:
            host.ready()
        yield hosts
    except BaseException:
        for host in hosts:
            host.kill()
        raise
    finally:
        for host in hosts:
            host.dismiss()
        for host in hosts:
            host.close()


def _measure(host: Host, run: str, batches: int, patience: float) -> Measurement:
    """One measured run after a warm-up; with patience, the least disturbed of those that fit into the time."""
    deadline = time.monotonic() + patience
    best: Measurement | None = None
    while True:
        wait_quiet(deadline)
        host.run(run, WARMUP)
        before = busy_seconds()
        sample = host.run(run, batches)
        others = (busy_seconds() - before - sample.processor) / sample.seconds
        if best is None or others < best.others:
            best = Measurement(sample.seconds / batches, sample.processor / batches, sample.faults / batches, others)
        if not others > QUIET or time.monotonic() > deadline:
            return best


def _text(m: Measurement) -> str:
    return (
        f"{m.seconds * 1e3:7.1f} ms per batch, {m.processor * 1e3:7.1f} ms processor, others {abs(m.others):.2f} cores"
    )
