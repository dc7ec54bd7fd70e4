"""`decoupled doctor`: is this machine fit for training, in one process, in several, on several hosts?

    checks (threads side by side, each with its own time limit) -> findings -> a table, or JSON

A check yields findings and may fail or hang: either becomes a finding of its own. What could crash or block the process
(Gloo, shared mappings) happens in children, see `decoupled.doctor.child`.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from decoupled import __version__
from decoupled.doctor import host, launch, network, sharing
from decoupled.doctor.finding import Finding, Status, problem
from decoupled.errors import first_line

_COLOURS: dict[Status, str] = {"ok": "green", "warning": "yellow", "problem": "bold red"}


class Check(NamedTuple):
    """Something to look at; `every_rank`: also worth a look in the other processes that torchrun starts on a host."""

    name: str
    look: Callable[[], Iterable[Finding]]
    limit: float = 5.0  # seconds
    every_rank: bool = False


CHECKS = (
    Check("versions", host.versions),
    Check("devices", host.devices, every_rank=True),
    Check("threads", host.threads),
    Check("backends", host.backends),
    Check("interfaces", network.interfaces),
    Check("host name", network.host_name),
    Check("gloo", network.gloo, limit=network.START + network.LIMIT + 1.0),
    Check("shared memory", sharing.memory),
    Check("mapping", sharing.mapping),
    Check("limits", sharing.limits),
    Check("clock", sharing.clock),
    Check("torchrun", launch.torchrun, every_rank=True),
    Check("disk", host.disk),
)


def examine(checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """Carry out all checks side by side; returns their findings in the order of the checks, after at most the longest
    limit."""
    began = time.monotonic()
    looks = [_Look(check) for check in checks]
    for look in looks:
        look.start()
    for look in looks:
        look.join(max(0.0, began + look.check.limit - time.monotonic()))
    return [finding for look in looks for finding in look.findings()]


def show(as_json: bool = False) -> list[Finding]:
    """Examine this machine and print what was found: `decoupled doctor`.

    Of the processes that torchrun starts on a host, the first prints all, the others their warnings and problems.

    Returns:
        The problems among the findings.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    found = examine([check for check in CHECKS if first or check.every_rank])
    counts = {status: sum(f.status == status for f in found) for status in _COLOURS}
    if as_json and first:
        worst = next((status for status in ("problem", "warning") if counts[status]), "ok")
        print(json.dumps({"version": __version__, "status": worst, "findings": [asdict(f) for f in found]}))
    elif not as_json:
        shown = found if first else [f for f in found if f.status != "ok"]
        if shown:
            Console().print(_table(shown))
        if first:
            print(", ".join(f"{n} {status}{'s' * (n != 1 and status != 'ok')}" for status, n in counts.items()))
    return [finding for finding in found if finding.status == "problem"]


def _table(findings: Sequence[Finding]) -> Table:
    table = Table("check", "", "what was found, and what to do", show_lines=False)
    for finding in findings:
        text = Text(finding.says)
        if finding.remedy:
            text.append(f"\n-> {finding.remedy}", style=_COLOURS[finding.status])
        table.add_row(finding.check, Text(finding.status, style=_COLOURS[finding.status]), text)
    return table


class _Look(threading.Thread):
    """A check under way. A daemon: one that hangs keeps nobody."""

    def __init__(self, check: Check) -> None:
        super().__init__(name=f"doctor {check.name}", daemon=True)
        self.check = check
        self._found: list[Finding] = []
        self._ended = threading.Event()

    def run(self) -> None:
        try:
            for finding in self.check.look():
                self._found.append(finding)
        except Exception as error:
            says = f"could not be looked at ({type(error).__name__}: {first_line(error)})"
            self._found.append(problem(self.check.name, says, "this should not happen: please report it"))
        self._ended.set()

    def findings(self) -> list[Finding]:
        if self._ended.is_set():
            return self._found
        says = f"no answer within {self.check.limit:g} s"
        return [*self._found, problem(self.check.name, says, "the system hangs there: look at its log (dmesg)")]
