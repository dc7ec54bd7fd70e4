"""A recorder of operations and messages, bounded: it stops after the first so many, so that a long run stays small."""

from __future__ import annotations

import threading

from decoupled.messages import Message
from decoupled.observe.trace import Flow, Span
from decoupled.runtime.contract import Edge, Observer


class Recorder(Observer):
    """Keeps the first spans of every actor and the first messages.

    Args:
        process: the name of the run in a trace.
        limit: spans per actor, and messages per edge.
    """

    def __init__(self, process: str, limit: int = 64) -> None:
        self._process, self._limit = process, limit
        self._spans: dict[str, list[Span]] = {}
        self._flows: dict[Edge, list[Flow]] = {}
        self._lock = threading.Lock()

    def operation(self, actor: str, operation: str, start: float, end: float) -> None:
        with self._lock:
            kept = self._spans.setdefault(actor, [])
            if len(kept) < self._limit:
                kept.append(Span(self._process, actor, operation, start, end))

    def delivery(self, edge: Edge, message: Message, sent: float, arrived: float) -> None:
        with self._lock:
            kept = self._flows.setdefault(edge, [])
            if len(kept) < self._limit:
                name = f"{edge.out} {message.key}"
                kept.append(Flow(self._process, edge.source, sent, edge.target, arrived, name))

    @property
    def spans(self) -> list[Span]:
        """The spans, from time 0, in order."""
        zero = self._zero()
        moved = [
            Span(s.process, s.track, s.name, s.start - zero, s.end - zero)
            for kept in self._spans.values()
            for s in kept
        ]
        return sorted(moved, key=lambda span: (span.start, span.track))

    @property
    def flows(self) -> list[Flow]:
        """The messages between recorded actors, up to the last span."""
        zero, last = self._zero(), max((s.end for kept in self._spans.values() for s in kept), default=0.0)
        return [
            Flow(f.process, f.source, f.start - zero, f.target, f.end - zero, f.name)
            for kept in self._flows.values()
            for f in kept
            if f.source in self._spans and f.end <= last and f.start >= zero
        ]

    def _zero(self) -> float:
        return min((s.start for kept in self._spans.values() for s in kept), default=0.0)
