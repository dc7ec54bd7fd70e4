"""The critical path: the chain of operations and messages that the time of a simulation is the length of.

Every operation starts when the last thing it waits for is there: the actor's previous operation, or a message. Walking
forward, each carries the time spent so far on its own chain, per block and on messages; the chain of the last operation
to end is the critical path. What is missing to the whole is waiting for room on an edge.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Any

import numpy as np

from decoupled.messages import Message
from decoupled.runtime.contract import Edge, Observer

Chain = tuple[float, np.ndarray]  # when it ends; seconds per block, and on messages


class CriticalPath(Observer):
    """Follows the chains of `blocks` blocks; `answering`: the actors that send something down."""

    def __init__(self, blocks: int, answering: Iterable[str]) -> None:
        self._blocks, self._answering = blocks, set(answering)
        self._nothing: Chain = (0.0, np.zeros(blocks + 1))
        self._latest: dict[str, Chain] = {}
        self._sent: defaultdict[tuple[str, bool, Any], deque[np.ndarray]] = defaultdict(deque)
        self._arrived: dict[tuple[str, str, Any], Chain] = {}
        self._cause: dict[str, Chain] = {}
        self._early: set[str] = set()  # actors that send up in an operation E

    def taken(self, actor: str, port: str, message: Message, time: float) -> None:
        chain = self._arrived.pop((actor, port, message.key), self._nothing)
        self._cause[actor] = max(chain, self._cause.get(actor, self._nothing), key=lambda chain: chain[0])

    def operation(self, actor: str, operation: str, start: float, end: float) -> None:
        own, cause = self._latest.get(actor, self._nothing), self._cause.pop(actor, self._nothing)
        chain = own[1] if own[0] >= cause[0] else cause[1]
        if end > start:
            chain = chain.copy()
            chain[int(actor[5:])] += end - start
        self._latest[actor] = (end, chain)
        kind = operation[0]
        if kind == "E":
            self._early.add(actor)
        top = actor == f"block{self._blocks - 1}"
        if (kind == "E" or (kind == "F" and actor not in self._early)) and not top:
            self._sent[actor, True, int(operation[1:])].append(chain)
        elif kind in "BI" and actor in self._answering:
            self._sent[actor, False, int(operation[1:])].append(chain)

    def delivery(self, edge: Edge, message: Message, sent: float, arrived: float) -> None:
        waiting = self._sent.get((edge.source, edge.out == "up", message.key))
        if not waiting:
            return
        chain = waiting.popleft()
        if not waiting:
            del self._sent[edge.source, edge.out == "up", message.key]
        if arrived > sent:
            chain = chain.copy()
            chain[-1] += arrived - sent
        self._arrived[edge.target, edge.port, message.key] = (arrived, chain)

    def result(self, elapsed: float) -> dict[str, Any]:
        """Time on the critical path: `blocks` (a list), `messages`, and `room`, the rest."""
        _, chain = max(self._latest.values(), key=lambda chain: chain[0], default=self._nothing)
        rest = max(0.0, elapsed - float(chain.sum()))
        return {"blocks": chain[:-1].tolist(), "messages": float(chain[-1]), "room": rest}
