"""Files are written whole or not at all; only what the system refuses is told as such."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from decoupled import checkpoint
from decoupled.errors import UserError
from decoupled.files import write_whole


def test_an_error_that_was_there_before_is_not_blamed(tmp_path: Path) -> None:
    try:
        (tmp_path / "nothing").read_text()
    except OSError:
        with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
            checkpoint.save({"f": lambda: 1}, tmp_path / "state.pt")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_replaced_stays(tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "more").write_text("old")
    with pytest.raises(UserError, match=r"cannot write .*page \(Is a directory\)"):
        write_whole(tmp_path / "page", "new")
    assert os.listdir(tmp_path) == ["page"] and (tmp_path / "page" / "more").read_text() == "old"


def test_text_and_bytes_are_written_whole(tmp_path: Path) -> None:
    for content in ("ä\n", b"\x00\x01"):
        write_whole(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert os.listdir(tmp_path) == ["file"]
