"""What the benchmarks' commands have in common: how they end, and pieces of their pages in ``results/``.

What a person wrote about a page's figures stands between ``<!-- notes -->`` and ``<!-- /notes -->`` below its title,
and stays when the page is measured anew.
"""

from __future__ import annotations

import datetime
import platform
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from decoupled import records
from decoupled.benchmarks.peers.host import HostError
from decoupled.benchmarks.peers.setting import Setting

NOTES = re.compile("<!-- notes -->.*?<!-- /notes -->", re.DOTALL)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(started: datetime.datetime) -> dict[str, Any]:
    """What the figures depend on and may be published."""
    facts = records.environment()
    return {
        **{name: facts[name] for name in ("cores", "cpu", "torch", "python")},
        "system": f"{platform.system()} {platform.machine()}",
        "date": started.strftime("%Y-%m-%d %H:%M UTC"),
    }


def where(facts: Mapping[str, Any]) -> str:
    """When and on what it was measured; `facts` as from `machine`."""
    return (
        f"{facts['date']}, {facts['cores']} cores ({facts['cpu']}), torch {facts['torch']}, Python {facts['python']}, "
        f"{facts['system']}"
    )


def environment(facts: Mapping[str, Any], command: str, seconds: float) -> str:
    """The beginning of every page."""
    return f"{where(facts)}; `python -m decoupled.benchmarks.{command}`, {seconds / 60:.1f} minutes."


def task(setting: Setting) -> str:
    """What everybody trains."""
    return (
        f"{setting.model}, inputs {'x'.join(map(str, setting.image))}, batch {setting.batch_size}, SGD with momentum, "
        f"cross entropy, synthetic data; two blocks, cut before unit {setting.cut}; one process per block (or replica) "
        "with one intra-op thread."
    )


def verdict(reached: bool | None) -> str:
    """A cell: yes, a no that is seen, or nothing where nothing is asked."""
    return {None: "", True: "yes", False: "**no**"}[reached]


def exit_on_termination() -> None:
    """Let SIGTERM unwind the stack, so that what was made is removed."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def produce(make: Callable[[Callable[[str], None]], Mapping[str, str]], out: Path) -> int:
    """Run a benchmark and write its files; returns the exit code.

    Args:
        make: (say) -> file name -> text; the page is the one that ends in ``.md``.
        out: the folder.
    """
    exit_on_termination()
    start = time.monotonic()
    try:
        files = make(lambda line: print(f"[{time.monotonic() - start:4.0f} s] {line}", flush=True))
    except HostError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing written", file=sys.stderr)
        return 130
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write(out / name, text)
    print("\n" + "\n".join(text for name, text in files.items() if name.endswith(".md")))
    return 0


def write(path: Path, text: str) -> None:
    """Write a page or picture; the notes of the page that was there stay, below the new title."""
    if path.suffix == ".md" and path.is_file() and (notes := NOTES.search(path.read_text(encoding="utf-8"))):
        title, _, rest = text.partition("\n\n")
        text = f"{title}\n\n{notes[0]}\n\n{rest}"
        print(f"{path}: the notes stay; see whether they still hold", file=sys.stderr)
    path.write_text(text, encoding="utf-8")
