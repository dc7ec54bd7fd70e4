"""What happened in another process, brought to rank 0 when a run ends and told to the observers there, on its clock."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from decoupled.messages import Boundary, Data, Message
from decoupled.runtime.contract import Edge, Observer

LIMIT = 200_000


class Events(Observer):
    """Collects calls to an observer, `LIMIT` at most; `offset`: seconds from this process's clock to rank 0's."""

    def __init__(self, offset: float) -> None:
        self._offset, self._lock = offset, threading.Lock()
        self._calls: list[tuple[str, tuple[Any, ...]]] = []

    def operation(self, actor: str, operation: str, start: float, end: float) -> None:
        self._add("operation", actor, operation, start + self._offset, end + self._offset)

    def delivery(self, edge: Edge, message: Message, sent: float, arrived: float) -> None:
        self._add("delivery", edge, _light(message), sent + self._offset, arrived + self._offset)

    def taken(self, actor: str, port: str, message: Message, time: float) -> None:
        self._add("taken", actor, port, _light(message), time + self._offset)

    def wait(self, actor: str, what: str, start: float, end: float) -> None:
        self._add("wait", actor, what, start + self._offset, end + self._offset)

    def taken_calls(self) -> list[tuple[str, tuple[Any, ...]]]:
        """The calls so far."""
        with self._lock:
            return list(self._calls)

    @staticmethod
    def replay(calls: Iterable[tuple[str, tuple[Any, ...]]], observers: Sequence[Observer]) -> None:
        """Make the calls on `observers`."""
        for name, args in calls:
            for observer in observers:
                getattr(observer, name)(*args)

    def _add(self, name: str, *args: Any) -> None:
        with self._lock:
            if len(self._calls) < LIMIT:
                self._calls.append((name, args))


def _light(message: Message) -> Message:
    """The message without its tensors."""
    if isinstance(message, Boundary):
        return replace(message, payload=(), indices=None)
    if isinstance(message, Data):
        return replace(message, inputs=None, targets=None, indices=None)
    if isinstance(getattr(message, "payload", None), tuple):
        return replace(message, payload=())  # type: ignore[call-arg]
    return message
