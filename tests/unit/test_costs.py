"""The cost of a method as users meet it: `decoupled flops`, records, the lines of `train` and `compare`, and no heads
in the network that is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from decoupled import cli, costs
from decoupled.config import CompareConfig, FlopsConfig
from decoupled.experiment import Setting
from decoupled.testing import Case, label, train, variants

WIDE = ["model={name: mlp, width: 4096, depth: 9}", "inputs=[3072]", "blocks=[1,2,3,4,5,6,7]"]
SMALL = ["data={name: digits, limit: 100}", "model={name: mlp, width: 16, depth: 3}", "blocks=[1,2]"]
CASE = Case(widths=(4, 5, 3, 4, 5, 3), cuts=(1, 2, 4), sizes=(6, 6, 5))


def run(*words: str) -> int:
    return cli.main(list(words))


@pytest.mark.parametrize(
    ("method", "sequential", "total"),
    [
        ("backprop", 755, 755),
        ("{name: chunked_local, chunks: 2}", 369, 722),
        ("{name: chunked_local, chunks: 3}", 269, 689),
        ("overlapping_local", 101, 757),
        ("greedy_local", 67, 522),
    ],
)
def test_the_command_prints_what_was_worked_out_for_the_wide_mlp(
    method: str, sequential: int, total: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs.models, "build", _without_memory(costs.models.build))
    assert run("flops", f"method={method}", *WIDE, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [round(found[name] / 1e6) for name in ("sequential", "total")] == [sequential, total]
    assert len(found["blocks"]) == 8
    assert run("flops", f"method={method}", *WIDE) == 0
    text = capsys.readouterr().out
    assert f"total {found['total'] / 1e6:.2f} MFLOP per example" in text
    assert f"sequential (critical path) {found['sequential'] / 1e6:.2f} MFLOP per example" in text


def test_the_command_says_that_choosing_samples_is_not_in_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for method in ("greedy_local", "{name: uniform, boss: greedy_local}"):
        assert run("flops", f"method={method}", *SMALL) == 0
        texts.append(capsys.readouterr().out)
    plain, selecting = texts
    assert selecting.startswith(plain.rstrip())
    assert "what choosing them costs depends on the run" in selecting.removeprefix(plain.rstrip())


def _without_memory(build):
    """Half a gigabyte of weights is only counted: build it on torch's meta device."""

    def built(spec, inputs, classes, seed=0):
        from decoupled.models import mlp

        with torch.device("meta"):
            return mlp(inputs, classes, width=spec["width"], depth=spec["depth"])

    return built


def test_the_switch_for_input_gradients_that_nobody_needs(capsys: pytest.CaptureFixture[str]) -> None:
    works = []
    for skip in ("true", "false"):
        assert run("flops", "method=greedy_local", *SMALL, f"skip={skip}", "--json") == 0
        works.append([block["work"] for block in json.loads(capsys.readouterr().out)["blocks"]])
    forward = [2 * 64 * 16, 2 * 16 * 16, 2 * 16 * 10]
    assert [b - a for a, b in zip(*works, strict=True)] == forward


def test_every_column_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("flops", "method=greedy_local", *SMALL, "update=4", "--json") == 0
    blocks = json.loads(capsys.readouterr().out)["blocks"]
    f, head = 2 * 64 * 16, 3 * 2 * 16 * 10
    first = {"forward": f, "weights": f, "inputs": f, "both": 2 * f, "rest": f, "head": head, "work": 2 * f + head}
    assert blocks[0] == first | {"update": 4 * (64 * 16 + 16 + 170), "head_parameters": 170}
    assert blocks[2]["head"] == blocks[2]["head_parameters"] == 0


def test_streams_are_paid_for() -> None:
    """Three streams through all blocks but the last."""
    words = {"model": {"name": "mlp", "width": 16, "depth": 3}, "blocks": [1, 2]}
    three = costs.count(FlopsConfig(method="forward_forward", **words)).blocks
    one = costs.count(FlopsConfig(method="greedy_local", **words)).blocks
    assert [a.forward / b.forward for a, b in zip(three, one, strict=True)] == [3, 3, 1]


@pytest.mark.parametrize("spec", variants(), ids=label)
def test_heads_are_counted_as_they_are(spec) -> None:
    """What is counted without running has as many weights as what a trainer builds; others have nothing to count."""
    run_ = train(CASE, spec)
    try:
        counted = costs.flops.cost([nn.Sequential(b) for b in CASE.blocks()], (4,), spec, dtype=torch.float64)
    except costs.UserError:
        return
    modules = [[half.module for half in (w.lower, w.upper) if half.module is not None] for w in run_.trainer.workers]
    held = [sum(p.numel() for m in some for p in m.parameters() if p.requires_grad) for some in modules]
    assert [block.head_parameters for block in counted.blocks] == held


@pytest.mark.parametrize("spec", variants(), ids=label)
def test_heads_are_dropped_when_the_network_is_used(spec) -> None:
    """The network holds the blocks' weights and no other, and ruined heads do not change what it says."""
    run_ = train(CASE, spec)
    network, trainer = run_.trainer.model, run_.trainer
    sizes = [block.parameters for block in trainer.statistics()]
    assert sum(p.numel() for p in network.parameters()) == sum(sizes)
    before = trainer.evaluate(CASE.batches())
    for worker in trainer.workers:
        for half in (worker.lower, worker.upper):
            if half.module is not None:
                for p in half.module.parameters():
                    p.data.fill_(float("nan"))
    assert trainer.evaluate(CASE.batches()) == before
    assert all(torch.isfinite(network(x)).all() for x, _, _ in CASE.batches())


def test_train_and_compare_report_heads_and_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "method=greedy_local", *SMALL, "epochs=1", "--quiet") == 0
    text = capsys.readouterr().out
    assert "data: digits, train 100, validation 180, test 360; 640 images, " in text
    assert "sha256 " in text
    assert (
        "heads and other local parts: 340 weights, dropped from the network; 1,920.00 of 7,680.00 FLOP per sample"
        in text
    )
    assert run("train", "method=backprop", *SMALL, "epochs=1", "--quiet") == 0
    assert "heads" not in capsys.readouterr().out
    out = tmp_path / "out"
    words = ["methods=[backprop,greedy_local,dfa]", *SMALL, "epochs=1", "seeds=1", "--quiet", "--out", str(out)]
    assert run("compare", *words) == 0
    assert "data:   digits, train 100" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert results["dataset"].startswith("digits, train 100")
    backprop, greedy, uncounted, *controls = results["records"]
    assert (sum(backprop["head_flops_per_sample"]), sum(greedy["head_flops_per_sample"])) == (0, 2 * 960)
    assert greedy["sequential_flops_per_sample"] == max(greedy["flops_per_sample"])
    assert backprop["sequential_flops_per_sample"] == sum(backprop["flops_per_sample"])
    for record in (uncounted, *controls):
        assert (record["flops_per_sample"], record["sequential_flops_per_sample"]) == ([], None)
    assert "Work" in (out / "report.html").read_text()


def test_a_hash_tells_data_and_split_apart() -> None:
    def summary(**options: object) -> str:
        return Setting.prepare(CompareConfig(baseline="x", data={"name": "digits", **options})).dataset.summary

    base = summary(limit=50)
    assert base == summary(limit=50)
    assert len({base, summary(limit=51), summary(limit=50, split_seed=1), summary(limit=50, test=361)}) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=dfa"], "method 'dfa' cannot be counted: it sends error"),
        (["method=greedy_local", "inputs=abc"], "inputs must be the shape of one sample, got 'abc'; write e.g."),
        (["method=greedy_local", "inputs=[3,0]"], "inputs must be the shape of one sample, got [3, 0]"),
        (["method=greedy_local", "blocks=99"], "block"),
        (["method=greedy_local", "skp=1"], "Did you mean 'skip'"),
        (["method={name: greedy_local, head: cnn}", *SMALL], "head 'cnn' reads images"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("flops", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_units() -> None:
    assert [costs._unit(value)[1] for value in (0, 9999, 10_000, 1e7, 1e10, 1e19)] == [
        "FLOP", "FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP",
    ]  # fmt: skip
