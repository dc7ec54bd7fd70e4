"""Events: what the actors of a run did and waited for, and which messages crossed; in memory and as a file.

    EventLog --events--> Events --save--> DIR/events.jsonl.gz --read--> Events --timeline--> trace

The file is JSON, one line per event. The first line is the header: format, name of the run, ranks of the actors, edges,
what was cut, and the number of events. Every other line is the kind of an event and the fields of its class below.
Times are seconds after the first event, on one clock for all ranks.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from decoupled.errors import ProtocolError, UserError, first_line
from decoupled.files import write_whole
from decoupled.runtime.contract import Edge

FORMAT = 1
FILE = "events.jsonl.gz"


class Operation(NamedTuple):
    """`actor` carried out `name` (`"F3"`)."""

    actor: str
    name: str
    start: float
    end: float


class Transfer(NamedTuple):
    """A message of class `kind` was sent over the edge with number `edge` and waits at its port from `arrived` on.

    `version` is the number of updates of the sender's weights it was made with, None where it carries none.
    """

    edge: int
    kind: str
    key: int | str
    version: int | None
    bytes: int
    sent: float
    arrived: float


class Take(NamedTuple):
    """`actor` took a message from `port`."""

    actor: str
    port: str
    kind: str
    key: int | str
    time: float


class Wait(NamedTuple):
    """`actor` waited for `what`: "messages" or "room"."""

    actor: str
    what: str
    start: float
    end: float


class Versions(NamedTuple):
    """Pass `key` of `actor` ran forward with weight version `forward` and met version `backward` in its backward."""

    actor: str
    key: int
    forward: int
    backward: int


class Extent(NamedTuple):
    """One run of the runtime (an epoch)."""

    start: float
    end: float


Event = Operation | Transfer | Take | Wait | Versions | Extent
E = TypeVar("E", bound=Event)

_KINDS: dict[str, type[Event]] = {
    kind.__name__.lower(): kind for kind in (Operation, Transfer, Take, Wait, Versions, Extent)
}
TIMES = {"start", "end", "sent", "arrived", "time"}
_FIELDS = dict.fromkeys(TIMES, (int, float)) | {
    **dict.fromkeys(("actor", "name", "kind", "port", "what"), (str,)),
    "key": (int, str),
    "version": (int, type(None)),
    **dict.fromkeys(("edge", "bytes", "forward", "backward"), (int,)),
}


def times(event: Event) -> list[float]:
    """The times of an event, the earliest first."""
    return [getattr(event, name) for name in event._fields if name in TIMES]


@dataclass(frozen=True)
class Events:
    """What happened.

    Attributes:
        name: of the run.
        edges: what `Transfer.edge` counts.
        rows: all events; those with times in the order of their start.
        ranks: actor -> rank of its process, where known.
        limit: the most events that were kept of one actor and kind.
        until: everything that began before this time is there; None: everything is.
    """

    name: str
    edges: list[Edge]
    rows: list[Event]
    ranks: dict[str, int] = field(default_factory=dict)
    limit: int = 0
    until: float | None = None

    def of(self, kind: type[E]) -> list[E]:
        """The events of one kind that began while everything was recorded."""
        until = math.inf if self.until is None else self.until
        return [row for row in self.rows if isinstance(row, kind) and next(iter(times(row)), -math.inf) < until]

    def save(self, directory: Path) -> Path:
        """Write `DIR/events.jsonl.gz`; returns its path."""
        header = {
            "format": FORMAT, "clock": "seconds after the first event", "name": self.name, "ranks": self.ranks,
            "edges": [[e.source, e.out, e.target, e.port, e.capacity] for e in self.edges],
            "limit": self.limit, "until": self.until, "events": len(self.rows),
        }  # fmt: skip
        path = directory / FILE
        directory.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(header)]
        lines += [json.dumps([type(row).__name__.lower(), *row], separators=(",", ":")) for row in self.rows]
        write_whole(path, gzip.compress("".join(f"{line}\n" for line in lines).encode()))
        return path


def read(directory: Path) -> Events:
    """Read `DIR/events.jsonl.gz` (or the same without gzip, `DIR/events.jsonl`).

    Raises:
        UserError: there is none, or it is damaged; names the line.
    """
    path = next((path for path in (directory / FILE, directory / FILE.removesuffix(".gz")) if path.is_file()), None)
    if path is None:
        raise UserError(f"{directory} holds no {FILE}; give a directory that `decoupled train --out` wrote")
    rows: list[Event] = []
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            header = json.loads(file.readline())
            if header["format"] != FORMAT:
                raise UserError(f"{path} has format {header['format']}, this version reads {FORMAT}; train again")
            for line in file:
                rows.append(_row(json.loads(line)))
        edges = [Edge(*edge) for edge in header["edges"]]
        if len(rows) != header["events"]:
            raise ValueError(f"{len(rows)} events instead of {header['events']}")
        if any(not 0 <= row.edge < len(edges) for row in rows if isinstance(row, Transfer)):
            raise ValueError("a message on an edge that is not listed")
        ranks = {str(actor): int(rank) for actor, rank in header["ranks"].items()}
        until = None if header["until"] is None else float(header["until"])
        return Events(str(header["name"]), edges, rows, ranks, int(header["limit"]), until)
    except UserError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError, ProtocolError) as error:
        where = f"near line {len(rows) + 2}" if rows else "at its beginning"
        raise UserError(f"{path} is damaged {where} ({first_line(error)}); train again to write a new one") from error


def _row(line: Any) -> Event:
    name, *values = line
    kind = _KINDS[name]
    if len(values) != len(kind._fields):
        raise ValueError(f"{name} has {len(kind._fields)} fields, not {len(values)}")
    for label, value in zip(kind._fields, values, strict=True):
        allowed = _FIELDS[label]
        if (
            not isinstance(value, allowed)
            or isinstance(value, bool)
            or value != value
            or value in (math.inf, -math.inf)
        ):
            raise ValueError(f"{name} cannot have {label} {value!r}")
    event = cast(Event, kind(*values))
    if isinstance(event, Operation | Wait | Extent) and event.end < event.start:
        raise ValueError(f"{name} ends before it starts")
    return event
