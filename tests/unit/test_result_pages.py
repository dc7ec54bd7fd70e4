"""Pages of results: what a person wrote about the figures stays when they are measured anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from decoupled.benchmarks import rl
from decoupled.benchmarks.page import NOTES, write
from decoupled.benchmarks.publish import ROOT

NOTE = "<!-- notes -->\nReached.\n\n- but barely\n<!-- /notes -->"


def test_notes_stay_below_the_new_title(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "a.md"
    page.write_text(f"# Old\n\nold text\n\n{NOTE}\n\nold table\n")
    write(page, "# New\n\nnew text\n")
    assert page.read_text() == f"# New\n\n{NOTE}\n\nnew text\n"
    assert "the notes stay" in capsys.readouterr().err
    write(page, "# Newer\n\nnewest text\n")
    assert page.read_text() == f"# Newer\n\n{NOTE}\n\nnewest text\n"


def test_a_page_without_notes_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "a.md"
    for text in ("# One\n\nolder\n", "# Two\n\nnewer\n"):
        write(page, text)
        assert page.read_text() == text
    assert not capsys.readouterr().err


def test_a_page_of_sections_keeps_its_notes(tmp_path: Path) -> None:
    page = tmp_path / "rl.md"
    rl.write(page, "pendulum", "one")
    page.write_text(page.read_text().replace(rl.TITLE, f"{rl.TITLE}\n\n{NOTE}"))
    rl.write(page, "paper", "two")
    assert page.read_text() == f"{rl.TITLE}\n\n{NOTE}\n\n## pendulum\n\none\n\n## paper\n\ntwo\n"


@pytest.mark.parametrize("page", sorted((ROOT / "benchmarks" / "results").glob("*.md")), ids=lambda page: page.stem)
def test_marks_of_notes_come_in_pairs_below_a_title(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- notes -->") == text.count("<!-- /notes -->") == len(NOTES.findall(text)) <= 1
    assert text.startswith("# ")
