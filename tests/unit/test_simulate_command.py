"""`decoupled simulate` as a user sees it: sweeps, pages, profiles, memory limits, and mistakes."""

import json
from pathlib import Path

import pytest

from decoupled.cli import main


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["latency=-1"], "0 or more"),
        (["bandwidth=-1"], "0 or more"),
        (["bandwidth=.nan"], "0 or more, and finite"),
        (["latency=.inf"], "0 or more, and finite"),
        (["jitter=.nan"], "0 or more, and finite"),
        (["forward=[1,.nan,1,1]"], "0 or more, and finite"),
        (["slow={0: .nan}"], "0 or more, and finite"),
        (["weights=.nan", "memory=3"], "weights must be 0 or more, and finite, got nan"),
        (["memory=.inf"], "memory must be 0 or more, and finite, got inf"),
        (["optimizer=-5"], "optimizer (copies of the weights) must be 0 or more"),
        (["forward=[1,2]"], "one per block"),
        (["activation=fast"], "must be a number"),
        (["profile=nowhere"], "decoupled train"),
        (["sweep={foo: [1]}"], "unknown key to sweep"),
        (["sweep={latency: 3}"], "list of values"),
        (["sweep={blocks: [1.5]}"], "whole numbers"),
        (["sweep={latency: [1], jitter: [1]}"], "one key"),
        (["method=[]"], "empty list"),
    ],
)
def test_mistakes_are_one_line(words, says, capsys):
    assert main(["simulate", "method=pipedream", *words]) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1


def test_a_sweep_is_drawn_and_told(tmp_path, capsys):
    out = tmp_path / "page"
    words = ["method=[pipedream,{name: adl, microbatches: 1}]", "sweep={latency: [0, 1, 2]}", "batches=100"]
    assert main(["simulate", *words, "--out", str(out)]) == 0
    assert "pipedream" in capsys.readouterr().out
    page, found = (out / "simulation.html").read_text(), json.loads((out / "simulation.json").read_text())
    assert page.count("<svg") == 5 and page.count("<polyline") == 10
    busy = {one["label"]: sum(one["utilisation"]) / 4 for one in found}
    assert busy["pipedream, latency=2"] < 0.55 < 0.75 < busy["adl(microbatches=1), latency=2"]


def test_what_does_not_fit_is_named_and_ends_with_1(capsys):
    assert main(["simulate", "method=pipedream", "blocks=3", "graph=10", "memory=30", "--json"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["too_small"] == {"0": 36.0}
    assert said.err.strip().endswith("block 0 needs 36; memory would have to be 36")


@pytest.mark.timeout(120)
def test_a_profile_is_simulated(tmp_path: Path, capsys):
    pytest.importorskip("sklearn")
    out = str(tmp_path / "run")
    task = ["model=mlp", "data=digits", "blocks=2", "epochs=1"]
    assert main(["train", "method=features_replay", *task, "--out", out, "--quiet"]) == 0
    blocks = json.loads((tmp_path / "run" / "blocks.json").read_text())
    capsys.readouterr()
    assert main(["simulate", "method=features_replay", f"profile={out}", "batches=20", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["blocks"] == 2 and 0 < found["time"] < 60
    assert found["bytes_up"][0] == pytest.approx(64 * blocks[0]["bytes_up"] / blocks[0]["samples"])
    assert found["held"][-1] == pytest.approx(blocks[-1]["peak_held_bytes"])  # the top block keeps its graph
    assert main(["simulate", "method=pipedream", f"profile={out}", "blocks=3"]) == 2
    assert "2 blocks, asked for are 3" in capsys.readouterr().err
    assert main(["simulate", "method=pipedream", f"profile={out}"]) == 2  # how large would its graph be?
    error = capsys.readouterr().err
    assert "which keeps no graph at block 0" in error and "give graph=BYTES" in error and error.count("\n") == 1
    assert main(["simulate", "method=pipedream", f"profile={out}", "graph=5e5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["held"][0] > 1e6
