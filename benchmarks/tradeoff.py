"""What delay buys, and what bubbles cost: pipelines on the simulator's clock; `python -m` this module.

    delay     utilisation over the latency of a message: gradients as little late as can be, and twice as late
    bubbles   idle share over micro-batches, where every minibatch drains the pipeline: GPipe, 1F1B, zero-bubble

Blocks are equal, forward 1, backward 2; nothing is measured, and nothing is random. Beside each figure stands its
closed form. Results go to ``benchmarks/results/tradeoff.md`` and two pictures.

Sources: closed forms of GPipe (Huang et al. 2019), 1F1B (Narayanan et al. 2021) and zero-bubble (Qi et al. 2024); of
asynchronous orders n (f + b) / (K (f + b) + 2 (K - 1) c) with n passes in flight, at most 1 [derived].
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decoupled import registry
from decoupled.benchmarks.page import produce, table
from decoupled.benchmarks.plot import Axes, Panel, draw
from decoupled.benchmarks.speed import RESULTS
from decoupled.runtime.timing import Timing
from decoupled.simulate import simulate

FORWARD, BACKWARD = 1.0, 2.0
BLOCKS, LATENCIES, MICRO = (4, 8), (0.0, 0.5, 1.0, 2.0, 3.0, 4.0), (1, 2, 4, 8, 16, 32)
LATE: dict[str, Any] = {
    "K-1-k late (pipedream)": "pipedream",
    "2(K-1-k) late (adl, 1 micro-batch)": {"name": "adl", "microbatches": 1},
}
FLUSHED = ("gpipe", "one_f_one_b", "zero_bubble")
_SETTLED, _MINIBATCHES = 40, 120  # until the pipeline is full, and all


def utilisation(method: Any, K: int, latency: float) -> float:
    """Busy share of the blocks in the steady state: filling is taken off."""
    timing = Timing(FORWARD, BACKWARD, latency=latency)
    short, whole = (simulate(method, K, count, timing).time for count in (_SETTLED, _MINIBATCHES))
    return (_MINIBATCHES - _SETTLED) * (FORWARD + BACKWARD) / (whole - short)


def expected(method: Any, K: int, latency: float) -> float:
    """The closed form of `utilisation`."""
    in_flight, work = registry.make(method).facts.in_flight(0, K), FORWARD + BACKWARD
    return min(1.0, in_flight * work / (K * work + 2 * (K - 1) * latency))


def bubble(name: str, K: int, micro: int) -> tuple[float, float | None]:
    """Idle share, and its closed form where the method claims one."""
    found = simulate({"name": name, "microbatches": micro}, K, 4, Timing(FORWARD, BACKWARD))
    return found.bubble, found.closed_form


def pages() -> dict[str, str]:
    """The page and its pictures by their file names."""
    delays = {K: {n: [(c, utilisation(m, K, c)) for c in LATENCIES] for n, m in LATE.items()} for K in BLOCKS}
    idle = {K: {n: [(M, *bubble(n, K, M)) for M in MICRO] for n in FLUSHED} for K in BLOCKS}
    quarters = [0, 0.25, 0.5, 0.75, 1.0]
    late = draw(
        [Panel(f"{K} blocks", lines) for K, lines in delays.items()],
        Axes("latency of a message / forward", "utilisation", LATENCIES, quarters, log=False),
    )
    drained = draw(
        [
            Panel(f"{K} blocks", {n: [(M, b) for M, b, _ in row] for n, row in lines.items()})
            for K, lines in idle.items()
        ],
        Axes("micro-batches", "idle share", MICRO, quarters),
    )
    rows = [
        [f"{K}", name, *(f"{y:.3f} ({expected(LATE[name], K, c):.3f})" for c, y in points)]
        for K, lines in delays.items()
        for name, points in lines.items()
    ]
    idle_rows = [
        [f"{K}", name, *(f"{b:.3f}" + (f" ({form:.3f})" if form is not None else "") for _, b, form in row)]
        for K, lines in idle.items()
        for name, row in lines.items()
    ]
    text = [
        "# What delay buys, and what bubbles cost",
        "`python -m decoupled.benchmarks.tradeoff`: the simulator's clock, equal blocks, forward 1, backward 2, no "
        "time for steps; nothing here was measured, nothing is random. In brackets the closed form.",
        "## Utilisation over latency",
        "Without a flush, in the steady state. A gradient that is twice as late hides twice the latency.",
        "![utilisation over latency](tradeoff_delay.svg)",
        table(["blocks", "gradients", *(f"latency {c:g}" for c in LATENCIES)], rows),
        "## Idle share over micro-batches",
        "Exact gradients: every minibatch drains the pipeline. Zero-bubble halves the backward (inputs, weights); its "
        "form is claimed for at least as many micro-batches as blocks.",
        "![idle share over micro-batches](tradeoff_bubbles.svg)",
        table(["blocks", "method", *(f"M = {M}" for M in MICRO)], idle_rows),
    ]
    return {"tradeoff.md": "\n\n".join(text) + "\n", "tradeoff_delay.svg": late, "tradeoff_bubbles.svg": drained}


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate, print and write."""
    parser = argparse.ArgumentParser(prog="python -m decoupled.benchmarks.tradeoff", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of tradeoff.md")
    return produce(lambda say: pages(), parser.parse_args(arguments).out)


if __name__ == "__main__":
    sys.exit(main())
