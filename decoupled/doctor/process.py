"""Starts the doctor's children (`child.py`), and ends them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHILD = Path(__file__).with_name("child.py")


@contextmanager
def child(limit: float, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A child that is gone afterwards, whatever happens; it ends by itself after `limit` seconds."""
    command = [sys.executable, "-P", str(CHILD), str(limit), *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()
