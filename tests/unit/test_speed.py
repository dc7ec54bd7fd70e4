"""The speed benchmark's pure parts, and that it runs; nothing here depends on how fast anything is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from decoupled.benchmarks import speed
from decoupled.benchmarks.peers import contest, noise, pipelining, plain
from decoupled.benchmarks.peers.contest import Measurement
from decoupled.benchmarks.peers.host import Host, HostError
from decoupled.benchmarks.peers.setting import Setting

TINY = Setting(model="resnet8", image=(1, 8, 8), batch_size=4, cut=2)
BALANCE = {"whole": [1.0, 1.1], "gradient 0": [0.4], "gradient 1": [0.6], "local 0": [0.5], "local 1": [0.5]}


def rounds(*seconds: dict[str, float]) -> list[dict[str, Measurement]]:
    return [{name: Measurement(s, s, 0.0, 0.0) for name, s in one.items()} for one in seconds]


def record(**changes: object) -> dict:
    held = rounds({"plain": 1.0, "pipedream": 0.5}, {"plain": 1.2, "pipedream": 0.5}, {"plain": 1.0, "pipedream": 0.4})
    return {
        "machine": {"cores": 2, "cpu": "a processor", "torch": "2", "python": "3", "system": "Linux", "date": "today"},
        "setting": {"model": "resnet20", "image": [1, 28, 28], "batch_size": 64, "cut": 4},
        "options": {"rounds": 3, "batches": 8, "patience": 0.0},
        "balance": BALANCE,
        "rounds": [{name: vars(m) for name, m in one.items()} for one in held],
        "figures": speed.figures(held, BALANCE),
        "simulator": "missing",
        "seconds": 60.0,
    } | changes


def test_spread() -> None:
    spread = speed.Spread.of([1.9, 1.7, 1.8])
    assert (spread.median, spread.low, spread.high) == (1.8, 1.7, 1.9)
    assert spread.text() == "1.80 (1.70 .. 1.90)"


def test_ratios_are_taken_within_a_round_and_against_the_fastest_rival() -> None:
    figure = speed.Figure("", "pipedream", "pipelining", 1.3)
    held = rounds(
        {"pipedream": 1.0, "pipelining gpipe 2": 1.5, "pipelining 1f1b 4": 1.4, "pipeliningish": 0.1},
        {"pipedream": 2.0, "pipelining gpipe 2": 2.4, "pipelining 1f1b 4": 3.0, "pipeliningish": 0.1},
    )
    assert figure.ratios(held) == pytest.approx([1.4, 1.2])
    assert speed.Figure("", "greedy_local", "plain").ratios(held) is None


def test_the_plain_loop_is_not_its_variants() -> None:
    held = rounds({"1 block": 1.0, "plain": 1.0, "plain, memory kept": 0.5, "plain, 2 threads": 0.5})
    assert speed.Figure("", "1 block", "plain").ratios(held) == [1.0]


@pytest.mark.parametrize(
    ("must", "strict", "median", "reached"),
    [(None, False, 9.0, None), (1.8, False, 1.8, True), (1.0, True, 1.0, False), (1.0, True, 1.01, True)],
)
def test_reached(must: float | None, strict: bool, median: float, reached: bool | None) -> None:
    assert speed.Figure("", "a", "b", must, strict).reached(median) is reached


def test_figures_name_contestants_that_exist() -> None:
    known = contest.names(contest.groups())
    assert len(set(known)) == len(known)
    for figure in speed.FIGURES:
        assert figure.ours in known
        assert figure.ratios(rounds(dict.fromkeys(known, 1.0))) == [1.0]


def test_limit_is_the_whole_over_the_slowest_block() -> None:
    assert speed.ideal(BALANCE, "gradient") == pytest.approx(1.05 / 0.6)
    assert speed.ideal(BALANCE, "local") == pytest.approx(1.05 / 0.5)


def test_page() -> None:
    page = speed.markdown(record())
    assert "| pipedream, 2 blocks / plain loop | >= 1.80 | 2.40 (2.00 .. 2.50) | 1.75 | yes |" in page
    assert "| simulator | under 60 s, memory bounded | missing |  | **no** |" in page
    assert "greedy_local, 2 blocks" not in page
    simulated = {"blocks": 2, "batches": 3, "seconds": 61.0, "peak_bytes": 2**21, "before_bytes": 2**20}
    assert "61 s, peak 2 MiB (1 before) |  | **no** |" in speed.markdown(record(simulator=simulated))


def test_options() -> None:
    assert speed.parse([]) == speed.Options()
    quick = speed.parse(["--quick", "--rounds", "3"])
    assert (quick.rounds, quick.batches, quick.blocks) == (3, 8, 128)
    assert speed.parse(["--only", "plain; plain, 2 threads"]).only == ("plain", "plain, 2 threads")


@pytest.mark.parametrize("arguments", [["--only", "nobody"], ["--rounds", "0"], ["--batches", "-1"]])
def test_wrong_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        speed.parse(arguments)
    assert "error:" in capsys.readouterr().err


def test_every_contestant_gets_the_same_job() -> None:
    one, two = list(TINY.batches(20)), list(TINY.batches(20))
    assert len(one) == 20
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, two, strict=True))
    lower, upper = TINY.halves()
    assert (len(lower), len(upper)) == (2, 3)
    whole = TINY.units()
    assert torch.equal(next(lower.parameters()), next(whole[0].parameters()))


def test_schedules() -> None:
    assert len(pipelining.names()) == 6
    assert {name.split()[1] for name in pipelining.names()} == {"2", "4", "8"}


def test_noise_is_a_number_or_unknown() -> None:
    busy = noise.busy_seconds()
    assert math.isnan(busy) or busy > 0


def test_a_host_runs_its_contestant_and_reports_failures() -> None:
    host, broken = Host(plain.build, TINY), Host(plain.build, TINY, threads="many")
    try:
        host.ready()
        assert host.run("run", 2).seconds > 0
        with pytest.raises(HostError, match="KeyError"):
            host.run("walk", 1)
        with pytest.raises(HostError, match=r"'start' failed on rank 0:\nTraceback(.|\n)*expects an int"):
            broken.ready()
    finally:
        host.close()
        broken.close()
    host.close()


def test_a_host_does_not_wait_for_ever() -> None:
    host = Host(plain.build, TINY, limit=0.0)
    with pytest.raises(HostError, match="gave no answer in 0 s"):
        host.ready()
    processes = list(host._processes)
    host.close()
    assert not any(process.is_alive() for process in processes)


@pytest.mark.slow
@pytest.mark.timeout(300)  # some twenty processes come up, one after the other
def test_the_whole_benchmark_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = speed.Options(rounds=1, batches=2, blocks=4, out=tmp_path, setting=TINY)
    monkeypatch.setattr(speed, "parse", lambda arguments: small)
    monkeypatch.setattr(pipelining, "MICROBATCHES", (2,))
    assert speed.main([]) == 0
    written = json.loads((tmp_path / "speed.json").read_text())
    assert len(written["figures"]) == len(speed.FIGURES)
    assert str(Path.home()) not in json.dumps(written)
    assert (tmp_path / "speed.md").read_text().startswith("# Speed")
