"""The commands train and compare policies: same files, same records; what cannot be is one clear line."""

from __future__ import annotations

import builtins
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch

from decoupled import cli, registry, rundir
from decoupled.config import CompareConfig, TrainConfig, read, suites
from decoupled.errors import PeerLost
from decoupled.rl import Roles, Spaces, render, train
from decoupled.rl.environments import labelled, maker
from decoupled.rl.experiment import RLSetting
from decoupled.rl.render import write_gif
from decoupled.rl.testing import Line
from decoupled.train import train as whole_train

NAME = min(registry.methods(Roles), key=lambda name: len(registry.options(name)))
SMALL = ["env={name: Pendulum-v1, max_episode_steps: 20}", "batch_size=16", "epochs=2", "runtime=threads"]


def method(**options: Any) -> str:
    given = {"units": 8, "warmup": 60} | options
    return f"{{name: {NAME}, {', '.join(f'{key}: {value}' for key, value in given.items())}}}"


def test_train_writes_what_other_runs_write_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    words = ["train", f"method={method()}", *SMALL, "--quiet"]
    assert cli.main([*words, "steps=100", "--out", str(first), "--events", "20"]) == 0
    assert "test return -" in capsys.readouterr().out
    assert {path.name for path in first.iterdir()} == {
        "config.yaml", "metrics.jsonl", "checkpoint.pt", "events.jsonl.gz"
    }  # fmt: skip
    records = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert [(r["steps"], r["updates"]) for r in records] == [(50, 0), (100, 40)]
    assert records[1]["age"] > 0 and records[1]["srank"] and records[1]["validation_return"] < 0
    assert cli.main(["trace", str(first)]) == 0
    after = [*words, "steps=150", f"resume={first / 'checkpoint.pt'}", "--out", str(second), "--json"]
    assert cli.main([*after, "lr=0.5"]) == 2
    assert "goes on with lr=" in capsys.readouterr().err
    assert cli.main(after) == 0
    (record,) = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert (record["steps"], record["epoch"]) == (150, 3)


class Cut(Exception):
    """The end of a run."""


@pytest.mark.parametrize("after", [1, 2])
def test_a_policy_that_was_cut_off_goes_on_and_ends_as_if_nothing_had_happened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    words = ["train", f"method={method(actors=0)}", *SMALL, "epochs=3", "steps=150", "--quiet", "--json"]
    assert cli.main([*words, "--out", str(tmp_path / "whole")]) == 0
    whole = json.loads(capsys.readouterr().out)
    keep, kept = rundir.keep, []

    def cutting(*arguments: Any) -> None:
        keep(*arguments)
        kept.append(None)
        if len(kept) == after:
            raise Cut

    monkeypatch.setattr(rundir, "keep", cutting)
    words += ["--out", str(tmp_path / "cut")]
    assert cli.main([*words, "resume=nowhere.pt"]) == 2  # and nothing is left of it
    with pytest.raises(Cut):
        cli.main(words)
    assert cli.main(words) == 2  # it does not go on unasked
    (tmp_path / "cut" / "events.jsonl.gz").unlink()  # who is killed writes none
    assert cli.main([*words, "--events", "9", "--resume"]) == 0
    assert cli.main(["trace", str(tmp_path / "cut")]) == 0
    capsys.readouterr()
    assert cli.main([*words, "--resume"]) == 0  # nothing is left to train: the same test again
    again = json.loads(capsys.readouterr().out)
    assert cli.main(["trace", str(tmp_path / "cut")]) == 0  # of the run before
    assert again["test"] == whole["test"]
    for one, other in zip(again["history"], whole["history"], strict=True):
        assert {k: v for k, v in one.items() if "second" not in k} == {
            k: v for k, v in other.items() if "second" not in k
        }
    rows = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["epoch"] for row in rows] == [1, 2, 3]
    assert cli.main([*words, "--resume", "seed=4"]) == 2
    assert "was made with seed=0; ask for the same" in capsys.readouterr().err


def test_a_policy_that_lost_a_process_goes_on_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def once(config: Any, out: Any, events: int, quiet: bool, rollout: bool, resume: bool) -> dict[str, Any]:
        asked.append(resume)
        if len(asked) == 1:
            raise PeerLost("rank 1 was killed")
        return {}

    monkeypatch.setattr("decoupled.train.train_rl", once)
    config = read(TrainConfig, [f"method={NAME}", "env=Pendulum-v1", "runtime=processes", "restarts=1"])
    assert whole_train(config, tmp_path / "run") == {}
    assert asked == [False, True]


def test_compare_draws_returns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = f"methods=[{method()},{method(actors=1)}]"
    words = ["compare", methods, f"baseline={NAME}(units=8, warmup=60)", "seeds=1", "steps=120", *SMALL]
    assert cli.main([*words, "--quiet", "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["suite"] == "rl_small"
    for record in results["records"]:
        assert (record["status"], record["samples"], record["metric"]) == ("ok", 120, "return")
        assert record["test_score"] < 0 and record["test_accuracy"] is None and record["updates"] == [60]
        assert [p["samples"] for p in record["curve"]] == [60, 120]
        assert {"Return at the end", "Age, steps", "Effective rank"} <= set(record["measures"])
    assert results["records"][0]["speedup_over_backprop"] == 1.0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Validation return against thousand samples" in page and "Effective rank" in page
    assert "Test accuracy" not in page.split("<thead>", 1)[1].split("</thead>")[0]
    assert "Pendulum-v1" in capsys.readouterr().out


def test_with_an_environment_the_recipe_is_one_for_policies() -> None:
    config = read(TrainConfig, ["method=x", "env=Pendulum-v1"])
    assert (config.recipe.optimizer, config.recipe.lr, config.recipe.batch_size) == ("adam", 3e-4, 256)
    assert read(TrainConfig, ["method=x", "env=Pendulum-v1", "lr=0.01"]).recipe.lr == 0.01
    assert read(TrainConfig, ["method=x"]).recipe.optimizer == "sgd"
    assert read(CompareConfig, ["env=Hopper-v5"]).suite == "rl_small"
    assert read(CompareConfig, ["env=Hopper-v5"]).env == "Hopper-v5"
    assert read(CompareConfig, ["suite=rl_paper"]).recipe.lr == 3e-4


@pytest.mark.parametrize("suite", [name for name in suites() if name.startswith("rl_")])
def test_methods_of_a_suite_act_at_random_for_the_same_steps(suite: str) -> None:
    config = read(CompareConfig, [f"suite={suite}"])
    RLSetting(config, Spaces(1, 1, 1))  # nothing in it is refused
    assert len({registry.make(spec, Roles).warmup for spec in config.methods}) == 1


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["env=Pendulum-v0"], "env 'Pendulum-v0' cannot be made"),
        (["env=Nothing-v1"], "name one of gymnasium, e.g. env=Pendulum-v1"),
        (["env=HalfCheetah-v2"], "env 'HalfCheetah-v2' cannot be made"),
        (["env=CartPole-v1"], "has actions Discrete(2); these methods need continuous ones"),
        (["env=Pendulum-v1", "batch_size=1000"], "may hold fewer transitions than a batch of 1000"),
        (["env=Pendulum-v1", "steps=5"], "cannot be cut into 10 epochs"),
        (["env=Pendulum-v1", "task=list_reduction"], "env= and task= are different things"),
        (["env=Pendulum-v1", "actors=-1"], "actors and pretrain must be 0 or more"),
        (["env=Pendulum-v1", "lr=0"], "lr must be positive"),
        (["env=Pendulum-v1", "optimizer=muon"], "optimizer=muon is for networks: policies stack the weights"),
        (["env={name: Pendulum-v1, gravity: 1}"], "unexpected keyword argument 'gravity'"),
        (["env={name: Pendulum-v1, g: abc}"], "env 'Pendulum-v1(g=abc)' fails: unsupported operand type(s)"),
        (
            ["env={name: Pendulum-v1, max_episode_steps: -1}", "steps=5"],
            "max_episode_steps must be an integer of at least 1",
        ),
        (["env={name: HalfCheetah-v5, xml_file: nowhere.xml}"], "nowhere.xml does not exist; check its options"),
        (["env=Pendulum-v1", "steps=1000"], f"{NAME}: all of steps=1000 are random (warmup=1000): raise steps, or"),
        (["env=Pendulum-v1", "steps=2000", "seed=-1"], "seed must be an integer between 0 and 2**32, got -1"),
        (["env=Pendulum-v1", "precision=bf16", "lr=0"], "precision=bf16 means nothing for policies; leave it out"),
        (["env=Pendulum-v1", "schedule=cosine", "lr=0"], "schedule=cosine means nothing for policies"),
        (["env=Pendulum-v1", "on_nonfinite=skip", "blocks=3", "lr=0"], "blocks=3 means nothing for policies"),
        (["env=Pendulum-v1", "--rollout", "lr=0"], "a rollout is a file of the run's directory: add --out DIR"),
        ([], "trains policies in environments (env=NAME"),
        (["--rollout"], "only a policy has a rollout"),
    ],
)
def test_what_cannot_be_is_one_line(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", f"method={NAME}", *words, "--quiet"]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("decoupled:")]
    assert len(lines) == 1 and text in lines[0], error


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["steps=60"], f"{NAME}(units=8, warmup=60): all of steps=60 are random"),
        (["steps=120", "sweep.steps=[120,60]"], "all of steps=60 are random"),
        (["steps=120", f"baseline={NAME}"], f"{NAME}: all of steps=120 are random (warmup=1000)"),
        (["steps=120", "cutoffs=[0.5]"], "cutoffs=[0.5] means nothing for policies"),
        (["steps=120", "sweep.augment=[true]"], "augment=True means nothing for policies"),
    ],
)
def test_compare_refuses_before_anything_runs(
    words: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", f"methods=[{method()}]", f"baseline={NAME}(units=8, warmup=60)", *SMALL, *words]
    assert cli.main([*words, "--quiet", "--out", str(tmp_path / "out")]) == 2
    assert text in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_run_that_diverges_is_one_line_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"method={method()}", *SMALL, "steps=400", "lr=1e30", "--quiet"]
    assert cli.main(["train", *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"NonFiniteError: the mean \|td\| of the critics is \w+ in update \d+ \(train\); lower lr", line)
    words = [f"methods=[{method()},{method(layers=1)}]", f"baseline={NAME}(units=8, warmup=60)", "seeds=1", *SMALL]
    words += ["steps=120", "sweep.lr=[1e30,0.001]", "--quiet", "--out", str(tmp_path / "out")]
    assert cli.main(["compare", *words]) == 1
    records = json.loads((tmp_path / "out" / "results.json").read_text())["records"]
    assert [r["status"] for r in records] == ["failed", "failed", "ok", "ok"]
    assert "NonFiniteError" in records[0]["error"]


def test_the_remedy_for_a_missing_package_is_that_of_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise gymnasium.error.DependencyNotInstalled("Box2D is not installed, run `pip install gymnasium[box2d]`")

    monkeypatch.setattr(gymnasium, "make", missing)
    assert cli.main(["train", f"method={NAME}", "env=Pendulum-v1"]) == 2
    assert capsys.readouterr().err.endswith("run `pip install gymnasium[box2d]`\n")

    def without(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", without)
    assert cli.main(["train", f"method={NAME}", "env=Hopper-v5"]) == 2
    assert "No module named 'mujoco'; install it with: pip install" in capsys.readouterr().err


def test_methods_for_networks_do_not_train_policies(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", f"method={registry.methods()[0]}", "env=Pendulum-v1"]) == 2
    assert "trains networks cut into blocks" in capsys.readouterr().err


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name.split(".")[0] == "gymnasium":
            raise ModuleNotFoundError("No module named 'gymnasium'")
        return real(name, *args, **more)

    for module in [module for module in sys.modules if module.split(".")[0] == "gymnasium"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without)
    assert cli.main(["train", f"method={NAME}", "env=Pendulum-v1"]) == 2
    assert "cannot be imported (No module named 'gymnasium'); install it with: pip install" in capsys.readouterr().err


def test_an_environment_with_options_has_a_label() -> None:
    assert labelled("Pendulum-v1") == "Pendulum-v1"
    assert labelled({"name": "Pendulum-v1", "g": 5}) == "Pendulum-v1(g=5)"
    assert maker({"name": "Pendulum-v1", "g": 5})().unwrapped.g == 5


def test_a_rollout_is_a_gif_or_a_line_that_says_why(tmp_path: Path) -> None:
    roles = registry.make({"name": NAME, "units": 8}, Roles)
    agent = roles.agent((17, 6, 17), lambda p: torch.optim.SGD(p, 0.1), 0)  # type: ignore[arg-type]
    said = write_gif({"name": "HalfCheetah-v5", "max_episode_steps": 6}, agent, tmp_path / "x.gif", size=48)
    if (tmp_path / "x.gif").exists():
        assert (tmp_path / "x.gif").read_bytes()[:4] == b"GIF8" and "(6 frames)" in said
    else:
        assert said.startswith("no rollout: this machine cannot draw it (")
    assert "\n" not in said


def test_a_rollout_without_a_time_limit_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []

    def endless() -> Any:
        env = Line(limit=10**9, edge=10**9)()
        env.render = lambda: shown.append(1)
        return env

    monkeypatch.setattr(render, "maker", lambda spec, **_: endless)
    roles = registry.make({"name": NAME, "units": 8}, Roles)
    agent = roles.agent((2, 1, 2), lambda p: torch.optim.SGD(p, 0.1), 0)  # type: ignore[arg-type]
    render._frames(endless, agent, 0)
    assert len(shown) == render.MOST


def test_progress_goes_on_while_features_are_pretrained(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """It stood still for 10,000 updates."""
    told: list[str] = []
    monkeypatch.setattr(train.Reporter, "start", lambda reporter, what: told.append(what))
    words = ["method={name: larger_rl, pretrain: 3, warmup: 60, units: 8, layers: 1}", "steps=70", *SMALL]
    assert cli.main(["train", *words]) == 0
    assert "3 updates of the features before the first of the policy" in capsys.readouterr().err
    name, *first = told
    assert first == [f"{name}, features 1/3", f"{name}, features 2/3", name]
