"""The page of a comparison that swept blocks and optimizers: `python -m decoupled.benchmarks.delayed DIR [DIR ...]`.

    DIR/results.json, written by `decoupled compare suite=delayed --out DIR`
      -> one table per recipe: methods down, numbers of blocks across, test accuracy as mean (min..max) over seeds
      -> what each correction changes against its method without one, at the same point and seed

The page is benchmarks/results/delayed.md. A cell says how many seeds it has if some are missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from decoupled.benchmarks.page import table
from decoupled.benchmarks.publish import ROOT

Record = Mapping[str, Any]


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", type=Path, nargs="+", help="written by `decoupled compare`")
    directories = parser.parse_args().directories
    parts = [json.loads((path / "results.json").read_text(encoding="utf-8")) for path in directories]
    path = ROOT / "benchmarks" / "results" / "delayed.md"
    path.write_text("# Delayed gradients\n\n" + "\n\n".join(map(section, parts)) + "\n", encoding="utf-8")


def section(results: Mapping[str, Any]) -> str:
    """The part of the page for one comparison."""
    records, machine = results["records"], results["environment"]
    recipe, seeds = results["config"]["recipe"], results["config"]["seeds"]
    seconds = sum(record["wall_seconds"] or 0.0 for record in records)
    lines = [
        f"## Suite {results['suite']}",
        f"`{results['command']}`: {results['data']}, {json.dumps(results['config']['model'])}, "
        f"{max((r['samples'] for r in records), default=0)} training samples in {recipe['epochs']} epochs, batch "
        f"{recipe['batch_size']}, {recipe['schedule']} schedule, runtime {results['runtime']}. Test accuracy in %, "
        f"mean (min..max) over seeds, [n] where n of {seeds} seeds were run. Training took {seconds / 60:.1f} minutes. "
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, Python {machine['python']}, "
        f"{results['created'][:10]}.",
    ]
    for name, of_recipe in grouped(records, recipe_of(results)).items():
        by_blocks = grouped(of_recipe, lambda record: str(record["blocks"]))
        header = ["method", *(f"K = {K}" for K in by_blocks)]
        lines += [f"### {name}", table(header, rows(of_recipe, list(by_blocks), seeds))]
    gains = [gain for gain in map(gain_of(records), records) if gain is not None]
    if gains:
        lines += ["### What a correction changes", differences(gains)]
    if refused := sorted({f"- {r['label']}: {r['error']}" for r in records if r["status"] != "ok"}):
        lines += ["Failed or refused:", "\n".join(refused)]
    return "\n\n".join(lines)


def recipe_of(results: Mapping[str, Any]) -> Any:
    """record -> the recipe that it was trained with, in words."""
    base = results["config"]["recipe"]

    def name(record: Record) -> str:
        recipe = base | (record.get("point") or {}).get("recipe", {})
        momentum = f" with momentum {recipe['momentum']}" if recipe["optimizer"] == "sgd" else ""
        return f"{recipe['optimizer']}{momentum}, lr {recipe['lr']}"

    return name


def grouped(records: Sequence[Record], key: Any) -> dict[str, list[Record]]:
    """Records by what `key` makes of them, in the order of the first."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def rows(records: Sequence[Record], columns: Sequence[str], seeds: int) -> list[list[str]]:
    """One row per method, one cell per number of blocks."""
    return [
        [label, *(cell([r for r in mine if str(r["blocks"]) == column], seeds) for column in columns)]
        for label, mine in grouped(records, lambda record: record["label"]).items()
    ]


def cell(records: Sequence[Record], seeds: int) -> str:
    """Mean and range of the accuracy over the seeds that ended well."""
    good = [100 * r["test_accuracy"] for r in records if r["status"] == "ok"]
    if not good:
        return "failed" if records else ""
    some = f" [{len(good)}]" if len(good) < seeds else ""
    return f"{fmean(good):.1f} ({min(good):.1f}..{max(good):.1f}){some}"


def gain_of(records: Sequence[Record]) -> Any:
    """record -> (correction, method, blocks, difference in points) against the same method without, or None."""
    plain = {
        (r["method"], json.dumps(r["point"]), r["seed"]): r["test_accuracy"]
        for r in records
        if r["status"] == "ok" and r["label"] == r["method"]
    }

    def gain(record: Record) -> tuple[str, str, int, float] | None:
        spec = record["config"]["method"]
        without = plain.get((record["method"], json.dumps(record["point"]), record["seed"]))
        if isinstance(spec, str) or "corrections" not in spec or record["status"] != "ok" or without is None:
            return None
        return record["label"], record["method"], record["blocks"], 100 * (record["test_accuracy"] - without)

    return gain


def differences(gains: Sequence[tuple[str, str, int, float]]) -> str:
    """Mean difference in points per correction and number of blocks, over recipes and seeds."""
    columns = sorted({blocks for _, _, blocks, _ in gains})
    lines = []
    for label in dict.fromkeys(gain[0] for gain in gains):
        cells = [[g[3] for g in gains if g[0] == label and g[2] == K] for K in columns]
        lines.append([label, *(f"{fmean(c):+.1f} ({min(c):+.1f}..{max(c):+.1f})" if c else "" for c in cells)])
    return table(["difference, points", *(f"K = {K}" for K in columns)], lines)


if __name__ == "__main__":
    main()
