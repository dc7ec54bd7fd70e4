"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter:
    """Counts samples.

    Args:
        total: samples to expect in all.
        quiet: say nothing.
    """

    def __init__(self, total: int, quiet: bool = False) -> None:
        self._total, self._done, self._began = total, 0, time.perf_counter()
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self._bar: Progress | None = None
        if not quiet and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[rate]:,.0f} samples/s"), TimeRemainingColumn(),
            )  # fmt: skip
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("", total=total, rate=0.0)

    def start(self, what: str) -> None:
        """A new piece of work begins."""
        if self._bar is not None:
            self._bar.update(self._task, description=what)

    def advance(self, samples: int) -> None:
        """So many samples were fed."""
        self._done += samples
        if self._bar is not None:
            rate = self._done / max(1e-9, time.perf_counter() - self._began)
            self._bar.update(self._task, completed=self._done, rate=rate)

    def line(self, text: str) -> None:
        """One line of news."""
        self.console.print(text, markup=False, soft_wrap=True)

    def __enter__(self) -> Reporter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
