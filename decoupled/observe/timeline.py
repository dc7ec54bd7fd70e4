"""The timeline of a run from its events: what `decoupled trace DIR` draws and tells.

    process  <name of the run>
      counters  queue block1.up        messages that have arrived at a port and wait there
                staleness block0       updates between forward and backward, at the backward
      track     block0                 F0 | F1 | B0 | S ...  the operations
      track     block0 receive         from the arrival of a message until it is taken
      track     block0 send            from the moment a message is sent until it has arrived: room, then the wire
      track     block0 wait            for messages, for room

Arrows lead from the operation that made a message to the operation that took it (no operation takes an `End`). What
overlaps on a lane (several messages wait in one queue) goes to another lane of the same name with a number.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from decoupled.errors import UserError
from decoupled.messages import End
from decoupled.observe.events import Events, Extent, Operation, Take, Transfer, Versions, Wait, read
from decoupled.observe.trace import (
    Counter,
    Flow,
    Span,
    natural_key,
    operation_batch,
    operation_ends_pass,
    write_trace,
)
from decoupled.runtime.contract import Edge

LARGE = 50_000  # spans, arrows and counter values from which on the trace is compressed


@dataclass(frozen=True)
class Stay:
    """One message from where it was made to where it was used.

    Attributes:
        edge: its way. transfer: how it went.
        arrived, taken: from when until when it waited at its port.
        used: whether it was taken; if not, `taken` is the end of its run.
    """

    edge: Edge
    transfer: Transfer
    arrived: float
    taken: float
    used: bool


@dataclass(frozen=True)
class Row:
    """One actor in the summary: shares of the time, mean messages in its queues, mean updates a gradient came late."""

    actor: str
    busy: float
    messages: float
    room: float
    queued: float
    staleness: float | None


def show(directory: Path) -> None:
    """Write `DIR/trace.json` (compressed if it is large) and print the summary: `decoupled trace DIR`.

    Raises:
        UserError: no events there, a damaged file, or a run without operations.
    """
    events = read(directory)
    if not events.of(Operation):
        raise UserError(f"{directory}: the run ended before its first operation; train again")
    spans, flows, counters = timeline(events)
    large = len(spans) + 2 * len(flows) + len(counters) > LARGE
    path = directory / ("trace.json.gz" if large else "trace.json")
    write_trace(spans, flows, path, counters)
    table = Table("block", "busy", "waits for\nmessages", "waits for\nroom", "messages\nqueued", "updates\nlate")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in summary(events):
        late = "-" if row.staleness is None else f"{row.staleness:.2f}"
        table.add_row(row.actor, f"{row.busy:.1%}", f"{row.messages:.1%}", f"{row.room:.1%}", f"{row.queued:.2f}", late)
    Console().print(table)
    if events.until is not None:
        print(f"cut: the first {events.until:.6g} s are recorded ({events.limit} operations of a block at most)")
    print(f"trace: {path} (open it at ui.perfetto.dev)")


def timeline(events: Events) -> tuple[list[Span], list[Flow], list[Counter]]:
    """Operations, messages and counters as they are drawn."""
    name, track = events.name, _tracks(events)
    operations = [Span(name, track[op.actor], op.name, op.start, op.end) for op in events.of(Operation)]
    lanes: dict[str, list[Span]] = defaultdict(list)
    for wait in events.of(Wait):
        lane = f"{track[wait.actor]} wait"
        lanes[lane].append(Span(name, lane, wait.what, wait.start, wait.end, kind="wait"))
    flows, stays = [], _stays(events)
    acting = {op.actor for op in events.of(Operation)}
    begun = {(op.actor, op.start) for op in events.of(Operation)}
    for stay in stays:
        edge, transfer = stay.edge, stay.transfer
        sending, receiving = f"{track[edge.source]} send", f"{track[edge.target]} receive"
        label, args = f"{edge.port} {transfer.key}", {"message": transfer.kind}
        if transfer.version is not None:
            args |= {"version": transfer.version, "bytes": transfer.bytes}
        to, back = {"to": edge.target}, {"from": edge.source}
        lanes[sending].append(Span(name, sending, label, transfer.sent, transfer.arrived, args | to, "send"))
        lanes[receiving].append(Span(name, receiving, label, stay.arrived, stay.taken, args | back, "receive"))
        if transfer.kind != End.__name__ and (edge.target, stay.taken) in begun:
            source = track[edge.source] if edge.source in acting else sending
            flows.append(Flow(name, source, transfer.sent, track[edge.target], stay.taken, label))
    runs = events.of(Extent)
    if len(runs) > 1:
        operations += [Span(name, "runs", f"run {i}", *extent, kind="run") for i, extent in enumerate(runs, 1)]
    spans = operations + [span for lane in lanes.values() for span in _apart(lane)]
    return spans, flows, [*_queues(name, stays), *_staleness(events)]


def summary(events: Events) -> list[Row]:
    """One row per actor that carried out operations, in natural order."""
    extents = events.of(Extent)
    elapsed = sum(extent.end - extent.start for extent in extents) or 1.0
    spent: dict[tuple[str, str], float] = defaultdict(float)
    last = max((extent.end for extent in extents), default=0.0)
    for op in events.of(Operation):
        spent[op.actor, "busy"] += min(op.end, last) - op.start
    for wait in events.of(Wait):
        spent[wait.actor, wait.what] += min(wait.end, last) - wait.start
    for stay in _stays(events):
        spent[stay.edge.target, "queued"] += max(0.0, min(stay.taken, last) - stay.arrived)
    late: dict[str, list[int]] = defaultdict(list)
    for versions in events.of(Versions):
        late[versions.actor].append(versions.backward - versions.forward)
    actors = sorted({op.actor for op in events.of(Operation)}, key=natural_key)
    tracks = _tracks(events)
    return [
        Row(
            tracks[actor],
            busy=spent[actor, "busy"] / elapsed,
            messages=spent[actor, "messages"] / elapsed,
            room=spent[actor, "room"] / elapsed,
            queued=spent[actor, "queued"] / elapsed,
            staleness=sum(late[actor]) / len(late[actor]) if late[actor] else None,
        )
        for actor in actors
    ]


def _tracks(events: Events) -> Mapping[str, str]:
    actors = {e.actor for e in (*events.of(Operation), *events.of(Wait), *events.of(Take))}
    actors |= {actor for edge in events.edges for actor in (edge.source, edge.target)}
    return {actor: f"{actor} (rank {events.ranks[actor]})" if actor in events.ranks else actor for actor in actors}


def _stays(events: Events) -> list[Stay]:
    """Every message with the time it was taken at; messages alike are taken in the order in which they arrived."""
    takes: dict[tuple, deque[float]] = defaultdict(deque)
    for take in events.of(Take):
        takes[take[:-1]].append(take.time)
    ends = [extent.end for extent in events.of(Extent)]
    stays = []
    for transfer in sorted(events.of(Transfer), key=lambda transfer: transfer.arrived):
        edge = events.edges[transfer.edge]
        waiting = takes[edge.target, edge.port, transfer.kind, transfer.key]
        used = bool(waiting)
        over = next((end for end in ends if end >= transfer.arrived), transfer.arrived)
        taken = waiting.popleft() if used else over
        # The receiver may read its clock before the sender does.
        stays.append(Stay(edge, transfer, min(transfer.arrived, taken), taken, used))
    return stays


def _apart(lane: Sequence[Span]) -> Iterable[Span]:
    """The spans of a lane on as many numbered lanes as they need not to overlap."""
    ends: list[float] = []
    for span in sorted(lane, key=lambda span: (span.start, span.end)):
        number = next((i for i, end in enumerate(ends) if end <= span.start), len(ends))
        ends[number : number + 1] = [span.end]
        track = f"{span.track} {number + 1}" if number else span.track
        yield Span(span.process, track, span.name, span.start, span.end, span.args, span.kind)


def _queues(name: str, stays: Iterable[Stay]) -> Iterable[Counter]:
    steps: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for stay in stays:
        steps[f"queue {stay.edge.target}.{stay.edge.port}"] += [(stay.arrived, 1), (stay.taken, -1)]
    for port in sorted(steps, key=natural_key):
        depth = 0
        for time, step in sorted(steps[port], key=lambda change: (change[0], -change[1])):
            depth += step
            yield Counter(name, port, time, depth)


def _staleness(events: Events) -> Iterable[Counter]:
    late = {(v.actor, v.key): v.backward - v.forward for v in events.of(Versions)}
    for op in events.of(Operation):
        steps = late.get((op.actor, operation_batch(op.name) or 0))
        if operation_ends_pass(op.name) and steps is not None:
            yield Counter(events.name, f"staleness {op.actor}", op.start, steps)
