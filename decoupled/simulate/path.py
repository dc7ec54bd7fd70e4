"""The critical path: the chain of operations and messages that the time of a simulation is the length of.

Every operation starts when the last thing it waits for is there: the actor's previous operation, or a message. Each
remembers that one as the link before it; the chain back from the last operation to end is the critical path. What is
missing to the whole is waiting for room on an edge.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Any

from decoupled.messages import Message
from decoupled.runtime.contract import Edge, Observer

Link = tuple[Any, int, float]  # the link before it or None; block, or number of blocks for a message; time
Chain = tuple[float, Link | None]  # when it ends; its last link
NOTHING: Chain = (0.0, None)


class CriticalPath(Observer):
    """Follows the chains of `blocks` blocks; `answering`: the actors that send something down."""

    def __init__(self, blocks: int, answering: Iterable[str]) -> None:
        self._blocks, self._answering = blocks, set(answering)
        self._number = {f"block{k}": k for k in range(blocks)}
        self._latest: dict[str, Chain] = {}
        self._sent: defaultdict[tuple[str, bool, Any], deque[Link | None]] = defaultdict(deque)
        self._arrived: dict[tuple[str, str, Any], Chain] = {}
        self._cause: dict[str, Chain] = {}
        self._early: set[str] = set()  # actors that send up in an operation E

    def taken(self, actor: str, port: str, message: Message, time: float) -> None:
        chain = self._arrived.pop((actor, port, message.key), NOTHING)
        if chain[0] >= self._cause.get(actor, NOTHING)[0]:
            self._cause[actor] = chain

    def operation(self, actor: str, operation: str, start: float, end: float) -> None:
        own, cause = self._latest.get(actor, NOTHING), self._cause.pop(actor, NOTHING)
        chain = own[1] if own[0] >= cause[0] else cause[1]
        if end > start:
            chain = _longer(chain, self._number[actor], end - start)
        self._latest[actor] = (end, chain)
        kind = operation[0]
        if kind == "E":
            self._early.add(actor)
        top = self._number.get(actor) == self._blocks - 1
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
            chain = _longer(chain, self._blocks, arrived - sent)
        self._arrived[edge.target, edge.port, message.key] = (arrived, chain)

    def result(self, elapsed: float) -> dict[str, Any]:
        """Time on the critical path: `blocks` (a list), `messages`, and `room`, the rest."""
        _, link = max(self._latest.values(), key=lambda chain: chain[0], default=NOTHING)
        spent = [0.0] * (self._blocks + 1)
        while link is not None:
            link, place, time = link
            spent[place] += time
        return {"blocks": spent[:-1], "messages": spent[-1], "room": max(0.0, elapsed - sum(spent))}


def _longer(link: Link | None, place: int, time: float) -> Link:
    """The chain with some more time; what follows one another at one place is one link."""
    if link is not None and link[1] == place:
        return link[0], place, link[2] + time
    return link, place, time
