"""The page of what to train on: crossings, the claim's verdict, and a page of a comparison that was really run."""

import json

import pytest

from decoupled.benchmarks.selection import _mean, crossing, main, page, reached, verdict
from decoupled.compare import compare
from decoupled.config import CompareConfig, read


def curve(*accuracies, step=100):
    return [
        {"validation_accuracy": a, "trained": step * (n + 1), "flops": 2.0 * step * (n + 1)}
        for n, a in enumerate(accuracies)
    ]


def test_a_crossing_is_linear_between_epochs_and_the_first_one():
    assert crossing(curve(0.2, 0.6, 0.4, 0.8), 0.4, "trained") == pytest.approx(150)
    assert crossing(curve(0.5, 0.6), 0.4, "trained") == 100
    assert crossing(curve(0.2, 0.3), 0.4, "trained") is None


def test_what_it_takes_is_relative_to_training_on_everything():
    goal = {0: {"validation_accuracy": 0.6, "trained": 400}}
    assert reached([{"seed": 0, "curve": curve(0.2, 0.6)}], goal, "trained") == [0.5]


@pytest.mark.parametrize(
    ("ratios", "text"),
    [
        ([0.65, 0.65], "confirmed here; 35% (35%..35%)"),
        ([0.9, 0.8], "refuted here: less; 15% (10%..20%)"),
        ([0.4], "exceeded here; 60%"),
        ([1.2], "which is more samples and not fewer"),
        ([0.6, None], "it got there in 1 of 2 seed(s)"),
    ],
)
def test_the_claim_is_held_against_what_came_out(ratios, text):
    assert text in verdict(ratios)


def test_a_comparison_is_run_priced_and_kept(tmp_path):
    words = [
        "suite=selection", "data={name: digits, limit: 128, validation: 64, test: 64}", "model={name: mlp, width: 16}",
        "blocks=2", "seeds=1", "epochs=2", "sweep={lr: [0.1]}",
        "methods=[{name: uniform, fraction: 1.0},{name: autoassist, lag: 2},selective_backprop,rho_loss,infobatch]",
    ]  # fmt: skip
    results = compare(read(CompareConfig, words), tmp_path / "run", "decoupled compare ...", quiet=True)
    ends = {r["label"]: r["curve"][-1] for r in results["records"]}
    every = ends.pop("uniform(fraction=1.0)")
    assert every["trained"] == every["samples"] == 256
    for label, end in ends.items():
        assert end["samples"] == 256 > end["trained"], label
    assert ends["selective_backprop"]["scored"] == 128
    work = {r["label"]: r["flops"] for r in results["records"]}["selective_backprop"]
    found = ends["selective_backprop"]
    expected = found["trained"] * work["example"] + found["updates"] * work["update"] + 128 * work["forward"]
    assert found["flops"] == pytest.approx(expected + found["selector_flops"])
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "page"), "--without-times"]) == 0
    text = (tmp_path / "page" / "selection.md").read_text()
    assert "30 to 40 % fewer samples with `autoassist(lag=2)`" in text
    assert (tmp_path / "page" / "selection_flops.svg").is_file()
    assert "selection: loss against samples trained" in (tmp_path / "page" / "selection_loss.svg").read_text()
    assert "![loss against samples trained](selection_loss.svg)" in text
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    times = page([stored], times=True)["selection.md"]
    assert all(share != "-" and float(share) > 0 for share in column(times, "selector's time, %"))
    assert 0 < float(column(times, "seconds to the target")[0].split()[0]) <= 1
    files = page([stored], times=True)
    assert "selection_seconds.svg" in files
    assert "](selection_seconds.svg)" in files["selection.md"]
    for without in (page([stored | {"runtime": "simulated"}], times=True), page([stored], times=False)):
        assert "selection_seconds.svg" not in without
        assert "seconds" not in without["selection.md"]


def column(text, name):
    """The cells of a column of the page's first table."""
    header, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [row[header.index(name)] for row in rows]


def test_the_curve_of_the_loss_is_no_percentage():
    points = [{"trained": 10, "validation_loss": 2.0, "validation_accuracy": 0.5}]
    runs = [{"curve": points}, {"curve": [{**points[0], "validation_loss": 1.0}]}]
    assert _mean(runs, "trained", "loss") == [(10, 1.5)]
    assert _mean(runs, "trained", "accuracy") == [(10, 50.0)]
