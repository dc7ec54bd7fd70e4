"""Carry measured results into the documents: `python -m decoupled.benchmarks.publish DIR` after `decoupled compare`.

    benchmarks/results/<suite>.md     the table, with command, machine and date
    README.md                         the same table between the marks <!-- quick --> and <!-- /quick -->
    methods/<family>/<method>.md      its own rows under those of the baseline, between <!-- results --> and
                                      <!-- /results -->; --only some methods, --missing: only where there is no table

All cards: `decoupled compare suite=zoo --out DIR`, then `python -m decoupled.benchmarks.publish DIR --missing`.

`speed.md` (written by `decoupled.benchmarks.speed`) goes between <!-- speed --> and <!-- /speed --> of the README, and
a page of figures of one method, benchmarks/results/<method>_figures.md, between <!-- figures --> and <!-- /figures -->
of its card. Without DIR only such pages are carried over.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from decoupled.benchmarks.page import NOTES, write
from decoupled.observe.points import held

ROOT = Path(__file__).resolve().parent.parent
HEADER = (
    "| method | test accuracy, % | speed-up over backprop | utilisation | held, MiB | KiB/sample up / down | late |\n"
    "|---|--:|--:|--:|--:|--:|--:|"
)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", help="written by `decoupled compare`")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="fill the cards of these methods only")
    parser.add_argument("--missing", action="store_true", help="leave cards alone that have a table of results")
    given = parser.parse_args()
    if given.directory is not None:
        publish(given.directory, given.only, given.missing)
    carry_pages(ROOT)


def publish(directory: Path, only: Sequence[str] | None = None, missing: bool = False) -> None:
    """Publish one comparison; `only`: into the cards of these methods, `missing`: into those without a table."""
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    rows = {name: row(records) for name, records in by_label(results).items()}
    own: dict[str, list[str]] = {}
    for name, records in by_label(results).items():
        own.setdefault(records[0]["method"], []).append(rows[name])
    suite, where = results["suite"], provenance(results)
    table = "\n".join([HEADER, *rows.values()])
    path = ROOT / "benchmarks" / "results" / f"{suite}.md"
    table += as_trained(by_label(results))
    write(path, f"# Suite {suite}\n\n{where}\n\n{table}\n")
    fill(ROOT / "README.md", suite, f"{table}\n\n{where}")
    for card in (ROOT / "methods").glob("*/*.md"):
        if card.stem not in own or (only is not None and card.stem not in only):
            continue
        if not (missing and measured(card)):
            base = [rows[results["baseline"]]] if results["baseline"] in rows else []
            lines = "\n".join(dict.fromkeys([*base, *own[card.stem]]))
            text = f"Suite `{suite}`, see [all methods](../../benchmarks/results/{suite}.md):\n\n"
            note = as_trained({n: r for n, r in by_label(results).items() if r[0]["method"] == card.stem})
            fill(card, "results", f"{text}{HEADER}\n{lines}{note}\n\n{where}")


def carry_pages(root: Path) -> None:
    """Carry the pages of benchmarks into the documents that have room for them."""
    pages = root / "benchmarks" / "results"
    speed = pages / "speed.md"
    if speed.is_file():
        figures = NOTES.sub("", speed.read_text(encoding="utf-8")).split("\n## ")[0]
        text = re.sub(r"\A# .*\n+", "", figures).strip()
        fill(root / "README.md", "speed", f"{text}\n\nMore in [speed.md](benchmarks/results/speed.md).")
    for card in (root / "methods").glob("*/*.md"):
        page = pages / f"{card.stem}_figures.md"
        if page.is_file():  # its sections are parts of the card's section
            text = re.sub(r"\A# .*\n+", "", page.read_text(encoding="utf-8")).strip()
            fill(card, "figures", re.sub("^## ", "### ", text, flags=re.MULTILINE))


def measured(card: Path) -> bool:
    """Whether the results of a card have a table."""
    return "|" in card.read_text(encoding="utf-8").partition("<!-- results -->")[2]


def by_label(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The records of every contestant, in the order of the first run."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in results["records"]:
        groups.setdefault(record["label"], []).append(record)
    return groups


def row(records: list[dict[str, Any]]) -> str:
    """One line of the table: means over seeds, the range of the accuracy in brackets."""
    good = [record for record in records if record["status"] == "ok"]
    name = records[0]["label"]
    if not good:
        return f"| {name} | failed | | | | | |"
    accuracy = [100 * r["test_accuracy"] for r in good]
    speed = [r["speedup_over_backprop"] for r in good if r["speedup_over_backprop"]]
    cells = [
        f"{fmean(accuracy):.1f} ({min(accuracy):.1f}..{max(accuracy):.1f})",
        f"{fmean(speed):.2f} ({min(speed):.2f}..{max(speed):.2f})" if speed else "",
    ]
    if good[0]["kind"] == "control":
        return f"| {name} | {' | '.join(cells)} | | | | |"
    late = [stale for r in good for histogram in r["staleness"] for stale in expand(histogram)]
    cells += [
        f"{fmean(fmean(r['utilisation']) for r in good):.2f}",
        f"{fmean(sum(held(r)) for r in good) / 2**20:.1f}",
        " / ".join(f"{fmean(sum(r[f'bytes_{way}_per_sample']) for r in good) / 1024:.1f}" for way in ("up", "down")),
        f"{fmean(late):.2f}, at most {max(late)}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def as_trained(groups: dict[str, list[dict[str, Any]]]) -> str:
    """A paragraph on accuracies without running statistics estimated again before the test, if they ever were."""
    found = []
    for name, records in groups.items():
        values = [100 * r["test_accuracy_as_trained"] for r in records if r.get("test_accuracy_as_trained") is not None]
        if values:
            found.append(f"{name} {fmean(values):.1f} ({min(values):.1f}..{max(values):.1f})")
    if not found:
        return ""
    return (
        "\n\nWhere blocks are trained on something else than the forward network gives them, the running statistics of "
        f"BatchNorm were estimated again before every test, on the training images. With those that the last epoch of "
        f"training left behind: {', '.join(found)}."
    )


def expand(histogram: dict[str, int]) -> list[int]:
    """A histogram as a list of values."""
    return [int(value) for value, count in histogram.items() for _ in range(count)]


def provenance(results: dict[str, Any]) -> str:
    """Command, task, machine and date in one paragraph."""
    machine, records = results["environment"], results["records"]
    seeds = len({record["seed"] for record in records})
    recipe = results["config"]["recipe"] | dict.fromkeys(results["config"].get("sweep") or {}, "swept")
    return (
        f"`{results['command']}`: {results['data']}, {results['model']}, {results['blocks']} blocks (cut at "
        f"{results['cuts']}), runtime {results['runtime']}, {recipe['epochs']} epochs, batch {recipe['batch_size']}, "
        f"{recipe['optimizer']} lr {recipe['lr']} {recipe['schedule']}, the same for all; {seeds} seed(s), "
        f"mean (min..max). {machine['device']} ({machine['cpu']}), {machine['threads']} threads, torch "
        f"{machine['torch']}, Python {machine['python']}, {results['created'][:10]}."
    )


def fill(path: Path, mark: str, text: str) -> None:
    """Put `text` between <!-- mark --> and <!-- /mark --> (added after a lone mark)."""
    content = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    if begin not in content:
        return
    if end not in content:
        content = content.replace(begin, f"{begin}\n{end}")
    pattern = re.escape(begin) + r".*?" + re.escape(end)
    filled = re.sub(pattern, lambda _: f"{begin}\n{text}\n{end}", content, flags=re.DOTALL)
    path.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
