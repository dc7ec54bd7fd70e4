"""The critical path: the chain of operations and messages that the time of a simulation is the length of.

Every operation starts when the last thing it waits for is there: the actor's previous operation, or a message. Each
remembers that one as the link before it; the chain back from the last operation to end is the critical path. What is
missing to the whole is waiting for room on an edge.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Any

from decoupled.messages import End, Message
from decoupled.runtime.contract import Edge, Observer

Link = tuple[Any, int, float]  # the link before it or None; block, or number of blocks for a message; time
Chain = tuple[float, Link | None]  # when it ends; its last link
NOTHING: Chain = (0.0, None)


class _Known:
    """What is known of one actor.

    Attributes:
        number: of the block. sends, answers: whether operations of it send something up, down. early: E does, not F.
        latest: of its operations. cause: the last that the next one waited for.
        arrived: (port, key) -> what waits there. up, down: key and chain of what was sent and has not arrived.
    """

    __slots__ = ("answers", "arrived", "cause", "down", "early", "latest", "number", "sends", "up")

    def __init__(self, number: int = -1, sends: bool = False, answers: bool = False) -> None:
        self.number, self.sends, self.answers, self.early = number, sends, answers, False
        self.latest = self.cause = NOTHING
        self.arrived: dict[tuple[str, Any], Chain] = {}
        self.up, self.down = deque[tuple[Any, Link | None]](), deque[tuple[Any, Link | None]]()


class CriticalPath(Observer):
    """Follows the chains of `blocks` blocks; `answering`: the actors that send something down."""

    def __init__(self, blocks: int, answering: Iterable[str]) -> None:
        self._blocks, answering = blocks, set(answering)
        self._known = defaultdict[str, _Known](_Known)  # sources and intakes, which take no time, come by themselves
        for k in range(blocks):
            self._known[f"block{k}"] = _Known(k, k < blocks - 1, f"block{k}" in answering)

    def taken(self, actor: str, port: str, message: Message, time: float) -> None:
        one = self._known[actor]
        chain = one.arrived.pop((port, message.key), NOTHING)
        if chain[0] >= one.cause[0]:
            one.cause = chain

    def operation(self, actor: str, operation: str, start: float, end: float) -> None:
        one = self._known[actor]
        (own, chain), (last, cause) = one.latest, one.cause
        if last > own:
            chain = cause
        if end > start:
            chain = _longer(chain, one.number, end - start)
        one.latest, one.cause = (end, chain), NOTHING
        kind = operation[0]
        if kind == "E":
            one.early = True
        if kind == "E" or (kind == "F" and not one.early):
            if one.sends:
                one.up.append((int(operation[1:]), chain))
        elif one.answers and kind in "BI":
            one.down.append((int(operation[1:]), chain))

    def delivery(self, edge: Edge, message: Message, sent: float, arrived: float) -> None:
        if isinstance(message, End):
            return
        source, key = self._known[edge.source], message.key
        waiting = source.up if edge.out == "up" else source.down
        for entry in waiting:  # nearly always it is the first
            if entry[0] == key:
                break
        else:
            return
        waiting.remove(entry)
        chain = entry[1]
        if arrived > sent:
            chain = _longer(chain, self._blocks, arrived - sent)
        self._known[edge.target].arrived[edge.port, key] = (arrived, chain)

    def result(self, elapsed: float) -> dict[str, Any]:
        """Time on the critical path: `blocks` (a list), `messages`, and `room`, the rest."""
        _, link = max((one.latest for one in self._known.values()), key=lambda chain: chain[0], default=NOTHING)
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
