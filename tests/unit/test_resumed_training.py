"""A run that was cut off goes on after the last epoch that ended, and ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from decoupled import checkpoint, resumed, rundir, train
from decoupled.cli import main

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["train", "method=pipedream", "data=digits", "model=mlp", "blocks=[1]", "batch_size=256", "epochs=4"]
SIMULATED = [*WORDS, "runtime=simulated"]


class Cut(Exception):
    """The end of a run."""


def cut_off(monkeypatch, where):
    """Let `where`, a function of a module, raise at its second call; it has done its work if it is `late`."""
    module, name, late = where
    plain, calls = getattr(module, name), []

    def cutting(*args, **more):
        calls.append(None)
        if len(calls) == 2:
            if late:
                plain(*args, **more)
            raise Cut
        return plain(*args, **more)

    monkeypatch.setattr(module, name, cutting)


def run(*words):
    return main([*words, "--quiet"])


def contents(out):
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    del state["rng"]  # of the whole process; nothing here draws from it
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return state, [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def same(a, b):
    (one, rows), (two, others) = contents(a), contents(b)
    assert rows == others
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    alike(one, two)


def alike(one, two):
    """Nested mappings and lists of the same values, bit for bit."""
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        alike([*one.values()], [*two.values()])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            alike(a, b)
    else:
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run(*SIMULATED, "--out", str(out), "--resume") == 0  # nothing there: it begins
    return out


@pytest.mark.parametrize(
    "where",
    [(train, "_epoch", False), (train, "_epoch", True), (rundir.checkpoint, "save", False)],
    ids=["in an epoch", "behind an epoch", "between record and checkpoint"],
)
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(whole, tmp_path, monkeypatch, where):
    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        cut_off(patch, where)
        with pytest.raises(Cut):
            run(*SIMULATED, "--out", str(out))
    assert contents(out)[0]["position"]["epoch"] == (2 if where[2] else 1)
    with monkeypatch.context() as patch:
        done = []
        patch.setattr(train, "_epoch", lambda *args, plain=train._epoch: done.append(1) or plain(*args))
        assert run(*SIMULATED, "--out", str(out), "--resume") == 0
    assert len(done) == (2 if where[2] else 3)  # it did not begin again
    same(out, whole)


def test_a_run_cut_off_before_its_first_checkpoint_begins_again(whole, tmp_path, monkeypatch):
    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(rundir.checkpoint, "save", lambda *args: (_ for _ in ()).throw(Cut))
        with pytest.raises(Cut):
            run(*SIMULATED, "--out", str(out))
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1
    assert run(*SIMULATED, "--out", str(out), "--resume") == 0
    same(out, whole)


def test_a_line_cut_off_in_the_middle_is_forgotten(whole, tmp_path, monkeypatch):
    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        cut_off(patch, (train, "_epoch", True))
        with pytest.raises(Cut):
            run(*SIMULATED, "--out", str(out))
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "lo')
    assert run(*SIMULATED, "--out", str(out), "--resume") == 0
    same(out, whole)


def test_a_run_that_has_ended_stays_as_it_is(whole, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert {"blocks.json", "events.jsonl.gz"} <= before.keys()
    assert run(*SIMULATED, "--out", str(whole), "--resume") == 0
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before
    assert "test accuracy" in capsys.readouterr().out
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "checkpoint.pt", "metrics.jsonl"):  # it was cut off behind its last epoch
        (tmp_path / "run" / name).write_bytes(before[name])
    assert run(*SIMULATED, "--out", str(tmp_path / "run"), "--resume") == 0
    assert not (tmp_path / "run" / "blocks.json").exists()  # and not a file of zeros


def test_a_run_that_went_on_from_a_checkpoint_elsewhere_goes_on_without_it(whole, tmp_path, monkeypatch):
    first, out = tmp_path / "first.pt", tmp_path / "run"
    first.write_bytes((whole / "checkpoint.pt").read_bytes())
    more = [*SIMULATED, "method=ddg", "epochs=7", f"resume={first}", "other_method=True", "--out", str(out)]
    with monkeypatch.context() as patch:
        cut_off(patch, (train, "_epoch", True))
        with pytest.raises(Cut):
            run(*more)
    first.unlink()
    assert run(*more) == 2
    assert run(*more, "--resume") == 0
    assert [row["epoch"] for row in contents(out)[1]] == [5, 6, 7]
    assert contents(out)[0]["method"] == "ddg"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_line_and_nothing_half_written_stays(tmp_path, monkeypatch, capsys):
    """It was a traceback of the event log, which had no room either, behind two of torch."""
    out, plain = tmp_path / "full", checkpoint.save

    def save(state, path):
        for name in ("checkpoint.pt.partial", "events.jsonl.gz.new"):
            (out / name).symlink_to("/dev/full")
        plain(state, path)

    monkeypatch.setattr(checkpoint, "save", save)
    assert run(*SIMULATED, "--out", str(out)) == 2
    said = (
        f"decoupled: cannot write {out}/checkpoint.pt (No space left on device); make room there, or write elsewhere\n"
    )
    assert capsys.readouterr().err == said
    assert {path.name for path in out.iterdir()} == {"config.yaml", "metrics.jsonl"}


def test_two_do_not_write_to_one_directory(whole, capsys):
    with resumed.alone(whole):
        assert run(*SIMULATED, "--out", str(whole), "--resume") == 2
    assert "another process writes to" in capsys.readouterr().err


def test_a_configuration_that_was_not_written_whole_is_written_again(tmp_path):
    (tmp_path / "config.yaml.new").write_text("data: dig")
    assert run(*SIMULATED, "--out", str(tmp_path)) == 2
    assert run(*SIMULATED, "epochs=1", "--out", str(tmp_path), "--resume") == 0
    assert not (tmp_path / "config.yaml.new").exists()


@pytest.mark.parametrize("lines", ["", "1\n", '{"loss": 1}\n', "null\n"])
def test_records_that_are_missing_are_not_passed_over(whole, tmp_path, capsys, lines):
    out = tmp_path / "run"
    out.mkdir()
    for name in ("config.yaml", "checkpoint.pt"):
        (out / name).write_bytes((whole / name).read_bytes())
    (out / "metrics.jsonl").write_text(lines)
    assert run(*SIMULATED, "--out", str(out), "--resume") == 2
    assert f"metrics.jsonl lacks epochs before {out}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SIMULATED, "--resume"], "--resume and restarts=N need the directory of the run: --out DIR"),
        ([*SIMULATED, "seed=1", "--resume", "--out", "{whole}"], "was made with seed=0; ask for the same"),
        ([*SIMULATED, "restarts=1", "--out", "{other}"], "restarts=N is for runtime=processes, got runtime=simulated"),
        ([*SIMULATED, "restarts=1"], "--resume and restarts=N need the directory of the run: --out DIR"),
        ([*SIMULATED, "restarts=-1"], "restarts must be at least 0, got -1"),
        (["train", "method=ampnet", "task=list_reduction", "restarts=1"], "are not for graphs (task=)"),
        ([*SIMULATED, "lr=0.3", "--resume", "--out", "{whole}"], 'was made with recipe={"optimizer": "sgd", "lr": 0.1'),
        ([*SIMULATED, "--out", "{whole}"], "choose another --out, or go on with the run in it: --resume"),
        ([*SIMULATED, "--resume", "--out", "{other}"], "exists already; nothing was overwritten: choose another --out"),
        (
            [*SIMULATED, "--resume", "--out", "{broken}"],
            "config.yaml cannot be read (ParserError); choose another --out",
        ),
        ([*SIMULATED, "--resume", "--out", "{number}"], "config.yaml cannot be read (OSError); choose another --out"),
    ],
)
def test_what_is_refused(whole, tmp_path, capsys, words, message):
    places = {"whole": whole, **{name: tmp_path / name for name in ("other", "broken", "number")}}
    for name, text in (("other", None), ("broken", "{"), ("number", "1")):
        places[name].mkdir()
        (places[name] / ("config.yaml" if text else "thesis.txt")).write_text(text or "")
    before = contents(whole)
    assert run(*(word.format(**places) for word in words)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert contents(whole)[1] == before[1]


def test_under_torchrun_it_restarts_itself(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(train, "under_torchrun", lambda: True)
    assert run(*WORDS, "runtime=processes", "restarts=1", "--out", str(tmp_path / "run")) == 2
    assert "give it --max-restarts N, and --resume to this command" in capsys.readouterr().err


def killing(monkeypatch, times):
    """Kill the second process after the first `times` epochs that ended; returns what has been killed."""
    plain, killed = train._epoch, []

    def epoch(trainer, *args):
        record = plain(trainer, *args)
        if len(killed) < times:
            killed.append(trainer.runtime._group._children[1].pid)
            os.kill(killed[-1], signal.SIGKILL)
        return record

    monkeypatch.setattr(train, "_epoch", epoch)
    return killed


def test_a_lost_process_is_replaced_and_the_run_ends_as_if_it_had_lived(whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    killed = killing(monkeypatch, 1)
    assert run(*WORDS, "runtime=processes", "restarts=2", "--out", str(out)) == 0
    said = capsys.readouterr().err
    assert len(killed) == 1
    assert "decoupled: rank 1 (block1; process " in said
    assert said.count("beginning again after the last epoch that ended") == 1
    same(out, whole)


@pytest.mark.slow
def test_one_loss_more_than_restarts_ends_the_run(tmp_path, monkeypatch, capsys):
    killed = killing(monkeypatch, 2)
    assert run(*WORDS, "runtime=processes", "restarts=1", "--out", str(tmp_path / "run")) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(killed) == 2
    assert [line.partition(":")[0] for line in said] == ["decoupled"] * 3
    assert "was killed by SIGKILL" in said[2]
    for pid in killed:
        assert not Path(f"/proc/{pid}").exists()


DYING = """
import os, pathlib, sys
from decoupled import cli, train

plain, mark = train._epoch, pathlib.Path(sys.argv.pop(1))

def epoch(*args):
    record = plain(*args)
    if os.environ["RANK"] == "1" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), 9)
    return record

train._epoch = epoch
sys.exit(cli.main())
"""


@pytest.mark.slow
def test_torchrun_restarts_and_the_run_ends_as_if_nothing_had_happened(whole, tmp_path):
    """The second rank dies once, behind its first epoch."""
    out, mark = tmp_path / "run", tmp_path / "died"
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    words = [*WORDS, "runtime=processes", "--resume", "--out", str(out), "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1",
         str(script), str(mark), *words],
        capture_output=True, text=True, timeout=200, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert mark.exists()
    same(out, whole)
