"""Keeping freed memory is arranged once per process, and not against the user's own settings."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = "from decoupled.runtime import memory; memory.release(); print(memory.keep()); memory.release()"


@pytest.mark.parametrize(("extra", "kept"), [({}, "True"), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, "False")])
def test_memory_is_kept_unless_the_user_says_how(extra: dict[str, str], kept: str, monkeypatch) -> None:
    for name, value in extra.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (kept if platform.libc_ver()[0] == "glibc" else "False")


def test_units_are_timed_with_memory_kept_as_they_are_trained() -> None:
    code = (
        "import torch; from decoupled.runtime import memory; from decoupled import split;"
        "before = memory.keep.cache_info().currsize;"
        "split([torch.nn.Linear(4, 4) for _ in range(2)], 2, torch.ones(3, 4));"
        "print(before, memory.keep.cache_info().currsize)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 1"
