"""Workers without tensors: the same order and the same waits, messages that have a size, and an account of memory.

Held per pass is what the method's retention keeps (`Retention.keeps`), and one frozen copy of the weights per version
in use where it runs backwards with the weights of the forward; the real retentions count the same.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from decoupled.build import halves
from decoupled.correction import Site
from decoupled.coupling import Place
from decoupled.messages import End, Message
from decoupled.method import Method
from decoupled.plan import ANY, Op
from decoupled.runtime.contract import Actor, Outcome, Want
from decoupled.waits import down_port, needed


@dataclass(frozen=True, slots=True)
class Sized(Message):
    """A message of so many bytes."""

    nbytes: float = 0.0


@dataclass(frozen=True)
class Sizes:
    """Bytes at one block, for one pass: its message up, its message down, its input, its graph; and its weights."""

    up: float
    down: float
    input: float
    graph: float
    weights: float


class Ticker(Actor):
    """Tells every block that reads data that pass n may begin."""

    name = "source"

    def __init__(self, readers: Sequence[str], passes: int) -> None:
        self._readers, self._passes, self._next = readers, passes, 0

    def wants(self) -> Sequence[Want]:
        return (Want(),) if self._next <= self._passes else ()

    def handle(self, want: Want, messages: tuple[Message, ...]) -> Outcome:
        n, self._next = self._next, self._next + 1
        message = Message(n) if n < self._passes else End(n)
        return Outcome(None, [(reader, message) for reader in self._readers])


class Planned(Actor):
    """A worker without tensors; `weigh` says what its messages and memory are counted as.

    Attributes:
        learns: whether any objective reaches it. version: of its weights. forwards: run so far.
        most: most passes held at once. staleness: updates between F and B -> passes.
        held: most bytes held for passes. bytes_up, bytes_down: sent.
    """

    def __init__(self, method: Method, k: int, K: int) -> None:
        self.k, self.K, self.name = k, K, f"block{k}"
        lower, upper = halves(method, Place(k, K, lambda y, t: y.sum(), ((1,),) * K, (1,)))
        self.lower, self.upper, self.needs_data = lower, upper, lower.needs_data or upper.needs_data
        self._needed = functools.cache(lambda kind, *seen: needed(kind, lower, upper, *seen))
        self._order, self._plan = method.order, method.order.plan(k, K)
        self.learns = bool(method.facts.reach(k, K))
        self._forward: dict[int, list[int]] = {}  # pass -> version at F, Down messages to come, Down messages sent
        self._data: set[int] = set()
        self._own: set[int] = set()
        self._early: set[int] = set()
        self.version = self.most = self.forwards = 0
        self.staleness: Counter[int] = Counter()
        late = method.order.rule is None or method.order.delay(k, K) > 0
        site = Site(k, K, float(late), (), None)
        moved = any(correction.moves(site) for correction in method.corrections)
        self._keeps = method.keeps(k, K)
        self.replays = method.replays(k, K)
        self._copies = (late or moved) and not method.retention.today
        self._users: Counter[int] = Counter()  # version -> passes that run with a copy of it
        self._reserved: set[int] = set()  # versions that forwards to come will run with
        self._begun = 0
        self.held = self.bytes_up = self.bytes_down = 0.0
        self.weigh(Sizes(0.0, 0.0, 0.0, 0.0, 0.0))

    def weigh(self, sizes: Sizes) -> None:
        """Count messages and memory as `sizes` from now on."""
        self.sizes, self._pass = sizes, {"graph": sizes.graph, "input": sizes.input, "nothing": 0.0}[self._keeps]

    def wants(self) -> Sequence[Want]:
        return [self._want(op) for op in self._plan.options()]

    def handle(self, want: Want, messages: tuple[Message, ...]) -> Outcome:
        op: Op = want.tag
        if messages and isinstance(messages[0], End):
            end = messages[0].key
            assert isinstance(end, int)
            self._plan.end(end)
            return Outcome(None, [("up", End(end))])
        key = want.key if not messages else messages[0].key
        self._plan.done(op)
        if not isinstance(key, int):
            if self.learns:
                self._step()
            return Outcome("S" if self.learns else None)
        return Outcome(f"{op.kind}{key}", self._operate(op.kind, key, messages))

    def _want(self, op: Op) -> Want:
        if op.kind == "S":
            return Want((), None, op)
        key = None if op.batch == ANY else op.batch
        replies = self._forward[key][1] if key in self._forward else self.lower.replies
        ports = self._needed(op.kind, replies, key in self._own, key in self._data)
        if key is None and not ports:
            key = next(iter(self._forward))
        return Want(ports, key, op)

    def _step(self) -> None:
        if self._order.sees is not None:
            least = self._order.sees(self.k, self.K, self._begun)
            self._reserved = {v for v in self._reserved | {self.version} if v >= least}
            self._weigh()
        self.version += 1

    def _weigh(self) -> None:
        copies = len(self._users) + sum(v not in self._users for v in self._reserved) if self._copies else 0
        self.held = max(self.held, len(self._forward) * self._pass + copies * self.sizes.weights)

    def _operate(self, kind: str, n: int, messages: tuple[Message, ...]) -> list[tuple[str, Message]]:
        if kind == "E":
            self._data.add(n)
            self._early.add(n)
            return self._up(n)
        if kind == "F":
            sees = self._order.sees
            version = self.version if sees is None else sees(self.k, self.K, n)
            self._forward[n] = [version, self.lower.replies, 0]
            self._users[version] += 1
            self.forwards += 1
            self._begun = n + 1
            self.most = max(self.most, len(self._forward))
            self._weigh()
            return [] if n in self._early else self._up(n)
        if kind == "A":
            return []
        state = self._forward[n]
        state[1] -= len(messages)
        answers = kind in "BI" and self.upper.replies
        state[2] += answers
        self._own.add(n)
        if kind in "BW":
            self._close(n, state[0])
        if not answers:
            return []
        self.bytes_down += self.sizes.down
        return [(down_port(state[2] - 1), Sized(n, self.sizes.down))]

    def _close(self, n: int, version: int) -> None:
        self.staleness[self.version - version] += 1
        del self._forward[n]
        self._users[version] -= 1
        if not self._users[version]:
            del self._users[version]
        for seen in (self._own, self._data, self._early):
            seen.discard(n)

    def _up(self, n: int) -> list[tuple[str, Message]]:
        if self.k == self.K - 1:
            return []
        self.bytes_up += self.sizes.up
        return [("up", Sized(n, self.sizes.up))]
