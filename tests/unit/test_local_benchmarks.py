"""The local-parallelism benchmarks: their pure parts, and that they run; nothing here depends on speed or luck."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled import cli, data
from decoupled.benchmarks import analyses, pareto, scaling
from decoupled.benchmarks.peers import local
from decoupled.benchmarks.peers.setting import Setting
from decoupled.benchmarks.plot import Axes

TINY = Setting(model="resnet14", image=(1, 8, 8), batch_size=4, cut=2)


def test_the_loop_gives_the_gradients_of_its_losses() -> None:
    """Reach 2 on three blocks: block 1 follows its own loss and the one above it, block 0 only that of block 1."""
    torch.manual_seed(0)
    setting = Setting(model="mlp", image=(1, 8, 8), batch_size=8)
    units = setting.units()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Setting, "units", lambda self: units)
        head = nn.Linear(256, 10)
        patch.setattr("decoupled.benchmarks.peers.local.heads.build", lambda *_: head)
        run = local.build(setting, 0, [1, 2], 2)["run"]
        fresh = nn.Sequential(*setting.units())
        x, y = next(setting.batches(1))
        y0 = fresh[0](x)
        y1 = fresh[1](y0)
        low = F.cross_entropy(head(y1), y)
        z1 = fresh[1](y0.detach())
        top = F.cross_entropy(fresh[2:](z1), y)
        expected_0 = torch.autograd.grad(low, list(fresh[0].parameters()))
        own = torch.autograd.grad(F.cross_entropy(head(z1), y), list(fresh[1].parameters()), retain_graph=True)
        above = torch.autograd.grad(top, list(fresh[1].parameters()))
        run(1)
    for p, g in zip(units[0].parameters(), expected_0, strict=True):
        torch.testing.assert_close(p.grad, g)
    for p, a, b in zip(units[1].parameters(), own, above, strict=True):
        torch.testing.assert_close(p.grad, a + b)


def test_cosines_are_one_for_backprop_and_for_the_last_layer() -> None:
    digits = data.load("digits", limit=64)
    for cosines in (c for _, c in analyses.cosines(digits, "backprop", 4, 2, 0)):
        assert cosines == pytest.approx([1.0] * 5, abs=1e-3)
    for _, cosines in analyses.cosines(digits, "greedy_local", 4, 2, 0):
        assert cosines[4] == pytest.approx(1.0, abs=1e-3)
        assert cosines[0] < 0.999


def test_low_frequencies() -> None:
    wave = torch.cos(2 * torch.pi * torch.arange(7) / 7)
    assert analyses.low_frequency(wave.expand(3, 1, 7, 7)) == pytest.approx(1, abs=1e-5)
    fast = torch.cos(2 * torch.pi * 3 * torch.arange(7) / 7)
    assert analyses.low_frequency(fast.expand(3, 1, 7, 7)) == pytest.approx(0, abs=1e-5)
    noise = torch.randn(5000, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    assert analyses.low_frequency(noise) == pytest.approx(8 / 48, abs=0.01)


def test_png_holds_the_pixels() -> None:
    picture = analyses._png(torch.tensor([[0, 255, 7], [1, 2, 3]], dtype=torch.uint8))
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", picture[16:24]) == (3, 2)
    start = picture.index(b"IDAT") + 4
    assert zlib.decompressobj().decompress(picture[start:]) == bytes([0, 0, 255, 7, 0, 1, 2, 3])


def test_linear_axes() -> None:
    axes = Axes("x", "y", (0, 10), (0, 1), log=False)
    (a, _), (b, _), (c, _) = (axes.place(x, 0) for x in (0, 5, 10))
    assert b - a == pytest.approx(c - b)


def test_the_analyses_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", "digits", "--limit", "120", "--steps", "8", "--epochs", "2", "--out", str(tmp_path)]
    assert analyses.main(words) == 0
    page = (tmp_path / "local_analyses.md").read_text()
    for name in ("gradients", "labels", "filters"):
        assert f"(local_{name}.svg)" in page
        assert (tmp_path / f"local_{name}.svg").read_text().startswith("<svg")
    assert "analyses --data digits --limit 120" in page
    assert "Random labels" in capsys.readouterr().out


def test_tracked_memory_is_one_graph() -> None:
    """The cards' formula: a block of greedy or overlapping training holds one graph of itself, within 10 %."""
    cuts = [2, 4, 6]
    graphs = scaling.one_graph(TINY, cuts)
    for method in ("greedy_local", "overlapping_local"):
        held = scaling.memory(TINY, cuts, method)["held"]
        for k in range(len(graphs)):
            assert held[k] == pytest.approx(graphs[k], rel=0.1), (method, k)


def test_scaling_pages_have_every_figure() -> None:
    times = {"forward": 1.0, "backward": 2.0, "head": 0.1}
    page = "\n".join(scaling._simulated(times, 8))
    assert "| method | 2 blocks | 4 blocks | 8 blocks |" in page
    assert "| backprop | 1.0 (1.0) |" in page


@pytest.mark.slow
def test_scaling_runs(tmp_path: Path) -> None:
    page = scaling.run(scaling.Options(1, 2, 4, tmp_path, TINY), lambda line: None)["local_scaling.md"]
    for text in ("overlapping, 4 blocks, 2 workers", "## Memory and bytes", "## Simulated"):
        assert text in page


def test_a_comparison_is_kept_with_its_claims_and_pictures(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["suite=local_pareto_mlp", "data={name: digits, limit: 100}", "epochs=1", "model.width=8", "cutoffs=[9.0]"]
    words += ["sweep.batch_size=[50]", "sweep.lr=[0.001, 0.01]", "methods=[backprop,greedy_local]"]
    assert cli.main(["compare", *words, "--quiet", "--out", str(out)]) == 0
    assert pareto.main([str(out), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "local_pareto_mlp.md").read_text()
    for text in ("batch swept, adam lr swept", "**Quality, best first: ", "| greedy_local | batch_size=50, lr=0.0"):
        assert text in page
    for name in ("model", "measured"):
        assert f"![{name}](local_pareto_mlp_9_{name}.svg)" in page
        picture = (tmp_path / f"local_pareto_mlp_9_{name}.svg").read_text()
        assert ElementTree.fromstring(picture).tag.endswith("svg")
