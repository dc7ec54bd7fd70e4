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
