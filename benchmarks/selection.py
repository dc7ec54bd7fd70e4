"""Keep comparisons of what to train on: `python -m decoupled.benchmarks.selection DIR [DIR ...]`.

    for s in selection selection_rotated selection_noise selection_text; do
        decoupled compare suite=$s --out results/$s; done
    python -m decoupled.benchmarks.selection results/selection*

DIR/results.json --> benchmarks/results/selection.md                    one section per comparison
                     benchmarks/results/SUITE_AXIS.svg                  accuracy against samples trained, updates, FLOPs
                     benchmarks/results/SUITE_loss.svg                  validation loss against samples trained
                     benchmarks/results/SUITE_seconds.svg               accuracy against wall time, if it was measured

A method is shown at its best point (least validation loss at the end), all methods having had the same ones. The
target of a seed is the validation accuracy of the baseline, which trains on everything, after its last epoch; a method
is there at its first crossing, linear between epochs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from decoupled.benchmarks.page import table, write
from decoupled.benchmarks.pareto import alone
from decoupled.benchmarks.publish import by_label, provenance
from decoupled.benchmarks.speed import RESULTS
from decoupled.observe.plane import Curve, Scale, plane
from decoupled.observe.points import best, describe

Record = Mapping[str, Any]
CLAIM = (0.3, 0.4)  # of the operations are saved, says the paper
ASSISTANT = "autoassist"
COUNTS = ("updates", "trained", "samples", "scored")
AXES = {
    "trained": "samples trained",
    "updates": "updates of the boss",
    "flops": "FLOPs, the selector's included",
    "seconds": "seconds",
}
PICTURES = {**{axis: (axis, "accuracy") for axis in AXES}, "loss": ("trained", "loss")}  # by the end of the file's name
STYLES = ("kb", "kc", "k0", "k1", "k2", "k3", "k4", "k5", "kc", "k2", "k3")


def crossing(curve: Sequence[Mapping[str, Any]], target: float, key: str) -> float | None:
    """`key` at the first time that the validation accuracy is at least `target`; None: never."""
    before: Mapping[str, Any] | None = None
    for point in curve:
        now = point["validation_accuracy"]
        if now is not None and now >= target:
            if before is None:
                return float(point[key])
            share = (target - before["validation_accuracy"]) / (now - before["validation_accuracy"])
            return float(before[key] + share * (point[key] - before[key]))
        before = point
    return None


def targets(records: Sequence[Record]) -> dict[int, Mapping[str, Any]]:
    """The last point of the baseline's curve, by seed."""
    return {record["seed"]: record["curve"][-1] for record in records if record["curve"]}


def reached(records: Sequence[Record], goal: Mapping[int, Mapping[str, Any]], key: str) -> list[float | None]:
    """For every seed, `key` at the crossing over the baseline's at its last epoch."""
    found = []
    for record in records:
        end = goal[record["seed"]]
        at = crossing(record["curve"], end["validation_accuracy"], key)
        found.append(None if at is None else at / end[key])
    return found


def verdict(ratios: Sequence[float | None]) -> str:
    """The paper's claim against what came out."""
    got = [1 - ratio for ratio in ratios if ratio is not None]
    if len(got) < len(ratios) or not got:
        return f"refuted here: it got there in {len(got)} of {len(ratios)} seed(s)"
    saved, spread = fmean(got), f"{fmean(got):.0%} ({min(got):.0%}..{max(got):.0%}) of the samples saved"
    if saved < 0:
        return f"refuted here: {spread}, which is more samples and not fewer"
    word = "refuted here: less" if saved < CLAIM[0] else "confirmed here" if saved <= CLAIM[1] else "exceeded here"
    return f"{word}; {spread}"


def section(results: Mapping[str, Any], times: bool) -> tuple[str, dict[str, str]]:
    """The text of one comparison, and its pictures by file name."""
    groups = {label: best([r for r in rs if r["status"] == "ok"]) for label, rs in by_label(dict(results)).items()}
    groups = {label: runs for label, runs in groups.items() if runs}
    goal = targets(groups[results["baseline"]])
    suite, rows, times = results["suite"], [], times and "simulated" not in str(results["runtime"])
    for label, runs in groups.items():
        ends = [run["curve"][-1] for run in runs]
        row = [
            label, describe(runs[0]["point"]) or "-", _spread([100 * r["test_accuracy"] for r in runs], 1),
            _spread([r["test_loss"] for r in runs], 3),
            *(f"{fmean(end.get(key) or 0 for end in ends):,.0f}" for key in COUNTS),
            f"{fmean(end.get('flops') or 0 for end in ends) / 1e9:,.1f}",
            _reached(reached(runs, goal, "trained")), _reached(reached(runs, goal, "flops")),
        ]  # fmt: skip
        if times:
            shares = [100 * run["selection"]["busy_seconds"] / run["wall_seconds"] for run in runs]
            seconds = _spread([run["wall_seconds"] for run in runs], 1)
            row += [f"{fmean(shares):.1f}", seconds, _reached(reached(runs, goal, "seconds"))]
        rows.append(row)
    header = ["method", "best point", "test accuracy, %", "test loss", "updates", "trained", "scanned", "looked at",
              "GFLOP", "samples to the target", "FLOPs to the target"]  # fmt: skip
    header += ["selector's time, %", "seconds", "seconds to the target"] if times else []
    parts = [f"## {suite}", provenance(dict(results)), table(header, rows), _noise(groups, results["baseline"])]
    for label, runs in groups.items():
        if label.split("(")[0] == ASSISTANT:
            parts.append(f"30 to 40 % fewer samples with `{label}`: **{verdict(reached(runs, goal, 'trained'))}**.")
    pictures = {}
    for end, (axis, value) in PICTURES.items():
        if axis == "seconds" and not times:
            continue
        curves = [
            Curve(label, STYLES[i % len(STYLES)], _mean(runs, axis, value))
            for i, (label, runs) in enumerate(groups.items())
        ]
        name, title = f"{suite}_{end}.svg", f"{value} against {AXES[axis]}"
        scale = Scale("accuracy, %" if value == "accuracy" else value)
        pictures[name] = alone(str(plane(curves, f"{suite}: {title}", Scale(AXES[axis]), scale)))
        parts.append(f"![{title}]({name})")
    return "\n\n".join(parts), pictures


def _noise(groups: Mapping[str, Sequence[Record]], baseline: str) -> str:
    """How far seeds differ, beside how far methods do."""
    own = [100 * run["test_accuracy"] for run in groups[baseline]]
    means = [fmean(100 * run["test_accuracy"] for run in runs) for runs in groups.values()]
    seeds, methods = max(own) - min(own), max(means) - min(means)
    text = f"Test accuracy differs by {seeds:.1f} points between seeds of the baseline, {methods:.1f} between methods"
    return f"{text}{': the order of the methods means nothing here' if seeds >= methods else ''}."


def _mean(runs: Sequence[Record], axis: str, value: str) -> list[tuple[float, float]]:
    """The curve on the validation set, mean over the seeds."""
    points, factor = zip(*(run["curve"] for run in runs), strict=True), 100 if value == "accuracy" else 1
    return [(fmean(p[axis] for p in ps), factor * fmean(p[f"validation_{value}"] or 0 for p in ps)) for ps in points]


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{fmean(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def _reached(ratios: Sequence[float | None]) -> str:
    got = [ratio for ratio in ratios if ratio is not None]
    if not got:
        return "never"
    return _spread(got, 2) + (f" in {len(got)} of {len(ratios)}" if len(got) < len(ratios) else "")


def page(comparisons: Sequence[Mapping[str, Any]], times: bool) -> dict[str, str]:
    """The page and its pictures by file name."""
    intro = (
        "Columns: *updates* of the boss, samples it *trained* on, that were *scanned* (the same for all), and *looked "
        "at* (a forward only, before choosing), all at the end; *GFLOP*: forward, backward, updates, looks and the "
        "selector's own models. *To the target*: share of what training on everything takes for all epochs, until the "
        "validation accuracy it has at the end is reached; mean (min..max) over seeds. Short training of small "
        "networks: no statement about convergence. Times only where they were measured: the simulator has a virtual "
        "clock."
    )
    parts, files = ["# What to train on", intro], dict[str, str]()
    for results in comparisons:
        text, pictures = section(results, times)
        parts.append(text)
        files |= pictures
    return {"selection.md": "\n\n".join(parts) + "\n", **files}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page of some comparisons."""
    parser = argparse.ArgumentParser(prog="python -m decoupled.benchmarks.selection", description=__doc__)
    parser.add_argument("directories", nargs="+", type=Path, help="written by `decoupled compare suite=selection...`")
    parser.add_argument("--without-times", action="store_true", help="for a machine that had other work to do")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page and its pictures")
    given = parser.parse_args(arguments)
    comparisons = []
    for directory in given.directories:
        if not (directory / "results.json").is_file():
            parser.error(f"{directory}/results.json does not exist; give a directory written by `decoupled compare`")
        comparisons.append(json.loads((directory / "results.json").read_text(encoding="utf-8")))
    given.out.mkdir(parents=True, exist_ok=True)
    for name, text in page(comparisons, not given.without_times).items():
        write(given.out / name, text)
        print(given.out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
