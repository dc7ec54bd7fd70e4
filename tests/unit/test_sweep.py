"""A sweep: its points, what stands for a method, and how the page shows it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from decoupled import cli
from decoupled.config import CompareConfig, TrainConfig, changed, read
from decoupled.errors import UserError
from decoupled.experiment import Setting
from decoupled.observe import sweeps
from decoupled.observe.plane import Curve, Scale, plane
from decoupled.observe.points import best, by_point, describe
from decoupled.sweep import points, settings

SMALL = ["data={name: digits, limit: 100}", "model={name: mlp, width: 16, depth: 3}", "epochs=1", "controls=false"]


def config(sweep: str, *words: str) -> CompareConfig:
    return read(CompareConfig, [f"sweep={sweep}", *SMALL, *words])


def test_points_are_all_combinations_and_nothing_is_one() -> None:
    assert points(read(CompareConfig, SMALL)) == [{}]
    assert points(config("{lr: [0.1, 0.2], blocks: [2, [1]]}")) == [
        {"lr": 0.1, "blocks": 2}, {"lr": 0.1, "blocks": [1]}, {"lr": 0.2, "blocks": 2}, {"lr": 0.2, "blocks": [1]},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("{seeds: [1, 2]}", "sweep over 'seeds' is not possible"),
        ("lr", "sweep must map keys to lists"),
        ("{lr: 0.1}", "sweep over lr needs a list of values, got 0.1"),
        ("{lr: []}", "needs a list"),
        ("[lr]", "sweep cannot be ['lr']; write sweep={KEY: VALUE, ...}"),
        ("{lr: [fast]}", "'fast'"),
        ("{recipe: [{lrr: 1}]}", "Did you mean 'lr'"),
        ("{blocks: [9]}", "block"),
    ],
)
def test_a_wrong_sweep_is_one_clear_line(sweep: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        settings(config(sweep))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_are_changed_where_the_point_says_and_share_data_and_cuts() -> None:
    found = [s for _, s in settings(config("{lr: [0.1, 0.2], model.width: [8, 16]}")) if isinstance(s, Setting)]
    assert [(s.task.recipe.lr, s.task.model["width"]) for s in found] == [(0.1, 8), (0.1, 16), (0.2, 8), (0.2, 16)]
    assert found[0].dataset is found[2].dataset
    assert found[0].cuts is found[2].cuts
    assert [len(s.units(0)) for s in found] == [3] * 4


def test_a_name_becomes_a_mapping_where_dots_reach_into_it() -> None:
    assert changed(TrainConfig(method="x", model="mlp"), {"model.width": 8}).model == {"name": "mlp", "width": 8}


def test_describe_is_short() -> None:
    assert describe({}) == ""
    assert describe({"blocks": [2], "recipe": {"optimizer": "adam", "lr": 0.1}}) == "blocks=[2], optimizer=adam, lr=0.1"
    assert describe({"blocks": [1, 2, 3], "lr": 1}).split(", ") == ["blocks=[1,2,3]", "lr=1"]


@pytest.mark.parametrize("name", ["a", "sac", "ddg", "backprop", "features_replay"])
def test_a_short_name_is_drawn_whole(name: str) -> None:
    assert f">{name} <" in plane([Curve(name, "", [(0, 1), (1, 2)], text="96.3")], "t", Scale("x"), Scale("y"))


def record(label: str, lr: float, losses: list[float | None], seed: int = 0) -> dict[str, Any]:
    curve = [{"epoch": e + 1, "validation_loss": loss} for e, loss in enumerate(losses)]
    status = "ok" if losses else "failed"
    return {
        "label": label, "point": {"lr": lr}, "seed": seed, "status": status, "curve": curve, "test_accuracy": 0.5,
    }  # fmt: skip


def test_the_point_with_the_least_mean_loss_stands_for_a_method() -> None:
    """Not the least loss of one seed, nor the least on the way; what fails or diverges never does."""
    good = [record("a", 0.2, [1.0, 0.6], seed) for seed in (0, 1)]
    others = [
        *[record("a", 0.1, [0.1, 0.5 + 0.4 * seed], seed) for seed in (0, 1)],
        *[record("a", 0.3, [0.5, 0.1] if seed else [], seed) for seed in (0, 1)],
        *[record("a", 0.4, [0.5, None], seed) for seed in (0, 1)],
    ]
    assert best([*others, *good]) == good
    assert list(by_point([*others, *good])) == ["lr=0.1", "lr=0.3", "lr=0.4", "lr=0.2"]
    assert best([]) == []


def test_the_section_shows_every_point_and_the_best_of_each_value() -> None:
    records = [record("a", 0.1, [0.5]), record("a", 0.2, [0.7]), record("b", 0.1, []), record("b", 0.2, [0.9])]
    found = sweeps.section({"records": records}, {"a": "k0 d0", "b": "k1 d0"})
    assert found is not None
    assert found["points"] == ["lr=0.1", "lr=0.2"]
    cells = {row["label"]: [(cell["loss"], cell["best"]) for cell in row["cells"]] for row in found["rows"]}
    assert cells == {"a": [("0.500", True), ("0.700", False)], "b": [("failed", False), ("0.900", True)]}
    ((key, figure),) = found["figures"]
    assert key == "lr"
    assert re.findall(r'class="value">([\d.]+)<', str(figure)) == ["0.700", "0.900"]
    assert sweeps.section({"records": [record("a", 0.1, [0.5]) | {"point": {}}]}, {}) is None


def test_a_logarithmic_plane_puts_equal_ratios_at_equal_distances() -> None:
    svg = str(plane([Curve("a", "k0", [(1, 1), (10, 10), (100, 100)])], "t", Scale("x", True), Scale("y", True)))
    spots = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="3', svg)]
    assert len(spots) == 3
    assert spots[1][0] - spots[0][0] == pytest.approx(spots[2][0] - spots[1][0], abs=0.03)
    assert spots[0][1] - spots[1][1] == pytest.approx(spots[1][1] - spots[2][1], abs=0.03)
    assert spots[0][1] > spots[2][1]


@pytest.mark.parametrize("words", [["sweep={runtime: [threads, simulated]}"], ["runtime={name: simulated}"]])
def test_a_simulated_run_has_no_speed_up(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = ["methods=[backprop]", "seeds=1", "blocks=[1]", "batch_size=50", *SMALL, *words]
    assert cli.main(["compare", *small, "--quiet", "--out", str(out)]) == 0
    records = json.loads((out / "results.json").read_text())["records"]
    expected = {"threads": 1.0, "simulated": None}
    assert [r["speedup_over_backprop"] for r in records] == [
        expected[r["point"].get("runtime", "simulated")] for r in records
    ]


def test_compare_runs_every_method_at_every_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["compare", "methods=[backprop,greedy_local]", "sweep={batch_size: [25, 50]}", "seeds=2", *SMALL]
    assert cli.main([*words, "--out", str(out)]) == 0
    records = json.loads((out / "results.json").read_text())["records"]
    assert [(r["seed"], r["point"]["batch_size"], r["label"]) for r in records] == [
        (seed, size, name) for seed in (0, 1) for size in (25, 50) for name in ("backprop", "greedy_local")
    ]
    assert [r["updates"][0] for r in records] == [4, 4, 2, 2] * 2
    assert all(r["speedup_over_backprop"] == 1 for r in records if r["label"] == "backprop")
    assert "best point" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert 'id="sweep"' in page
    assert "Best at each batch_size" in page
