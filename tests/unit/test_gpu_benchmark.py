"""The benchmark of one GPU, as far as a machine without one can tell."""

from pathlib import Path

import pytest
import torch

from decoupled.benchmarks import gpu


def test_without_a_gpu_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2
    assert "--device cpu --small" in capsys.readouterr().err


def test_cost_and_streams_are_measured_round_by_round(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--small", "--rounds", "2", "--batches", "2", "--parts", "cost", "streams"]
    assert gpu.main([*words, "--out", str(tmp_path)]) == 0
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "no GPU: a trial on the CPU" in page
    for name in ("ResNet, float32", "Transformer, bf16"):
        assert f"| {name} |" in page
        assert f"| {name}, 4 blocks |" in page
    assert "Peak memory" not in page
    assert "gpu --rounds 2 --batches 2 --small --parts cost streams`" in page


def test_contestants_train_the_same_network_on_the_same_batches() -> None:
    """The plain loop's loss over a run is the library's: the ratio compares equal work."""
    task, cpu = gpu.SMALL["ResNet"], torch.device("cpu")
    batches = task.batches(6)
    assert len({id(x) for x, _ in batches}) == 4
    total = gpu.plain(task, "float32", cpu, reads=True)(batches)
    assert total == pytest.approx(gpu.plain(task, "float32", cpu, reads=False)(batches), rel=1e-6)
    for blocks in (1, [2]):
        with gpu.trained(task, "backprop", blocks, "float32", cpu, "threads") as trainer:
            assert trainer.fit(batches)[-1]["loss"] * len(batches) == pytest.approx(total, rel=1e-5)


def test_memory_is_told_against_backprop_and_against_one_block() -> None:
    found = {("threads", 1): {"backprop": 100.0}, ("simulated", 8): {"backprop": 120.0, "greedy_local": 60.0}}
    *_, table = gpu.memory_section(found, gpu.Options())
    assert table.splitlines()[-1] == "| simulated, 8 blocks | 120 | 60 | 0.50 | 0.60 |"
    assert [gpu.even(11, k) for k in (2, 4)] == [[6], [3, 6, 8]]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_edges_are_measured_by_two_processes(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--small", "--rounds", "1", "--parts", "edges", "--out", str(tmp_path)]
    assert gpu.main(words) == 0
    assert "| 64 MiB |" in (tmp_path / "gpu.md").read_text(encoding="utf-8")
