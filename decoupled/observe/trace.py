"""Timelines of operations: Chrome trace-event JSON for Perfetto, and a plain text table for the terminal.

A run is a set of spans (operation `F3` of track `block0` from start to end, in seconds) and flows (one message from the
end of an operation on one track to the start of an operation on another). In the trace file one *process* is one method
run and one *thread* is one track, so Perfetto stacks the methods and lines up the blocks of each:

    process  PipeDream, seed 0
      thread   block0  | F0 | F1 |    | B0 | S |          X events: name, category, ts and dur in microseconds
                          \\         /
      thread   block1       | F0 | B0 | S |               s -> f events: the message between two operations
"""

from __future__ import annotations

import gzip
import json
import math
import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from decoupled.files import write_whole

# What the first letter of an operation stands for; the report's legend and the trace's categories use the same words.
KINDS = {
    "F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient", "S": "step", "E": "emit",
    "A": "answer", "P": "probe",
}  # fmt: skip
_OTHERS = KINDS | {"E": "act", "A": "draw", "P": "pretrain", "C": "choose", "L": "learn"}  # policies, selectors
_OPERATION = re.compile(r"([A-Z])(?:(\d*)\*?$| )")  # after a space: anything
_MICRO = 1e6  # trace-event times are in microseconds
_NANO = 1e-9  # Perfetto's resolution, in seconds


@dataclass(frozen=True)
class Span:
    """One operation: it occupied `track` of `process` from `start` to `end` (seconds); `kind`: another category."""

    process: str
    track: str
    name: str
    start: float
    end: float
    args: Mapping[str, Any] = field(default_factory=dict)
    kind: str = ""


@dataclass(frozen=True)
class Flow:
    """One message: left `source` at `start` and reached `target` at `end` (seconds).

    The arrow leaves the operation around `start`, or the end of the last one before it, and points at the operation
    that begins at `end`, or at the next one where none begins just then.
    """

    process: str
    source: str
    start: float
    target: str
    end: float
    name: str


@dataclass(frozen=True)
class Counter:
    """One value of a counter track of `process` at `time` (seconds), such as bytes held or messages queued."""

    process: str
    name: str
    time: float
    value: float


def operation_kind(name: str, track: str) -> str:
    """The word for the operation's letter (`"F3"` -> `"forward"`), or `"other"` for a name that is no operation.

    A letter's meaning depends on the track: `"E3"` of a block is emit, of any other actor act.
    """
    kinds = KINDS if track.startswith("block") else _OTHERS
    match = _OPERATION.match(name)
    return kinds.get(match[1], "other") if match else "other"


def operation_batch(name: str) -> int | None:
    """The batch number in an operation's name (`"F3"` -> 3), None where it has none (`"S"`)."""
    match = _OPERATION.match(name)
    return int(match[2]) if match and match[2] else None


def operation_ends_pass(name: str) -> bool:
    """Whether an operation is the last one of its pass on a block: the backward, or the half of it for the weights."""
    match = _OPERATION.match(name)
    return match is not None and match[1] in "BW"


def natural_key(text: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key by which `block2` comes before `block10`."""
    parts = re.split(r"(\d+)", text)
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in parts if part)


def spans_of(results: Mapping[str, Any]) -> list[Span]:
    """The timelines of a results.json as spans, one process per record that has one."""
    spans = []
    for record in results.get("records") or []:
        process = f"{record.get('label') or record['method']}, seed {record['seed']}"
        spans += [Span(process, e["actor"], e["op"], e["start"], e["end"]) for e in record.get("timeline") or []]
    return spans


def opening(spans: Sequence[Span], count: int) -> list[Span]:
    """The operations up to the end of the `count`-th one of the track that is first to get there."""
    ends = (sorted(s.end for s in spans if s.track == track)[count - 1 : count] for track in {s.track for s in spans})
    until = min(chain.from_iterable(ends), default=math.inf)
    return [span for span in spans if span.end <= until]


def write_trace(spans: Iterable[Span], flows: Iterable[Flow], path: Path, counters: Iterable[Counter] = ()) -> None:
    """Write spans, flows and counters as Chrome trace-event JSON; open the file at Perfetto or chrome://tracing.

    Args:
        spans: the operations; a span that ends before it starts is a `ValueError`.
        flows: the messages, drawn as arrows from the operation around `start` to the one from `end` on.
        path: the file to write, compressed if it ends in .gz; missing folders are made.
        counters: values of counter tracks, in any order.
    """
    spans, flows, counters = list(spans), list(flows), list(counters)
    for span in spans:
        if not span.end >= span.start:
            raise ValueError(
                f"operation {span.name} of {span.process}/{span.track} ends at {span.end} s, "
                f"before its start at {span.start} s; give both in seconds of one clock"
            )
    processes = {name: i + 1 for i, name in enumerate(dict.fromkeys(x.process for x in chain(spans, flows, counters)))}
    ends = [(s.process, s.track) for s in spans] + [(f.process, t) for f in flows for t in (f.source, f.target)]
    tracks: dict[tuple[str, str], int] = {}
    for process in processes:
        names = sorted({track for owner, track in ends if owner == process}, key=natural_key)
        tracks.update({(process, name): i + 1 for i, name in enumerate(names)})
    events = _names(processes, tracks)
    events += [_complete(span, processes[span.process], tracks[span.process, span.track]) for span in spans]
    events += _arrows(flows, spans, processes, tracks)
    events += [
        {"ph": "C", "name": c.name, "pid": processes[c.process], "ts": c.time * _MICRO, "args": {"value": c.value}}
        for c in counters
    ]
    events.sort(key=lambda event: (event["pid"], event.get("ts", -math.inf)))  # names first, then in order of time
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, separators=(",", ":"), default=str)
    write_whole(path, gzip.compress(text.encode()) if path.suffix == ".gz" else text)


def _names(processes: Mapping[str, int], tracks: Mapping[tuple[str, str], int]) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    for name, pid in processes.items():
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}})
    for (process, track), tid in tracks.items():
        where = {"ph": "M", "pid": processes[process], "tid": tid}
        events.append(where | {"name": "thread_name", "args": {"name": track}})
        events.append(where | {"name": "thread_sort_index", "args": {"sort_index": tid}})
    return events


def _complete(span: Span, pid: int, tid: int) -> dict[str, Any]:
    batch = operation_batch(span.name)
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.kind or operation_kind(span.name, span.track),
        "pid": pid,
        "tid": tid,
        "ts": span.start * _MICRO,
        "dur": (span.end - span.start) * _MICRO,
        "args": ({} if batch is None else {"batch": batch}) | dict(span.args),
    }


def _arrows(
    flows: Sequence[Flow], spans: Sequence[Span], processes: Mapping[str, int], tracks: Mapping[tuple[str, str], int]
) -> list[dict[str, Any]]:
    by_track: dict[tuple[str, str], list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.start):
        by_track[span.process, span.track].append(span)
    events = []
    for number, flow in enumerate(flows):
        common = {"cat": "message", "name": flow.name, "id": number, "pid": processes[flow.process]}
        sender, receiver = by_track[flow.process, flow.source], by_track[flow.process, flow.target]
        sent = flow.start
        before = bisect_left(sender, sent - _NANO, key=lambda span: span.start) - 1
        if before >= 0:  # at its very end an operation no longer encloses the arrow
            sent = max(sender[before].start, min(sent, sender[before].end - _NANO))
        last = bisect_right(receiver, flow.end + _NANO, key=lambda span: span.start) - 1
        taken = last >= 0 and abs(receiver[last].start - flow.end) <= _NANO
        tail = {"ph": "s", "tid": tracks[flow.process, flow.source], "ts": sent * _MICRO}
        head = {"ph": "f", "tid": tracks[flow.process, flow.target], "ts": flow.end * _MICRO}
        events += [common | tail, common | head | ({"bp": "e"} if taken else {})]  # without bp: the next operation
    return events


def timeline_table(spans: Iterable[Span], width: int = 100) -> str:
    """The timeline as text: one row per track, one column per time slot.

    Where all times are multiples of one slot (a virtual clock), columns are equal slots; otherwise every moment at
    which an operation starts opens a column, so columns keep the order of operations but not their length. An
    operation stands in its first column and goes on as `-`; `.` is idle; an operation without duration joins the one
    before it (`B0+S`). Tables wider than `width` go on below.

        time    0  1  2  3  4  5
        block0  F0 F1 .  .  B0 -
        block1  .  F0 B0 -  F1 .

    Args:
        spans: operations of one or more processes; with several, rows are named `process/track`.
        width: the most characters in a line; at least the row name, one cell and two spaces.
    """
    spans = sorted(spans, key=lambda span: (span.start, span.end))
    if not spans:
        return "(no operations)"
    several = len({span.process for span in spans}) > 1
    rows: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        rows[f"{span.process}/{span.track}" if several else span.track].append(span)
    starts = _columns(spans)
    cells = {name: _cells(rows[name], starts) for name in sorted(rows, key=natural_key)}
    heads = _shortest([time - starts[0] for time in starts])
    cell_width = max(len(text) for text in chain(heads, *cells.values()))
    name_width = max(len(name) for name in chain(rows, ["time"]))
    per_line = (width - name_width - 1) // (cell_width + 1)
    if per_line < 1:
        raise ValueError(
            f"width {width} holds no column: the row names take {name_width}, a cell {cell_width} characters; "
            f"give at least {name_width + cell_width + 2}"
        )
    panels = []
    for first in range(0, len(starts), per_line):
        part = slice(first, first + per_line)
        lines = [("time", heads[part]), *((name, row[part]) for name, row in cells.items())]
        panels.append("\n".join(_line(name, texts, name_width, cell_width) for name, texts in lines))
    return "\n\n".join(panels)


def _line(name: str, texts: Sequence[str], name_width: int, cell_width: int) -> str:
    return f"{name:<{name_width}}  {' '.join(f'{text:<{cell_width}}' for text in texts)}".rstrip()


def _columns(spans: Sequence[Span]) -> list[float]:
    """Start times of the columns: equal slots where a common slot exists and stays readable, else all starts."""
    first, last = spans[0].start, max(span.end for span in spans)
    tolerance = 1e-6 * (last - first)
    slot = 0.0
    for length in {round(x, 12) for s in spans for x in (s.start - first, s.end - s.start)}:
        slot = _common_divisor(slot, length, tolerance)
    if slot > 0:
        count = round((last - first) / slot)
        if count <= 4 * len(spans) + 16:
            return [first + i * slot for i in range(count)]
    starts = sorted({span.start for span in spans if span.end - span.start > tolerance}) or [first]
    return [starts[0]] + [b for a, b in pairwise(starts) if b - a > tolerance]


def _common_divisor(a: float, b: float, tolerance: float) -> float:
    while b > tolerance:
        a, b = b, math.fmod(a, b)
        if abs(a - b) <= tolerance:  # fmod of 0.3 by 0.1 leaves 0.1, not 0
            b = 0.0
    return a


def _cells(row: Sequence[Span], starts: Sequence[float]) -> list[str]:
    tolerance = 1e-6 * (max(span.end for span in row) - starts[0]) + 1e-15
    texts = ["."] * len(starts)
    previous: tuple[float, int] | None = None  # end of the operation before, and its first column
    for span in row:
        lasts = span.end - span.start > tolerance
        begin = max(0, bisect_right(starts, span.start + tolerance) - 1)
        if not lasts and previous and abs(previous[0] - span.start) <= tolerance:
            begin = previous[1]
        texts[begin] = span.name if texts[begin] in ".-" else f"{texts[begin]}+{span.name}"
        if lasts:
            stop = bisect_left(starts, span.end - tolerance)
            texts[begin + 1 : stop] = ["-"] * (stop - begin - 1)
        previous = (span.end, begin)
    return texts


def _shortest(times: Sequence[float]) -> list[str]:
    """Times with the fewest digits that keep them apart."""
    for digits in range(12):
        texts = [f"{time:.{digits}f}" for time in times]
        if len(set(texts)) == len(texts):
            return texts
    return [f"{time:g}" for time in times]
