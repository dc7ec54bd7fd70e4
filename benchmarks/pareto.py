"""Keep a local_pareto comparison: `python -m decoupled.benchmarks.pareto DIR` after `decoupled compare ... --out DIR`.

DIR/results.json --> benchmarks/results/SUITE.md          what was claimed and what came out, and the tables
                     benchmarks/results/SUITE_CUTOFF.svg  the frontiers of the page, one picture per loss
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
from decoupled.benchmarks.publish import by_label, provenance
from decoupled.benchmarks.speed import RESULTS
from decoupled.observe import claims, frontier
from decoupled.observe.points import best, describe, last_loss
from decoupled.observe.report import summarise

# The report's colours, for a picture that stands alone.
STYLE = """<style>svg{background:#fff;font:12px sans-serif}text{fill:#1b1e23}.grid{stroke:#dcdfe4}
.tick,.axis,.value{fill:#616873}.k0{--k:#0064a8}.k1{--k:#c24a00}.k2{--k:#00906a}.k3{--k:#94296f}.k4{--k:#cf9a00}
.k5{--k:#4aabe6}.kb{--k:#23272d}.kc{--k:#9ba1aa}.line{fill:none;stroke:var(--k);stroke-width:2}.kb .line{stroke-width:3}
.leader{fill:none;stroke:var(--k);stroke-opacity:.5}.dot{fill:var(--k)}.faint{fill-opacity:.35}.hit{fill:none}</style>"""


def page(results: Mapping[str, Any]) -> dict[str, str]:
    """The page and its pictures by file name."""
    suite, styles = results["suite"], {m.label: m.style for m in summarise(results)}
    shown = frontier.section(results, styles)
    minutes = sum(record.get("wall_seconds") or 0.0 for record in results["records"]) / 60
    config = results["config"]
    sweep = "; ".join(f"{key} {', '.join(map(str, values))}" for key, values in config["sweep"].items())
    parts = [
        f"# Suite {suite}",
        f"{provenance(dict(results))} Swept, the same for every method: {sweep}. {minutes:.1f} minutes of training in "
        "all. A small run: the orders below are those of short training, not of convergence.",
        "## What was claimed, and what came out",
        *(_claim(found) for found in claims.findings(results)),
        "## Best point of every method",
        _best(results),
    ]
    if shown is None:
        return {f"{suite}.md": "\n\n".join(parts) + "\n"}
    files: dict[str, str] = {}
    for part in shown["cutoffs"]:
        parts += [f"## To a validation loss of {part['cutoff']}"]
        for name, figure in zip(("model", "measured"), part["figures"], strict=False):
            files[f"{suite}_{part['cutoff']}_{name}.svg"] = alone(str(figure))
            parts.append(f"![{name}]({suite}_{part['cutoff']}_{name}.svg)")
        header = ["least of any point", f"sequential {shown['unit']}FLOP", f"total {shown['unit']}FLOP", "seconds"]
        parts.append(table(header, [[row["label"], *row["cells"]] for row in part["rows"]]))
    workers = shown["workers"]
    header = ["method", "MFLOP/example", "critical path", "predicted, a worker per block",
              f"predicted, {workers} workers", f"measured, {workers} workers"]  # fmt: skip
    parts += [
        "## The model and the measurement",
        f"Speed-up over {results['baseline']} on runtime {results['runtime']}; measured: median and range over the "
        "sweep. The model leaves out messages, elementwise work, small operations and waiting.",
        table(header, [[row["label"], *row["cells"]] for row in shown["model"]]),
    ]
    return files | {f"{suite}.md": "\n\n".join(parts) + "\n"}


def _claim(found: claims.Finding) -> str:
    return "\n".join([f"**{found.text}: {found.verdict}**", "", *(f"- {step}" for step in found.steps)])


def _best(results: Mapping[str, Any]) -> str:
    rows = []
    for label, records in by_label(dict(results)).items():
        runs = best(records)
        good = [run["test_accuracy"] for run in runs if run["test_accuracy"] is not None]
        accuracy = f"{100 * fmean(good):.1f}" if good else "failed"
        seconds = f"{fmean(run['wall_seconds'] or 0.0 for run in runs):.1f}"
        loss = f"{fmean(map(last_loss, runs)):.3f}"
        rows.append([label, describe(runs[0]["point"]), loss, accuracy, seconds])
    return table(["method", "point", "validation loss", "test accuracy, %", "seconds"], rows)


def alone(svg: str) -> str:
    """A chart of the report as a file of its own."""
    head, rest = svg.split(">", 1)
    width, height = head.split('viewBox="')[1].split('"')[0].split()[2:]
    size = f'width="{width}" height="{height}"'
    return f'{head} xmlns="http://www.w3.org/2000/svg" {size}>{STYLE}{rest}\n'


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page of one comparison."""
    parser = argparse.ArgumentParser(prog="python -m decoupled.benchmarks.pareto", description=__doc__)
    parser.add_argument("directory", type=Path, help="written by `decoupled compare suite=local_pareto_...`")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page and its pictures")
    given = parser.parse_args(arguments)
    source = given.directory / "results.json"
    if not source.is_file():
        parser.error(f"{source} does not exist; give a directory written by `decoupled compare`")
    files = page(json.loads(source.read_text(encoding="utf-8")))
    given.out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write(given.out / name, text)
        print(given.out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
