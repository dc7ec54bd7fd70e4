"""`decoupled simulate`: from a configuration to tables, a page and JSON.

method=pipedream                              one table over the blocks, and a timeline
method=[pipedream,fdg]                        one row per method
sweep={latency: [0, 1, 2]}                    every method at every value of one key
--out DIR                                     DIR/simulation.json, DIR/simulation.html
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from decoupled import registry
from decoupled.compare import fresh_directory
from decoupled.config import SimulateConfig
from decoupled.errors import UserError, unknown
from decoupled.observe.recorder import Recorder
from decoupled.observe.trace import timeline_table
from decoupled.runtime.timing import Timing
from decoupled.simulate import Load, Simulation, simulate
from decoupled.simulate.page import delays, number, over_blocks, over_values, sent, write_page
from decoupled.simulate.profile import Profile, load_profile
from decoupled.specs import label

SWEPT = ("blocks", "batches", "forward", "backward", "step", "latency", "jitter", "bandwidth", "seed")
HEAD = (
    "",
    "utilisation",
    "bubble",
    "closed form",
    "per time",
    "speed-up",
    "delay, most",
    "memory, most",
    "sent",
    "path",
)


def run(config: SimulateConfig, out: Path | None = None, as_json: bool = False) -> dict[str, dict[int, float]]:
    """Simulate, print, write; what does not fit into memory: name -> block -> memory it would have to have.

    Raises:
        UserError: an impossible configuration.
    """
    specs = config.method if isinstance(config.method, Sequence) and not isinstance(config.method, str) else None
    methods: list[Any] = [config.method] if specs is None else list(specs)
    recorder = Recorder("simulation", 4 * config.timeline) if config.timeline > 0 and specs is None else None
    profile = None if config.profile is None else load_profile(Path(config.profile))
    if not methods:
        raise UserError("method is an empty list; name one or more (`decoupled list`)")
    for method in methods:
        registry.make(method)  # wrong names are refused before anything is written
    if out is not None:
        fresh_directory(out)
    if config.sweep:
        key, values = _swept(config)
        runs = {label(m): {v: _one(replace(config, method=m, **{key: v}), profile) for v in values} for m in methods}
        flat = {f"{name}, {key}={v:g}": one for name, row in runs.items() for v, one in row.items()}
        figures = over_values(key, runs)
    else:
        flat = {label(m): _one(replace(config, method=m), profile, recorder) for m in methods}
        figures = over_blocks(flat)
    rows = [HEAD, *(_row(name, one) for name, one in flat.items())]
    data = next(iter(flat.values())).as_dict() if len(flat) == 1 and not config.sweep else _listed(flat)
    if out is not None:
        (out / "simulation.json").write_text(json.dumps(data) + "\n", encoding="utf-8")
        write_page(out / "simulation.html", f"Simulation: {', '.join(map(label, methods))}", figures, rows)
    if as_json:
        print(json.dumps(data))
    else:
        if len(flat) == 1 and not config.sweep:
            _print_blocks(next(iter(flat.values())))
            if recorder is not None:
                _print_timeline(recorder, config.timeline, len(next(iter(flat.values())).utilisation))
        _print_rows(rows)
        if out is not None:
            print(f"page: {out / 'simulation.html'}")
    return {name: one.too_small for name, one in flat.items() if one.too_small}


def _one(config: SimulateConfig, profile: Profile | None, recorder: Recorder | None = None) -> Simulation:
    blocks = config.blocks
    if profile is not None:
        if blocks not in (None, profile.blocks):
            raise UserError(
                f"profile {config.profile} has {profile.blocks} blocks, asked for are {blocks}; leave blocks out, or "
                "train with so many"
            )
        blocks = profile.blocks
        if config.graph is None:
            _check_graphs(config, profile)

    def given(name: str, default: Any) -> Any:
        value = getattr(config, name)
        return (default if profile is None else getattr(profile, name)) if value is None else _numbers(name, value)

    timing = Timing(
        forward=given("forward", 1.0), backward=given("backward", 2.0), step=given("step", 0.0),
        latency=given("latency", 0.0), jitter=config.jitter, seed=config.seed, slow=dict(config.slow),
        bandwidth=config.bandwidth,
    )  # fmt: skip
    load = Load(
        activation=given("activation", 1.0), graph=given("graph", 1.0), weights=given("weights", 1.0),
        optimizer=config.optimizer, memory=None if config.memory is None else _numbers("memory", config.memory),
    )  # fmt: skip
    count = 4 if blocks is None else blocks
    return simulate(config.method, count, config.batches, timing, [recorder] if recorder else [], load)


def _check_graphs(config: SimulateConfig, profile: Profile) -> None:
    """A run that keeps no graphs does not tell how large they are."""
    measured, asked, K = registry.make(profile.method), registry.make(config.method), profile.blocks
    missing = [k for k in range(K) if asked.keeps(k, K) == "graph" and measured.keeps(k, K) != "graph"]
    if missing:
        raise UserError(
            f"profile {config.profile} is of {label(profile.method)}, which keeps no graph at block {missing[0]}, but "
            f"{label(config.method)} does: profile a method that does, or give graph=BYTES"
        )


def _numbers(name: str, value: Any) -> Any:
    listed = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not listed or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in listed):
        raise UserError(f"{name} must be a number, or a list with one per block, got {value!r}")
    return value


def _swept(config: SimulateConfig) -> tuple[str, list[Any]]:
    if len(config.sweep) != 1:
        raise UserError(f"sweep takes one key, got {', '.join(config.sweep)}; write sweep={{latency: [0, 1, 2]}}")
    [(key, values)] = config.sweep.items()
    if key not in SWEPT:
        raise unknown("key to sweep", key, SWEPT)
    if (given := getattr(config, key)) != getattr(SimulateConfig, key):
        raise UserError(f"sweep says what {key} is; leave out {key}={given}")
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise UserError(f"sweep takes a list of values, got {values!r}; write sweep={{{key}: [1, 2, 4]}}")
    whole = {f.name for f in fields(SimulateConfig)} & {"blocks", "batches", "seed"}
    for value in values:
        if not isinstance(value, int if key in whole else int | float) or isinstance(value, bool):
            raise UserError(f"{key} cannot be {value!r}; give {'whole ' if key in whole else ''}numbers")
    return key, list(values)


def _listed(found: Mapping[str, Simulation]) -> list[dict[str, Any]]:
    return [{"label": name, **one.as_dict()} for name, one in found.items()]


def _row(name: str, one: Simulation) -> list[str]:
    return [
        name,
        f"{sum(one.utilisation) / one.blocks:.3f}",
        f"{one.bubble:.3f}",
        "" if one.closed_form is None else f"{one.closed_form:.3f}",
        number(one.batches_per_time),
        f"{one.speedup:.2f} of {one.blocks}",
        str(max(delays(one)[1])),
        number(max(one.memory)),
        number(sum(sent(one))),
        path_text(one),
    ]


def path_text(one: Simulation) -> str:
    """Where the critical path spends its time."""
    path, time = one.critical_path, one.time or 1.0
    worst = max(range(one.blocks), key=lambda k: path["blocks"][k])
    return f"block {worst} {path['blocks'][worst] / time:.0%}, messages {path['messages'] / time:.0%}"


def _print_rows(rows: Sequence[Sequence[str]]) -> None:
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    Console(width=max(Console().width, 140) if not Console().is_terminal else None).print(table)


def _print_blocks(one: Simulation) -> None:
    table = Table(
        "block", "utilisation", "staleness (mean)", "(max)", "passes in flight", "updates", "memory", "sent", "path"
    )
    (means, most), bytes_sent = delays(one), sent(one)
    shown = range(one.blocks) if one.blocks <= 16 else [*range(8), *range(one.blocks - 8, one.blocks)]
    for k in shown:
        table.add_row(
            str(k), f"{one.utilisation[k]:.3f}", f"{means[k]:.2f}", str(most[k]), str(one.in_flight[k]),
            str(one.updates[k]), number(one.memory[k]), number(bytes_sent[k]),
            f"{one.critical_path['blocks'][k] / (one.time or 1.0):.1%}",
        )  # fmt: skip
    Console().print(table)
    print(
        f"{one.method}: {one.batches} batches in {one.time:g} time units, mean utilisation "
        f"{sum(one.utilisation) / one.blocks:.3f}, speed-up over one device {one.speedup:.2f} of at most {one.blocks}"
    )


def _print_timeline(recorder: Recorder, passes: int, blocks: int) -> None:
    if blocks <= 16:
        spans = [span for span in recorder.spans if int(span.name[1:] or 0) < passes and span.name != "S"]
        print("\nfirst operations (time units; steps left out):\n" + timeline_table(spans, width=Console().width))
