"""How results get into the cards: which rows, under which mark, and that the suite of the zoo has everything."""

import json
import sys

import pytest

from decoupled import registry
from decoupled.benchmarks import publish
from decoupled.config import CompareConfig, read

EMPTY = "# {}\n\n## Results\n\n<!-- results -->\nNot measured yet.\n<!-- /results -->\n"


def record(name, kind="method"):
    return {
        "method": name, "label": name, "kind": kind, "status": "ok", "seed": 0, "test_accuracy": 0.9,
        "speedup_over_backprop": 1.5, "utilisation": [0.5], "peak_held_bytes": [2**20], "bytes_up_per_sample": [1024],
        "bytes_down_per_sample": [0], "staleness": [{"0": 2}],
    }  # fmt: skip


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A copy of what is written, and a comparison of three methods with `base` as the baseline."""
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "methods" / "family").mkdir(parents=True)
    (tmp_path / "README.md").write_text("no mark")
    for name in ("base", "new", "old"):
        (tmp_path / "methods" / "family" / f"{name}.md").write_text(EMPTY.format(name))
    (tmp_path / "methods" / "family" / "old.md").write_text(EMPTY.format("old").replace("Not measured yet.", "| old |"))
    results = {
        "suite": "s", "baseline": "base", "records": [record("base"), record("new"), record("old")], "command": "c",
        "environment": dict.fromkeys(("device", "cpu", "threads", "torch", "python"), "x"), "created": "2026-01-01T00",
        "config": {"recipe": dict.fromkeys(("epochs", "batch_size", "optimizer", "lr", "schedule"), 1)},
        "data": "d", "model": "m", "blocks": 2, "cuts": [1], "runtime": "threads",
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path


def published(tree, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["publish", str(tree), *words])
    publish.main()
    return {name: (tree / "methods" / "family" / f"{name}.md").read_text() for name in ("base", "new", "old")}


def test_a_card_gets_its_own_rows_under_those_of_the_baseline(tree, monkeypatch):
    cards = published(tree, monkeypatch)
    assert [line.split()[1] for line in cards["new"].splitlines() if line.startswith("| ")] == ["method", "base", "new"]
    assert cards["base"].count("| base |") == 1
    assert "| old | 90.0" in cards["old"]
    assert "| new | 90.0" in (tree / "benchmarks" / "results" / "s.md").read_text()


def test_cards_that_have_a_table_are_left_alone_on_demand(tree, monkeypatch):
    before = (tree / "methods" / "family" / "old.md").read_text()
    cards = published(tree, monkeypatch, "--missing")
    assert cards["old"] == before
    assert "Not measured yet." not in cards["new"]


def test_the_suite_of_the_zoo_has_every_method():
    """But those that choose what another method trains on: their suite is `selection`."""
    chains = [name for name in registry.methods() if registry.make(name).selection is None]
    assert sorted(read(CompareConfig, ["suite=zoo"]).methods) == chains


def test_the_readme_has_the_figures_of_the_speed_page_without_its_notes(tmp_path):
    pages = tmp_path / "benchmarks" / "results"
    pages.mkdir(parents=True)
    (tmp_path / "README.md").write_text("# A\n\n<!-- speed -->\nold\n<!-- /speed -->\n\nb\n")
    (pages / "speed.md").write_text("# Speed\n\n<!-- notes -->\nmine\n<!-- /notes -->\n\n| 1 |\n\n## More\n\n| 2 |\n")
    publish.carry_pages(tmp_path)
    assert (tmp_path / "README.md").read_text() == (
        "# A\n\n<!-- speed -->\n| 1 |\n\nMore in [speed.md](benchmarks/results/speed.md).\n<!-- /speed -->\n\nb\n"
    )
