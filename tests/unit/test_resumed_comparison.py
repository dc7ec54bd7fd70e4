"""A comparison that was interrupted goes on: what ended well is kept as it is, the rest is run, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from decoupled import cli, resumed, sweep
from decoupled import compare as comparison
from decoupled.compare import compare
from decoupled.config import CompareConfig, read
from decoupled.errors import UserError
from decoupled.experiment import Setting

WORDS = [
    "data={name: digits, limit: 64}", "model={name: mlp, width: 8, depth: 3}", "blocks=2", "methods=[backprop,ddg]",
    "controls=true", "seeds=2", "epochs=1", "runtime=simulated", "sweep={lr: [0.1, 0.2]}",
]  # fmt: skip


def config(*more: str) -> CompareConfig:
    return read(CompareConfig, [*WORDS, *more])


def run_of(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["seed"], record["label"], json.dumps(record["point"])


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was trained, in order; the sixth run is interrupted."""
    seen: list[tuple[Any, ...]] = []
    for name in ("run_method", "run_control"):
        usual = getattr(Setting, name)

        def watched(self: Setting, spec: Any, seed: int, advance: Any, usual: Any = usual) -> Any:
            if len(seen) == 5:
                raise KeyboardInterrupt
            seen.append((seed, spec, self.task.recipe.lr))
            return usual(self, spec, seed, advance)

        monkeypatch.setattr(Setting, name, watched)
    return seen


def test_an_interrupted_comparison_runs_only_what_is_missing(tmp_path: Path, ran: list[tuple[Any, ...]]) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        compare(config(), out, "c", quiet=True)
    first = json.loads((out / "results.json").read_text())["records"]
    assert len(first) == 5
    before = list(ran)
    ran[:] = [("not", "the", "sixth")] * 6  # so that nothing is interrupted any more
    results = compare(config(), out, "c", quiet=True, resume=True)
    again = ran[6:]
    assert len(again) == 11 and not set(again) & set(before)
    assert set(again) | set(before) == {
        (seed, spec, lr)
        for seed in range(2) for lr in (0.1, 0.2) for spec in ("backprop", "ddg", "plain_pytorch", "only_last")
    }  # fmt: skip
    after = {run_of(record): record for record in json.loads((out / "results.json").read_text())["records"]}
    assert len(after) == 16 == len(results["records"])
    assert all(after[run_of(record)] == record for record in first)
    traced = {event["args"]["name"] for event in _events(out) if event["name"] == "process_name"}
    assert traced == {"backprop", "ddg"}


def _events(out: Path) -> list[dict[str, Any]]:
    found = json.loads((out / "trace.json").read_text())
    return found["traceEvents"] if isinstance(found, dict) else found


def with_a_failure(out: Path, words: list[str]) -> None:
    """A comparison whose second run failed."""
    compare(config(*words), out, "c", quiet=True)
    results = json.loads((out / "results.json").read_text())
    results["records"][1] |= {"status": "failed", "error": "power cut"}
    (out / "results.json").write_text(json.dumps(results))


def test_what_failed_is_tried_again_and_seeds_may_be_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, one = tmp_path / "run", ["controls=false", "sweep=null", "seeds=1"]
    with_a_failure(out, one)
    calls: list[tuple[str, int]] = []
    usual = comparison._one
    monkeypatch.setattr(comparison, "_one", lambda *a: calls.append((str(a[2]), a[3])) or usual(*a))
    results = compare(config(*one, "seeds=2"), out, "c", quiet=True, resume=True)
    assert calls == [("ddg", 0), ("backprop", 1), ("ddg", 1)]
    assert [(r["label"], r["seed"], r["status"]) for r in results["records"]] == [
        ("backprop", 0, "ok"), ("ddg", 0, "ok"), ("backprop", 1, "ok"), ("ddg", 1, "ok"),
    ]  # fmt: skip


def test_the_network_stays_cut_where_it_was_at_every_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, one = tmp_path / "run", ["controls=false", "seeds=1"]
    compare(config(*one, "sweep={lr: [0.1]}"), out, "c", quiet=True)
    cut = json.loads((out / "results.json").read_text())["cuts"]
    elsewhere = [1 if cut != [1] else 2]
    prepare = Setting.prepare

    def moved(task: Any) -> Setting:
        setting = prepare(task)
        setting.cuts = elsewhere
        return setting

    monkeypatch.setattr(Setting, "prepare", moved)
    assert [setting.cuts for _, setting in sweep.settings(config(*one))] == [elsewhere] * 2
    results = compare(config(*one), out, "c", quiet=True, resume=True)
    assert len(results["records"]) == 4 and {tuple(record["cuts"]) for record in results["records"]} == {tuple(cut)}


def test_a_run_that_failed_stays_until_it_has_been_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, one = tmp_path / "run", ["controls=false", "sweep=null", "seeds=1"]
    with_a_failure(out, one)

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(config(*one), out, "c", quiet=True, resume=True)
    assert [r["error"] for r in json.loads((out / "results.json").read_text())["records"]] == [None, "power cut"]


def test_a_finished_comparison_keeps_its_trace(tmp_path: Path) -> None:
    out, one = tmp_path / "run", ["controls=false", "sweep=null", "seeds=1"]
    compare(config(*one), out, "c", quiet=True)
    before = (out / "trace.json").read_bytes()
    compare(config(*one), out, "c", quiet=True, resume=True)
    assert (out / "trace.json").read_bytes() == before


def test_other_data_are_refused(tmp_path: Path) -> None:
    text, out = tmp_path / "a.txt", tmp_path / "run"
    words = [
        f"data={{name: text, path: {text}, length: 8}}", "model={name: transformer, width: 8, depth: 1}", "blocks=1",
        "methods=[backprop]", "controls=false", "seeds=1", "epochs=1", "runtime=simulated",
    ]  # fmt: skip
    text.write_text("abcdefgh" * 200)
    compare(read(CompareConfig, words), out, "c", quiet=True)
    text.write_text("hgfedcba" * 200)
    with pytest.raises(UserError, match="was made with other data"):
        compare(read(CompareConfig, [*words, "seeds=2"]), out, "c", quiet=True, resume=True)


def test_only_one_writes_to_a_directory(tmp_path: Path) -> None:
    out, one = tmp_path / "run", ["controls=false", "sweep=null", "seeds=1", "methods=[backprop]"]
    compare(config(*one), out, "c", quiet=True)
    with resumed.alone(out), pytest.raises(UserError, match="another process writes"):
        compare(config(*one), out, "c", quiet=True, resume=True)
    assert len(compare(config(*one), out, "c", quiet=True, resume=True)["records"]) == 1


DAMAGE: dict[str, Any] = {
    "no config": lambda r: r.pop("config"), "config null": lambda r: r.update(config=None),
    "config a list": lambda r: r.update(config=[]), "no data": lambda r: r.pop("dataset"),
    "records null": lambda r: r.update(records=None), "a record null": lambda r: r.update(records=[None]),
    **{f"no {key}": lambda r, key=key: r["records"][0].pop(key) for key in sorted(resumed.NEEDED)},
    "point null": lambda r: r["records"][0].update(point=None),
}  # fmt: skip


def test_damaged_results_are_refused_in_one_line_and_left_alone(tmp_path: Path) -> None:
    out, one = tmp_path / "run", ["controls=false", "sweep=null", "seeds=1", "methods=[backprop]"]
    whole = compare(config(*one), out, "c", quiet=True)
    for what, damage in DAMAGE.items():
        results = json.loads(json.dumps(whole))
        damage(results)
        (out / "results.json").write_text(json.dumps(results))
        with pytest.raises(UserError) as caught:
            compare(config(*one), out, "c", quiet=True, resume=True)
        assert "\n" not in str(caught.value) and str(out) in str(caught.value), what
        assert json.loads((out / "results.json").read_text()) == results, what


def test_what_is_there_must_be_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "run"
    compare(config("controls=false", "seeds=1", "sweep={lr: [0.1]}"), out, "c", quiet=True)
    for fewer in (["methods=[backprop]"], ["sweep={lr: [0.2]}"], ["sweep=null"]):
        with pytest.raises(UserError, match="not asked for, the first is"):
            compare(config("controls=false", "seeds=1", *fewer), out, "c", quiet=True, resume=True)


def test_speed_is_not_compared_across_machines(tmp_path: Path) -> None:
    out, one = tmp_path / "run", ["controls=false", "sweep=null", "seeds=1", "runtime=threads"]
    assert all(r["speedup_over_backprop"] for r in compare(config(*one), out, "c", quiet=True)["records"])
    results = json.loads((out / "results.json").read_text())
    results["records"][0]["environment"]["cpu"] = "another"
    (out / "results.json").write_text(json.dumps(results))
    speed = {r["label"]: r["speedup_over_backprop"] for r in compare(config(*one), out, "c", True, True)["records"]}
    assert speed == {"backprop": 1.0, "ddg": None}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_line_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plain = tmp_path / "run", resumed.save

    def save(*words: Any) -> None:
        (out / "results.json.new").symlink_to("/dev/full")
        plain(*words)

    monkeypatch.setattr(resumed, "save", save)
    one = ["controls=false", "sweep=null", "seeds=1", "methods=[backprop]"]
    assert cli.main(["compare", *WORDS, *one, "--quiet", "--out", str(out)]) == 2
    said = f"cannot write {out}/results.json (No space left on device); make room there, or write elsewhere"
    assert capsys.readouterr().err == f"decoupled: {said}\n"
    assert not list(out.iterdir())


def test_another_comparison_is_refused_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, one = tmp_path / "run", ["controls=false", "sweep=null", "seeds=1", "methods=[backprop]"]
    compare(config(*one), out, "c", quiet=True)
    before = (out / "results.json").read_bytes()
    with pytest.raises(UserError, match=r"was made with model=\{.*\"width\": 8.*choose another --out"):
        compare(config(*one, "model={name: mlp, width: 9, depth: 3}"), out, "c", quiet=True, resume=True)
    with pytest.raises(UserError, match=r"exists already.*--resume"):
        compare(config(*one), out, "c", quiet=True)
    assert (out / "results.json").read_bytes() == before
    with pytest.raises(UserError, match="nothing to resume"):
        compare(config(*one), tmp_path / "none", "c", quiet=True, resume=True)
    assert not (tmp_path / "none").exists()
    (out / "results.json").write_text("[]")
    with pytest.raises(UserError, match="is not a result"):
        compare(config(*one), out, "c", quiet=True, resume=True)
    assert cli.main(["compare", "--resume"]) == 2
    assert "--resume needs the directory" in capsys.readouterr().err
