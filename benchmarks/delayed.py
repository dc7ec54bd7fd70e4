"""The page of a comparison that swept blocks and optimizers: `python -m decoupled.benchmarks.delayed DIR [DIR ...]`.

    DIR/results.json, written by `decoupled compare suite=delayed --out DIR`
      -> of several learning rates the best one per method, optimizer and number of blocks, as in the report: the least
         mean validation loss, infinite where a seed failed
      -> one table per optimizer: methods down, numbers of blocks across, accuracy or loss as mean (min..max) over seeds
      -> what each correction changes against its method without one, at the same blocks, optimizer and seed

Comparisons of one suite, such as halves of its methods that were run side by side, make one section. The page is
benchmarks/results/delayed.md, or another one: `--page`, `--title`; its sections of other suites stay as they are. A
cell says how many seeds it has if some are missing.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from decoupled.benchmarks.page import table, write
from decoupled.benchmarks.publish import ROOT
from decoupled.config import suite_methods, suites
from decoupled.errors import UserError
from decoupled.observe.points import best, last_loss
from decoupled.resumed import run_of
from decoupled.specs import label

Record = Mapping[str, Any]
Name = Callable[[Record], str]


@dataclass(frozen=True)
class Measure:
    """What a table shows: a field of the records, times `scale`."""

    field: str
    words: str
    scale: float
    digits: int

    def of(self, record: Record) -> float:
        return self.scale * record[self.field]


ACCURACY = Measure("test_accuracy", "Test accuracy in %", 100.0, 1)
LOSS = Measure("test_loss", "Test loss, nats (lower is better)", 1.0, 3)
SHARED = {"methods": None, "baseline": None}  # what parts of one comparison may differ in
TEXTS = {"python_source"}  # whose loss says more than the accuracy


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", type=Path, nargs="+", help="written by `decoupled compare`")
    parser.add_argument("--page", default="delayed", help="name of the page (default: delayed)")
    parser.add_argument("--title", default="Delayed gradients", help="its title (default: Delayed gradients)")
    given = parser.parse_args()
    parts = [json.loads((path / "results.json").read_text(encoding="utf-8")) for path in given.directories]
    path = ROOT / "benchmarks" / "results" / f"{given.page}.md"
    found = sections(path.read_text(encoding="utf-8")) if path.exists() else {}
    found |= {part["suite"]: section(part) for part in joined(parts)}
    write(path, f"# {given.title}\n\n" + "\n\n".join(found.values()) + "\n")


def sections(page: str) -> dict[str, str]:
    """What a page has of each suite."""
    return {part.partition("\n")[0].strip(): f"## Suite {part}".rstrip() for part in page.split("\n## Suite ")[1:]}


def joined(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One comparison per suite, its methods in the order that the suite lists them in; no run counts twice.

    Raises:
        UserError: parts of one suite were made with other options or seeds.
    """
    wholes: dict[str, dict[str, Any]] = {}
    for part in parts:
        whole = wholes.setdefault(part["suite"], {**part, "command": "", "records": []})
        if {**part["config"], **SHARED} != {**whole["config"], **SHARED}:
            raise UserError(f"two comparisons of suite {part['suite']} differ in more than methods; give one of them")
        whole["command"] += "`, `" * bool(whole["command"]) + part["command"]
        runs = {run_of(record): record for record in [*whole["records"], *part["records"]]}
        whole["records"] = in_order(part["suite"], list(runs.values()))
    return list(wholes.values())


def in_order(suite: str, records: Sequence[Record]) -> list[Record]:
    """Records by method, as the suite lists them; others behind."""
    listed = list(map(label, suite_methods(suite))) if suite in suites() else []
    return sorted(records, key=lambda r: listed.index(r["label"]) if r["label"] in listed else len(listed))


def section(results: Mapping[str, Any]) -> str:
    """The part of the page for one comparison."""
    records, machine = results["records"], results["environment"]
    recipe, seeds = results["config"]["recipe"], results["config"]["seeds"]
    measure = LOSS if results["data"].partition("(")[0] in TEXTS else ACCURACY
    optimizer, rate = optimizer_of(results), rate_of(results)
    seconds = sum(record["wall_seconds"] or 0.0 for record in records)
    groups = grouped(records, lambda r: f"{r['label']} {r['blocks']} {optimizer(r)}")
    chosen = [record for group in groups.values() for record in best(group)]
    rates = {name: sorted({rate(r) for r in of}, key=float) for name, of in grouped(records, optimizer).items()}
    several = any(len(found) > 1 for found in rates.values())
    tuned = "; behind it the best of the learning rates by mean validation loss, infinite where a seed failed"
    lines = [
        f"## Suite {results['suite']}",
        f"`{results['command']}`: {results['data']}, {json.dumps(results['config']['model'])}, "
        f"{max((r['samples'] for r in records), default=0)} training samples in {recipe['epochs']} epochs, batch "
        f"{recipe['batch_size']}, {recipe['schedule']} schedule, runtime {results['runtime']}. {measure.words}, "
        f"mean (min..max) over seeds, [n] where n of {seeds} seeds ended well{tuned if several else ''}. Training took "
        f"{seconds / 60:.1f} minutes. "
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, Python {machine['python']}, "
        f"{results['created'][:10]}.",
    ]
    for name, of_optimizer in grouped(chosen, optimizer).items():
        by_blocks = grouped(of_optimizer, lambda record: str(record["blocks"]))
        header = ["method", *(f"K = {K}" for K in by_blocks)]
        shown = rate if several else None
        lines += [
            f"### {name}, lr {' or '.join(rates[name])}",
            table(header, rows(of_optimizer, list(by_blocks), seeds, measure, shown)),
        ]
    gains = [gain for gain in map(gain_of(chosen, optimizer, measure), chosen) if gain is not None]
    if gains:
        lines += ["### What a correction changes", differences(gains, measure)]
    if failed := Counter(f"{r['label']}: {reason(r['error'])}" for r in records if r["status"] != "ok"):
        lines += ["Failed or refused:", "\n".join(f"- {text} ({n} runs)" for text, n in sorted(failed.items()))]
    return "\n\n".join(lines)


def optimizer_of(results: Mapping[str, Any]) -> Name:
    """record -> the optimizer that it was trained with, in words."""

    def name(record: Record) -> str:
        recipe = recipe_of(results, record)
        return recipe["optimizer"] + (f" with momentum {recipe['momentum']}" if recipe["optimizer"] == "sgd" else "")

    return name


def rate_of(results: Mapping[str, Any]) -> Name:
    """record -> the learning rate that it was trained with."""
    return lambda record: f"{recipe_of(results, record)['lr']:g}"


def recipe_of(results: Mapping[str, Any], record: Record) -> Mapping[str, Any]:
    """The recipe of a record: that of the suite, but for what was swept."""
    base, point = results["config"]["recipe"], record.get("point") or {}
    single = {key.removeprefix("recipe."): value for key, value in point.items()}
    return base | {key: value for key, value in single.items() if key in base} | point.get("recipe", {})


def ended_well(record: Record) -> bool:
    """With finite losses."""
    return math.isfinite(last_loss(record)) and record["test_loss"] is not None


def reason(error: str) -> str:
    """An error without the block and the batch where it happened."""
    return re.sub(r"^.*?\(batch \d+\) \(method '[^']*'\): ", "", error)


def grouped(records: Sequence[Record], key: Name) -> dict[str, list[Record]]:
    """Records by what `key` makes of them, in the order of the first."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def rows(
    records: Sequence[Record], columns: Sequence[str], seeds: int, measure: Measure, rate: Name | None
) -> list[list[str]]:
    """One row per method, one cell per number of blocks."""
    return [
        [name, *(cell([r for r in mine if str(r["blocks"]) == column], seeds, measure, rate) for column in columns)]
        for name, mine in grouped(records, lambda record: record["label"]).items()
    ]


def cell(records: Sequence[Record], seeds: int, measure: Measure, rate: Name | None = None) -> str:
    """Mean and range over the seeds that ended well."""
    good, digits = [measure.of(r) for r in records if ended_well(r)], measure.digits
    if not good:
        return "failed" if records else ""
    some = f" [{len(good)}]" if len(good) < seeds else ""
    at = f" at {rate(records[0])}" if rate else ""
    return f"{fmean(good):.{digits}f} ({min(good):.{digits}f}..{max(good):.{digits}f}){some}{at}"


def gain_of(records: Sequence[Record], optimizer: Name, measure: Measure) -> Any:
    """record -> (correction, method, blocks, difference) against the same method without, or None."""

    def place(record: Record) -> tuple[Any, ...]:
        return record["method"], optimizer(record), record["blocks"], record["seed"]

    plain = {place(r): measure.of(r) for r in records if ended_well(r) and r["label"] == r["method"]}

    def gain(record: Record) -> tuple[str, str, int, float] | None:
        spec, without = record["config"]["method"], plain.get(place(record))
        if isinstance(spec, str) or "corrections" not in spec or not ended_well(record) or without is None:
            return None
        return record["label"], record["method"], record["blocks"], measure.of(record) - without

    return gain


def differences(gains: Sequence[tuple[str, str, int, float]], measure: Measure) -> str:
    """Mean difference per correction and number of blocks, over optimizers and seeds."""
    columns, d = sorted({blocks for _, _, blocks, _ in gains}), measure.digits
    lines = []
    for name in dict.fromkeys(gain[0] for gain in gains):
        cells = [[g[3] for g in gains if g[0] == name and g[2] == K] for K in columns]
        lines.append([name, *(f"{fmean(c):+.{d}f} ({min(c):+.{d}f}..{max(c):+.{d}f})" if c else "" for c in cells)])
    return table(["difference", *(f"K = {K}" for K in columns)], lines)


if __name__ == "__main__":
    main()
