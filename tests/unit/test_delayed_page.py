"""The page of suite delayed: the better learning rate stands in it, and corrections beside what they correct."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from decoupled.benchmarks import delayed
from decoupled.errors import UserError


def record(label: str, lr: float, seed: int, loss: float, validation: float, status: str = "ok") -> dict[str, Any]:
    name, _, corrected = label.partition("+")
    method = {"name": name, "corrections": [corrected]} if corrected else name
    return {
        "label": label, "method": name, "config": {"method": method}, "blocks": 2, "seed": seed, "status": status,
        "point": {"blocks": [1], "recipe": {"optimizer": "sgd", "momentum": 0.9, "lr": lr}}, "wall_seconds": 1.0,
        "test_loss": loss, "test_accuracy": 0.5, "curve": [{"validation_loss": validation}], "samples": 10,
        "error": None if status == "ok" else "block1, operation B7 (batch 7) (method 'ddg'): NonFiniteError: nan",
    }  # fmt: skip


def page(data: str, records: list[dict[str, Any]]) -> str:
    return delayed.section(results(data, records))


def results(data: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    config = {
        "recipe": {"epochs": 1, "batch_size": 2, "schedule": "cosine", "lr": 1.0, "optimizer": "sgd", "momentum": 0.9},
        "seeds": 2,
        "model": "mlp",
    }
    environment = {"cpu": "a cpu", "threads": 1, "torch": "2", "python": "3"}
    return {
        "suite": "delayed", "command": "c", "data": data, "config": config, "environment": environment,
        "records": records, "runtime": "simulated", "created": "2026-11-27T00:00",
    }  # fmt: skip


def test_the_rate_with_the_least_validation_loss_is_shown_not_the_one_with_the_least_test_loss() -> None:
    records = [record("ddg", 0.1, seed, 1.0 + seed, 5.0) for seed in range(2)]
    records += [record("ddg", 0.4, seed, 2.0 + seed, 4.0) for seed in range(2)]
    text = page("python_source(length=4)", records)
    assert "### sgd with momentum 0.9, lr 0.1 or 0.4" in text
    assert "| ddg | 2.500 (2.000..3.000) at 0.4 |" in text


def test_a_rate_where_a_seed_failed_comes_after_one_where_none_did() -> None:
    records = [record("ddg", 0.1, seed, 1.0, 9.0) for seed in range(2)]
    records += [record("ddg", 0.4, 0, 1.0, 1.0), record("ddg", 0.4, 1, 1.0, 1.0, "failed")]
    text = page("python_source", records)
    assert "at 0.1 |" in text and "[1]" not in text
    assert "- ddg: NonFiniteError: nan (1 runs)" in text


def test_a_correction_is_held_against_the_best_rate_of_its_method() -> None:
    records = [record("ddg", 0.1, 0, 3.0, 3.0), record("ddg", 0.4, 0, 2.0, 2.0)]
    records += [record("ddg+spike", 0.1, 0, 1.75, 1.0), record("ddg+spike", 0.4, 0, 9.0, 9.0)]
    assert "| ddg+spike | -0.250 (-0.250..-0.250) |" in page("python_source", records)


def test_images_are_shown_by_accuracy() -> None:
    text = page("digits", [record("ddg", 0.1, seed, 1.0, 1.0) for seed in range(2)])
    assert "| ddg | 50.0 (50.0..50.0) |" in text and "### sgd with momentum 0.9, lr 0.1\n" in text


def test_a_rate_may_be_swept_by_itself_and_null_losses_are_no_results() -> None:
    records = [record("ddg", 0.1, 0, 3.0, 1.0), record("ddg", 0.4, 0, 1.0, 2.0)]
    for one, key in zip(records, ("lr", "recipe.lr"), strict=True):
        one["point"] = {"blocks": [1], key: one["point"]["recipe"]["lr"]}
    assert "| ddg | 3.000 (3.000..3.000) [1] at 0.1 |" in page("python_source", records)
    records[0]["curve"] = [{"validation_loss": None}]
    assert "| ddg | 1.000 (1.000..1.000) [1] at 0.4 |" in page("python_source", records)
    records[1]["test_loss"] = None
    assert "| ddg | failed |" in page("python_source", records)


def test_another_page_has_a_name_and_a_title_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delayed, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    found = results("digits", [record("dtp", 0.1, 0, 1.0, 5.0)])
    (tmp_path / "results.json").write_text(json.dumps(found))
    for more in ([], ["--page", "targets", "--title", "Targets"]):
        monkeypatch.setattr("sys.argv", ["delayed", str(tmp_path), *more])
        delayed.main()
    pages = tmp_path / "benchmarks" / "results"
    assert {path.name: path.read_text().splitlines()[0] for path in pages.iterdir()} == {
        "delayed.md": "# Delayed gradients",
        "targets.md": "# Targets",
    }


def test_halves_of_a_suite_make_one_section_and_other_sections_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delayed, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    page = tmp_path / "benchmarks" / "results" / "delayed.md"

    def write(**suites: list[str]) -> str:
        for name, methods in suites.items():
            (tmp_path / name).mkdir()
            made = results("digits", [record(method, 0.1, 0, 1.0, 1.0) for method in methods])
            made |= {"suite": name.rstrip("12"), "command": f"compare {name}"}
            (tmp_path / name / "results.json").write_text(json.dumps(made))
        monkeypatch.setattr("sys.argv", ["delayed", *(str(tmp_path / name) for name in suites)])
        delayed.main()
        return page.read_text()

    write(mine=["xpipe"], delayed=["fdg"])
    text = write(delayed1=["dsp", "own"], delayed2=["backprop", "fdg"])
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## Suite mine", "## Suite delayed"]
    assert "`compare delayed1`, `compare delayed2`: digits" in text and "| xpipe |" in text
    rows = [line.split(" |")[0] for line in text.partition("## Suite delayed")[2].splitlines() if line.startswith("| ")]
    assert rows == ["| method", "| ---", "| backprop", "| fdg", "| dsp", "| own"]


def test_no_run_counts_twice_and_parts_with_other_options_are_refused() -> None:
    first = results("digits", [record("ddg", 0.1, seed, 1.0, 1.0) for seed in range(2)])
    second = results("digits", [record("ddg", 0.1, 0, 9.0, 1.0), record("dsp", 0.1, 0, 1.0, 1.0)])
    second["config"] |= {"methods": ["dsp"]}
    (whole,) = delayed.joined([first, second])
    assert [(r["label"], r["seed"], r["test_loss"]) for r in whole["records"]] == [
        ("dsp", 0, 1.0), ("ddg", 0, 9.0), ("ddg", 1, 1.0)
    ]  # fmt: skip
    second["config"] |= {"seeds": 1}
    with pytest.raises(UserError, match="suite delayed differ in more than methods"):
        delayed.joined([first, second])
