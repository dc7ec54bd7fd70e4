"""The command line as a user meets it: exit codes, one-line errors, files written, nothing overwritten."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from decoupled import cli, methods
from decoupled.records import threads

SMALL = ["data={name: digits, limit: 200}", "model={name: mlp, width: 16, depth: 3}", "epochs=2", "batch_size=50"]


def run(*words: str) -> int:
    return cli.main(list(words))


def test_compare_writes_three_files_and_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["compare", "methods=[backprop,{name: greedy_local, head: mlp}]", "seeds=2", *SMALL, "--out", str(out)]
    assert run(*words) == 0
    results = json.loads((out / "results.json").read_text())
    assert [r["label"] for r in results["records"]] == 2 * [
        "backprop", "greedy_local(head=mlp)", f"plain PyTorch, {threads()}", "only the last block",
    ]  # fmt: skip
    for record in results["records"]:
        assert record["status"] == "ok"
        assert record["samples"] == 400
        assert 0 <= record["test_accuracy"] <= 1
        assert len(record["curve"]) == 2
    backprop, greedy = results["records"][:2]
    assert backprop["speedup_over_backprop"] == 1.0
    assert backprop["bytes_down_per_sample"] == backprop["bytes_up_per_sample"] == [16 * 4]
    assert greedy["bytes_down_per_sample"] == [0]
    assert greedy["auxiliary_parameters"] > 0 == backprop["auxiliary_parameters"]
    assert json.loads((out / "trace.json").read_text())["traceEvents"]
    assert "<svg" in (out / "report.html").read_text()
    assert str(out / "report.html") in capsys.readouterr().out
    before = (out / "results.json").read_bytes()
    assert run(*words) == 2
    assert "exists already" in capsys.readouterr().err
    assert (out / "results.json").read_bytes() == before
    assert run("report", str(out)) == 0


def test_plain_pytorch_and_backprop_learn_the_same(tmp_path: Path) -> None:
    """The control outside the library sees the same batches, weights and schedule."""
    out = tmp_path / "out=1"  # words and options may come in any order
    assert run("compare", "methods=[backprop]", "--quiet", "--out", str(out), "seeds=1", *SMALL) == 0
    backprop, plain, _ = json.loads((out / "results.json").read_text())["records"]
    for ours, theirs in zip(backprop["curve"], plain["curve"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        assert ours["validation_accuracy"] == pytest.approx(theirs["validation_accuracy"], abs=0.02)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "methods=[pipedreem]"], "Did you mean 'pipedream'"),
        (["compare", "suite=visoin"], "Did you mean 'vision'"),
        (["compare", "seed=3"], "Did you mean 'seeds'"),
        (["compare", "seeds=0"], "seeds must be at least 1"),
        (["compare", "blocks=0"], "block"),
        (["compare", "blocks=99"], "block"),
        (["compare", "blocks=[99]"], "99"),
        (["train", "method=gpipe", "model=resnet21"], "21"),
        (["train", "method={name: gpipe, microbatch: 2}"], "Did you mean 'microbatches'"),
        (["train", "method={name: gpipe, microbatches: two}"], "must be int"),
        (["train", "method=backprop", "data=digit"], "Did you mean 'digits'"),
        (["train", "method=backprop", "data={name: fashion_mnist, path: /nowhere}"], "/nowhere"),
        (["train", "method=backprop", "runtime=thread"], "Did you mean 'threads'"),
        (["train", "method=backprop", "optimizer=sgdd"], "Did you mean 'sgd'"),
        (["train", "method=backprop", "resume=nothing.pt"], "nothing.pt does not exist"),
        (["train", "method=backprop", "other_method=True"], "other_method=True goes with resume=CHECKPOINT"),
        (["train", "method=backprop", "--config", "."], "the configuration file . is a directory; name a YAML file"),
        (["train", "method=backprop", "model=mlp", "blocks=abc"], "an integer or a list of cut indices, got 'abc'"),
        (["train", "method=backprop", "lr=inf"], "lr, momentum and weight_decay must be finite; got inf"),
        (["train", "method=backprop", "momentum=nan"], "must be finite; got 0.1, nan, 0.0"),
        (["train", "method=backprop", "weight_decay=inf"], "must be finite; got 0.1, 0.9, inf"),
        (["train", "method=backprop", "optimizer=adam", "momentum=0.5"], "momentum=0.5 means nothing for adam"),
        (["train", "method=backprop", "model=mlp", "precision={name: bf16, growth: 3}"], "leave out growth, or"),
        (["train", "method=backprop", "--events", "5"], "--events 5 must be at least 0, and needs the directory"),
        (["train", "method=backprop", "--events", "-3", "--out", "x"], "--events -3 must be at least 0"),
        (["flops", "method=backprop", "update=nan"], "update must be FLOPs per weight and step, at least 0, got nan"),
        (["flops", "method=backprop", "update=-1"], "at least 0, got -1.0"),
        (["flops", "method=backprop", "inputs=[4]", "data=cifar10"], "inputs=[4] stands in the place of data=cifar10"),
        (["flops", "method=backprop", "classes=100"], "classes=100 goes with inputs=SHAPE"),
        (["info", "pipedream", "method=gpipe"], "one method at a time, got gpipe, pipedream"),
        (["simulate", "method=gpipe", "sweep={blocks: [2,4]}", "blocks=8"], "leave out blocks=8"),
        (["train", "method=backprop", "steps=5"], "steps=5 means nothing for networks cut into blocks; leave it out"),
        (["train", "method=backprop", "actors=2"], "actors=2 means nothing for networks cut into blocks"),
        (["simulate", "method=gpipe", "blocks=0"], "at least 1"),
        (["info", "pipedreams"], "Did you mean 'pipedream'"),
        (["info", "pipedream", "recompute=true"], "method={name: NAME, recompute: ...}"),
        (["info", "pipedream", "blocks=0"], "blocks must be at least 1"),
        (["info", "pipedream", "fdg"], "one method at a time, got pipedream, fdg"),
        (["report", "nowhere"], "nowhere"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spec", ["", "null", "3", "[backprop]", "{}", "{reach: 2}", "{nme: backprop}"])
def test_a_malformed_method_is_one_line_wherever_it_is_named(
    spec: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for words in (
        ["train", f"method={spec}"],
        ["train", f"method={spec}", "--out", str(tmp_path / "out")],
        ["train", f"method={spec}", "task=list_reduction"],
        ["train", f"method={spec}", "env=Pendulum-v1"],
        ["flops", f"method={spec}"],
        ["info", f"method={spec}"],
        ["simulate", f"method=[{spec or 'null'}]", "--out", str(tmp_path / "out")],
        ["compare", f"methods=[{spec or 'null'}]", "--out", str(tmp_path / "out")],
    ):
        assert run(*words) == 2, words
        error = capsys.readouterr().err
        assert "write NAME or {name: NAME, ...}" in error or "write {name: NAME, ...}" in error, error
        assert error.count("\n") == 1 and list(tmp_path.iterdir()) == [], words


def test_a_failing_method_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["methods=[backprop,greedy_local]", "lr=1e30", "optimizer=sgd", "seeds=1", "controls=false"]
    code = run("compare", *SMALL, *words, "--quiet", "--out", str(out))
    records = json.loads((out / "results.json").read_text())["records"]
    assert [r["status"] for r in records] == ["failed", "failed"]
    assert "block1" in records[0]["error"]
    assert "the loss is" in records[0]["error"]
    assert code == 1


def test_train_saves_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "method=pipedream", "blocks=[1]", *SMALL, "schedule=constant"]  # measured cuts may differ
    assert run(*words, "--out", str(tmp_path / "whole")) == 0
    assert run(*words, "epochs=1", "--out", str(tmp_path / "first")) == 0
    resumed = [f"resume={tmp_path / 'first' / 'checkpoint.pt'}", "--out", str(tmp_path / "second"), "--json"]
    capsys.readouterr()
    for other, remedy in (
        ("lr=0.5", "goes on with lr=0.1, as its"),
        ("momentum=0.5", "momentum=0.9, as"),
        ("weight_decay=0.1", "decay=0, as"),
    ):
        assert run(*words, *resumed, other) == 2
        error = capsys.readouterr().err
        assert remedy in error and error.count("\n") == 1, error
    assert run(*words, *resumed) == 0
    assert len(json.loads(capsys.readouterr().out)["history"]) == 1
    whole, second = (torch.load(tmp_path / d / "checkpoint.pt", weights_only=True) for d in ("whole", "second"))
    for a, b in zip(whole["blocks"], second["blocks"], strict=True):
        for key, value in a["block"]["module"].items():
            assert torch.equal(value, b["block"]["module"][key])
    assert (tmp_path / "whole" / "config.yaml").is_file()
    assert len((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()) == 2


def test_train_goes_on_with_another_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PipeMare's T3: a synchronous warm-up; the error names the remedy in words that the command takes."""
    words = ["train", "blocks=[1]", *SMALL]
    assert run(*words, "method=one_f_one_b", "epochs=1", "--out", str(tmp_path / "first")) == 0  # schedule: cosine
    after = [*words, "method=pipemare", f"resume={tmp_path / 'first' / 'checkpoint.pt'}", "--json"]
    capsys.readouterr()
    assert run(*after) == 2
    assert "other_method=True takes over" in capsys.readouterr().err
    assert run(*after, "other_method=True") == 0
    history = json.loads(capsys.readouterr().out)["history"]
    assert [epoch["epoch"] for epoch in history] == [2]


def test_simulate_list_and_info_speak_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("simulate", "method=pipedream", "blocks=3", "slow={1: 2.0}", "--json") == 0
    assert json.loads(capsys.readouterr().out)["staleness"][2] == {"0": 64}
    assert run("list", "--json") == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == methods(object)
    assert run("info", "pipedream", "--json", "--blocks", "3") == 0
    assert json.loads(capsys.readouterr().out)["updates between forward and backward"] == [2, 1, 0]
    assert run("info", "{name: overlapping_local, reach: 3}", "blocks=4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["options"]["reach"] == 3
    assert found["objectives that reach block k"] == {"0": [2], "1": [2, 3], "2": [2, 3], "3": [3]}
    assert run("info", "pipedream") == 0
    assert "## In one sentence" in capsys.readouterr().out
    assert run("simulate", "method=pipedream") == 0
    assert "block3" in capsys.readouterr().out


def test_python_m_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "decoupled", "info", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("decoupled: unknown method 'nothing'")


def test_interrupt_stops_everything(tmp_path: Path) -> None:
    """Ctrl-C in the middle: exit code 1, one line, finished records kept, no thread left hanging."""
    out = tmp_path / "out"
    words = ["compare", "methods=[pipedream]", "controls=false", "seeds=1", *SMALL, "epochs=100000", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", _ANNOUNCING, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "training\n"
    process.send_signal(signal.SIGINT)
    try:
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "interrupted" in error
    assert "Traceback" not in error
    assert (out / "results.json").is_file()


_ANNOUNCING = """
import sys
from decoupled import cli, trainer
original = trainer.Trainer._run_epoch
def announce(self, batches):
    record = original(self, batches)
    if self.epoch == 2:
        print("training", flush=True)
    return record
trainer.Trainer._run_epoch = announce
sys.exit(cli.main(sys.argv[1:]))
"""
