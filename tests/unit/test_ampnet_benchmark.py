"""The AMPNet benchmark: its page keeps the sections of other parts, and its contestants train what they say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from decoupled.benchmarks import ampnet
from decoupled.benchmarks.peers.dynamic import Minibatch, OneByOne, epochs_to
from decoupled.benchmarks.publish import carry_pages
from decoupled.tasks.gated_graph import Babi15
from decoupled.tasks.tree import ListOps

SMALL = {"train": 6, "validation": 4, "test": 2}


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)  # type: ignore[arg-type]


def test_a_part_replaces_its_section_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ampnet, "PARTS", {"a": lambda options, say: "new a", "b": lambda options, say: "never run"})
    (tmp_path / ampnet.PAGE).write_text(f"{ampnet.TITLE}\n\n## b\n\nold b\n\n| x |\n\n## a\n\nold a\n")
    page = ampnet.run(ampnet.parse(["a", "--out", str(tmp_path), "--rounds", "2"]), ["a", "--rounds", "2"], print)
    text = page[ampnet.PAGE]
    assert ampnet.read(text)["b"].strip() == "old b\n\n| x |"
    assert "new a" in text and "old a" not in text and text.index("## a") < text.index("## b")
    assert "`python -m decoupled.benchmarks.ampnet a --rounds 2`" in text


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ampnet.parse(["tree"])
    assert "unknown part 'tree'; choose from throughput, trees" in capsys.readouterr().err


def test_the_loop_over_nodes_takes_the_steps_of_the_minibatch() -> None:
    """Same seed, same order, same trees per step: only what is batched differs."""
    task = ListOps(hidden=4, data=SMALL)
    one, many = OneByOne(task, sgd, 4), Minibatch(task, sgd, 4)
    for _ in range(2):
        assert one.fit().loss == pytest.approx(many.fit().loss, abs=1e-5)
    for ours, theirs in zip(one.model.parameters(), many.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert not torch.equal(next(one.model.parameters()), next(task.synchronous().parameters()))


def test_epochs_are_counted_until_the_target_is_reached() -> None:
    task = Babi15(data={"train": 50, "validation": 20, "test": 2})
    said: list[str] = []
    found = epochs_to(Minibatch(task, lambda p: torch.optim.Adam(p, 0.03), 2), 0.9, 30, said.append)
    assert found.epochs == len(found.scores) == len(said) and found.scores[-1] >= 0.9
    assert all(score < 0.9 for score in found.scores[:-1])
    never = epochs_to(Minibatch(task, sgd, 2), math.inf, 2, said.append)
    assert never.epochs is None and never.text().startswith("> 2 (best ")


def test_a_page_of_figures_becomes_a_part_of_its_card(tmp_path: Path) -> None:
    card, page = tmp_path / "methods" / "a" / "b.md", tmp_path / "benchmarks" / "results" / "b_figures.md"
    for path, text in {
        card: "# b\n\n## Results\n\n<!-- figures -->\n\n## Last\n",
        page: "# Figures of b\n\n## speed\n\n| x |\n\n## size\n\n2\n",
    }.items():
        path.parent.mkdir(parents=True)
        path.write_text(text)
    for _ in range(2):  # the second time in place of the first
        carry_pages(tmp_path)
        assert card.read_text() == (
            "# b\n\n## Results\n\n<!-- figures -->\n### speed\n\n| x |\n\n### size\n\n2\n<!-- /figures -->\n\n## Last\n"
        )
