"""The benchmark of policies: its page keeps what earlier runs found, and every part runs at a small size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from decoupled.benchmarks import rl


def test_a_section_replaces_itself_only(tmp_path: Path) -> None:
    page = tmp_path / "rl.md"
    rl.write(page, "auxiliary", "old")
    rl.write(page, "pendulum", "one")
    rl.write(page, "auxiliary", "new\n\n| a |")
    text = page.read_text()
    assert text.index("## pendulum\n\none") < text.index("## auxiliary\n\nnew\n\n| a |")
    assert text.startswith(f"{rl.TITLE}\n") and "old" not in text


@pytest.mark.slow
def test_parts_keep_a_page_at_a_small_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl, "PAPER", {"small": ("larger_rl", {"units": 8})})
    assert rl.main(["paper", "--out", str(tmp_path)]) == 0
    assert rl.main(["auxiliary", "--seeds", "1", "--steps", "300", "--updates", "20", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "rl.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| MuJoCo's, ", "| Bullet's, ", "| small |"))]
    assert len(rows) == 7
    assert "`python -m decoupled.benchmarks.rl auxiliary --seeds 1 --steps 300 --updates 20`" in text


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rl.parse(["pendulumm"])
    assert "unknown part 'pendulumm'" in capsys.readouterr().err


def test_of_a_suite_what_has_ended_is_shown() -> None:
    record = {
        "measures": {"Return at the end": -5.0, "Best return": -3.0}, "wall_seconds": 7.0,
        "curve": [{"validation_score": -9.0}, {"validation_score": -4.0}],
    }  # fmt: skip
    text = rl._suite("rl_small", {"Hopper-v5": {"x": [record, record]}}, 3)
    assert "\n\nHopper-v5:\n\n| method |" in text
    assert "| x | 2 | -5 (-5 .. -5) | -3 | nan | nan | nan | 7 | -9 -4 |" in text


def test_units_of_bullet_scale_each_observation_by_what_it_is() -> None:
    pytest.importorskip("mujoco")
    scaled, plain = rl.bullet_units(), gymnasium.make("HalfCheetah-v5")
    model: Any = plain.unwrapped
    names = ["z", "angle", *(f"joint {i}" for i in range(6)), "vx", "vz", "turning", *(f"speed {i}" for i in range(6))]
    expected = {"z": 1.0, "angle": 1.0, "vx": 0.3, "vz": 0.3} | dict.fromkeys(["turning", *names[11:]], 0.1)
    ranges = {f"joint {i}": model.model.jnt_range[3 + i] for i in range(6)}
    plain.action_space.seed(0)
    for env in (scaled, plain):
        env.reset(seed=0)
    for _ in range(50):
        action = plain.action_space.sample()
        one, other = scaled.step(action)[0], plain.step(action)[0]
        for name, now, before in zip(names, one, other, strict=True):
            low, high = ranges.get(name, (-1, 1))
            whole = (2 * before - low - high) / (high - low) if name in ranges else expected[name] * before
            assert now == pytest.approx(np.clip(whole, -5, 5)), name
    assert scaled.observation_space.shape == (17,)
    for env in (scaled, plain):
        env.close()
