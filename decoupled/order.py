"""Orders: the sequence of operations of one block, as data.

    F3  forward of pass 3: take the input (Up), run the block, send Up
    B3  backward of pass 3: take Down where the coupling sends one, run the vector-Jacobian product, send Down
    I3, W3  the two halves of B3: input gradient (send Down) and weight gradient (zero-bubble and truncated orders)
    S   optimizer step
    E3  emit: send Up for pass 3 from what is stored, before the block itself has run (auxiliary variables)
    A3  answer: take Down of pass 3 and update the auxiliary variable with it

An order is a pure function of (k, K): block k of K. It decides the *delay*, the number of own updates between F and B:

    order                 block k                                          delay            in flight
    sync                  F0 B0 S F1 B1 S ...                              0                1
    local                 F0 B0 S F1 B1 S ... (no Down is waited for)      0                1
    gpipe(M)              F0 .. F[M-1] B0 .. B[M-1] S ...                  0                M
    one_f_one_b_flush(M)  K-1-k forwards, then B F alternating, S per M    0                min(M, K-k)
    lockstep              F t, then B [t-(K-1-k)], S                       K-1-k            K-k
    one_f_one_b           the same operations, read as 1F1B                K-1-k            K-k
    tick                  F t, then B [t-2(K-1-k)], S                      2(K-1-k)         2(K-1-k)+1
    tick_backward_first   B [t-2(K-1-k)], S, then F t                      2(K-1-k)-1 (>=0) max(1, 2(K-1-k))
    truncated(reach)      F0 I0 .. W0 S ...                                0                1
    rounds(sweep)         E0 F0 B0 S A0 ...   (sweep: E0 F0 A0 B0 S ...)   0                1
    free(credit)          whatever has arrived, Down before Up             measured         credit(k, K)

Sources: Huo et al. 2018 (lockstep), Narayanan et al. 2019 (1F1B), Zhuang et al. 2021 (tick, backward first),
Huang et al. 2019 (GPipe), Gaunt et al. 2017 (free).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from decoupled.errors import UserError
from decoupled.plan import KINDS, FixedPlan, FreePlan, Op, S, walk

Rule = Callable[[int, int], Iterator[Op]]


@dataclass(frozen=True)
class Order:
    """An order of operations: `rule(k, K)` yields the operations of block k without end.

    `credit(k, K)` is set for free orders only (then there is no rule): the most passes a block holds unanswered.
    """

    name: str
    rule: Rule | None = None
    credit: Callable[[int, int], int] | None = None

    def __str__(self) -> str:
        return self.name

    def operations(self, k: int, K: int) -> Iterator[Op]:
        """The endless operations of block `k` of `K`; a free order has none (ValueError)."""
        if self.rule is None:
            raise ValueError(f"order {self.name} is decided by arrivals; it has no fixed operations")
        return self.rule(k, K)

    def plan(self, k: int, K: int) -> FixedPlan | FreePlan:
        """A fresh plan for one run of block `k` of `K`."""
        if self.credit is not None:
            return FreePlan(self.credit(k, K))
        return FixedPlan(self.operations(k, K))

    def text(self, k: int, K: int, batches: int) -> str:
        """The complete operations of block `k` for a run of `batches` passes, e.g. ``"F0 F1 B0 S B1 S"``."""
        plan = self.plan(k, K)
        plan.end(batches)
        return " ".join(map(str, walk(plan)))

    def in_flight(self, k: int, K: int) -> int:
        """The most passes that block `k` holds between F and B (or W)."""
        if self.credit is not None:
            return self.credit(k, K)
        return _profile(self, k, K)[0]

    def delay(self, k: int, K: int) -> int:
        """Own updates between F and B of one pass in the steady state."""
        return _profile(self, k, K)[1]


def parse(text: str) -> list[Op]:
    """Read ``"F0 F1 B0 S"`` back into operations.

    Raises:
        UserError: a word is not an operation.
    """
    ops = []
    for word in text.split():
        match = re.fullmatch(rf"([{KINDS}])(\d*)", word)
        if match is None or (match[1] == "S") != (match[2] == ""):
            raise UserError(f"{word!r} is not an operation: use F, B, I, W, E or A with a pass number, or S")
        ops.append(Op(match[1], int(match[2] or 0)))
    return ops


def explicit(texts: Sequence[str]) -> Order:
    """An order written out by hand, one text per block."""
    plans = [parse(text) for text in texts]

    def rule(k: int, K: int) -> Iterator[Op]:
        if len(plans) != K:
            raise UserError(f"the explicit order is written for {len(plans)} blocks, the network has {K}")
        return iter(plans[k])

    return Order("explicit", rule)


def _cycle(*kinds: str) -> Rule:
    def rule(k: int, K: int) -> Iterator[Op]:
        for n in itertools.count():
            yield from (S if kind == "S" else Op(kind, n) for kind in kinds)

    return rule


def _shifted(shift: Callable[[int, int], int], backward_first: bool = False) -> Rule:
    def rule(k: int, K: int) -> Iterator[Op]:
        late = shift(k, K)
        for n in itertools.count():
            forward, backward = [Op("F", n)], ([Op("B", n - late), S] if n >= late else [])
            yield from backward + forward if backward_first and late else forward + backward

    return rule


sync = Order("sync", _cycle("F", "B", "S"))
local = Order("local", _cycle("F", "B", "S"))
lockstep = Order("lockstep", _shifted(lambda k, K: K - 1 - k))
one_f_one_b = Order("one_f_one_b", _shifted(lambda k, K: K - 1 - k))
tick = Order("tick", _shifted(lambda k, K: 2 * (K - 1 - k)))
tick_backward_first = Order("tick_backward_first", _shifted(lambda k, K: 2 * (K - 1 - k), backward_first=True))


def rounds(sweep: bool = False) -> Order:
    """Rounds on auxiliary variables: Jacobi (all blocks at once), or a right-to-left `sweep`."""
    return Order(f"rounds(sweep={sweep})", _cycle(*("EFABS" if sweep else "EFBSA")))


def gpipe(M: int) -> Order:
    """All `M` forwards of a minibatch, then all backwards, then one step (Huang et al. 2019)."""
    return Order(f"gpipe({M})", lambda k, K: _groups(M, M))


def one_f_one_b_flush(M: int) -> Order:
    """1F1B within a minibatch of `M` micro-batches, then one step: exact gradient (PipeDream-Flush)."""
    return Order(f"one_f_one_b_flush({M})", lambda k, K: _groups(M, min(M, K - k)))


def _groups(M: int, ahead: int) -> Iterator[Op]:
    for first in itertools.count(0, M):
        forwards = iter(range(first, first + M))
        yield from (Op("F", n) for n in itertools.islice(forwards, ahead))
        for n in range(first, first + M):
            yield Op("B", n)
            yield from (Op("F", m) for m in itertools.islice(forwards, 1))
        yield S


def truncated(reach: int) -> Order:
    """Each objective reaches `reach` blocks down: one I per gradient that travels on, the rest meets in W.

    Objectives sit on blocks reach-1 .. K-1; block k hears those of blocks j in [max(k, reach-1), min(k+reach-1, K-1)]
    and passes on those with j <= k+reach-2.
    """

    def rule(k: int, K: int) -> Iterator[Op]:
        heard = objectives(k, K, reach)
        relayed = [j for j in heard if k > 0 and j <= k + reach - 2]
        fused = len(heard) == 1 and len(relayed) == len(heard)
        for n in itertools.count():
            yield Op("F", n)
            yield from [Op("B", n)] if fused else [*(Op("I", n) for _ in relayed), Op("W", n)]
            yield S

    return Order(f"truncated({reach})", rule)


def objectives(k: int, K: int, reach: int) -> range:
    """The blocks whose objective reaches the parameters of block `k` when gradients travel `reach` blocks."""
    reach = min(reach, K)
    return range(max(k, reach - 1), min(k + reach - 1, K - 1) + 1)


def free(credit: Callable[[int, int], int] | int | None = None) -> Order:
    """Take whatever has arrived, Down before Up, with at most `credit(k, K)` passes unanswered (default K-k)."""
    if isinstance(credit, int):
        return Order(f"free({credit})", credit=lambda k, K: credit)
    return Order("free" if credit is None else "free(custom)", credit=credit or (lambda k, K: K - k))


def versions(operations: Iterable[Op], batch: int) -> tuple[int, int]:
    """(own updates before F of `batch`, own updates before its B or W), counted from the operations alone."""
    steps = forward = 0
    for op in operations:
        if op.kind == "S":
            steps += 1
        elif op.batch == batch and op.kind == "F":
            forward = steps
        elif op.batch == batch and op.kind in "BW":
            return forward, steps
    raise ValueError(f"the operations hold no backward of pass {batch}")


def _profile(order: Order, k: int, K: int) -> tuple[int, int]:
    """(most passes in flight, delay) read off the first few thousand operations."""
    late = 6 * K + 64
    ops = list(itertools.takewhile(lambda op: op.batch <= late, order.operations(k, K)))
    held = itertools.accumulate({"F": 1, "B": -1, "W": -1}.get(op.kind, 0) for op in ops)
    forward, backward = versions(ops, max(op.batch for op in ops if op.kind in "BW"))
    return max(held), backward - forward
