"""Orders: the sequence of operations of one block, as data.

    F3  forward of pass 3: take the input (Up), run the block, send Up
    B3  backward of pass 3: take Down where the coupling sends one, run the vector-Jacobian product, send Down
    I3, W3  the two halves of B3: input gradient (send Down) and weight gradient (zero-bubble and truncated orders)
    S   optimizer step
    E3  emit: send Up for pass 3 from what is stored, before the block itself has run (auxiliary variables)
    A3  answer: take what nobody has waited for, Down of pass 3 (or Up), and learn from it: a variable, a guess

An order is a pure function of (k, K): block k of K. It decides the *delay*, the number of own updates between F and B:

    order                 block k                                          delay            in flight
    sync                  F0 B0 S F1 B1 S ...                              0                1
    local                 F0 B0 S F1 B1 S ... (no Down is waited for)      0                1
    gpipe(M)              F0 .. F[M-1] B0 .. B[M-1] S ...                  0                M
    one_f_one_b_flush(M)  K-1-k forwards, then B F alternating, S per M    0                min(M, K-k)
    answered              F0 B0 S A0 F1 B1 S ... (A takes the answer)      0                1
    lockstep              F t, then B [t-(K-1-k)], S                       K-1-k            K-k
    one_f_one_b           the same operations, read as 1F1B                K-1-k            K-k
    admitting(n)          1F1B, n passes spread evenly over K blocks       ceil(n(K-k)/K)-1 ceil(n(K-k)/K)
    tick                  F t, then B [t-2(K-1-k)], S                      2(K-1-k)         2(K-1-k)+1
    tick_backward_first   B [t-2(K-1-k)], S, then F t                      2(K-1-k)-1 (>=0) max(1, 2(K-1-k))
    queues(length)        F t, then B [t-length(K-1-k)], S                 length(K-1-k)    length(K-1-k)+1
    accumulate(order, M)  the operations of `order`, one S per M passes    ceil, floor of delay/M    as `order`
    pinned(order, lag)    the same operations; forwards see older weights  lag(K)           as `order`
    two_buffered(M)       1F1B, S per M, forwards see the version before   ceil((K-1)/M)    K-k
    zero_bubble(M)        1F1B per M of F and I; W fills the gaps, then S  0                min(M, K)
    truncated(reach)      F0 I0 .. W0 S ...                                0                1
    rounds(sweep)         E0 F0 B0 S A0 ...   (sweep: E0 F0 A0 B0 S ...)   0                1
    free(credit)          whatever has arrived, Down before Up             measured         credit(k, K)

A forward sees the newest weights unless the order says that it sees fewer steps (`sees`: vertical sync, two buffers).

Sources: Huo et al. 2018 (lockstep), Narayanan et al. 2019 (1F1B), 2021 (double buffers), Zhuang et al. 2021 (ticks),
Xu et al. 2020 (queues), Huang et al. 2019 (GPipe), Qi et al. 2024 (zero bubble), Gaunt et al. 2017 (free), Chen et al.
2026 (admission; in AMDP, which fills the time that it leaves with pipelines in other directions).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from decoupled.errors import UserError
from decoupled.plan import FixedPlan, FreePlan, Op, S, parse, walk

Rule = Callable[[int, int], Iterator[Op]]


@dataclass(frozen=True)
class Order:
    """An order of operations: `rule(k, K)` yields the operations of block k without end.

    `credit(k, K)` is set for free orders only (then there is no rule): the most passes a block holds unanswered.
    `sees(k, K, n)`: how many S of this run the weights of forward n have seen; None: all. `period`: passes per S.
    `phases(epoch)` is set where the order changes from epoch to epoch, `epochs` are enough to see all of it.
    """

    name: str
    rule: Rule | None = None
    credit: Callable[[int, int], int] | None = None
    sees: Callable[[int, int, int], int] | None = None
    period: int = 1
    phases: Callable[[int], Order] | None = None
    epochs: int = 1
    ends: bool = False  # written out for so many passes

    def __str__(self) -> str:
        return self.name

    def at(self, epoch: int) -> Order:
        """The order of one epoch (0, 1, ...)."""
        return self if self.phases is None else self.phases(epoch)

    def operations(self, k: int, K: int) -> Iterator[Op]:
        """The endless operations of block `k` of `K`; a free order has none (ValueError)."""
        if self.rule is None:
            raise ValueError(f"order {self.name} is decided by arrivals; it has no fixed operations")
        return self.rule(k, K)

    def plan(self, k: int, K: int) -> FixedPlan | FreePlan:
        """A fresh plan for one run of block `k` of `K`."""
        return FixedPlan(self.operations(k, K)) if self.credit is None else FreePlan(self.credit(k, K))

    def text(self, k: int, K: int, batches: int) -> str:
        """The complete operations of block `k` for a run of `batches` passes, e.g. ``"F0 F1 B0 S B1 S"``."""
        plan = self.plan(k, K)
        plan.end(batches)
        return " ".join(map(str, walk(plan)))

    def in_flight(self, k: int, K: int) -> int:
        """The most passes that block `k` holds between F and B (or W)."""
        return _profile(self, k, K)[0] if self.credit is None else self.credit(k, K)

    def delays(self, k: int, K: int) -> list[int]:
        """Own updates between F and B of each pass of one period in the steady state (free: at most this many)."""
        return [self.credit(k, K) - 1] if self.credit is not None else _profile(self, k, K)[1]

    def delay(self, k: int, K: int) -> int:
        """The most own updates between F and B of one pass in the steady state."""
        return max(self.delays(k, K))

    def adjacent(self, k: int, K: int) -> bool:
        """Whether the backward of a pass always comes right behind its forward (not said of an order that `ends`)."""
        return not (self.ends or self.phases or self.rule is None) and _profile(self, k, K) == (1, [0] * self.period)


def explicit(texts: Sequence[str]) -> Order:
    """An order written out by hand, one text per block."""
    plans = [parse(text) for text in texts]

    def rule(k: int, K: int) -> Iterator[Op]:
        if len(plans) != K:
            raise UserError(f"the explicit order is written for {len(plans)} blocks, the network has {K}")
        return iter(plans[k])

    return Order("explicit", rule, ends=True)


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


def _answered(k: int, K: int) -> Iterator[Op]:
    for n in itertools.count():
        yield from [Op("A", n - 1)] if n else []
        yield from (Op("F", n), Op("B", n), S)


answered = Order("answered", _answered)
lockstep = Order("lockstep", _shifted(lambda k, K: K - 1 - k))
one_f_one_b = Order("one_f_one_b", _shifted(lambda k, K: K - 1 - k))
tick = Order("tick", _shifted(lambda k, K: 2 * (K - 1 - k)))
tick_backward_first = Order("tick_backward_first", _shifted(lambda k, K: 2 * (K - 1 - k), backward_first=True))


def admitting(n: int) -> Order:
    """1F1B that lets at most `n` passes in before the first has come back: less staleness, and less work at once.

    They keep their distance: a block goes ahead by as many forwards as its share of the way there and back holds, so
    that no backward waits for a pass that has not been let in.
    """
    if not isinstance(n, int) or n < 1:
        raise UserError(f"at least 1 pass must be admitted, got {n}")
    return Order(f"admitting({n})", _shifted(lambda k, K: -(-min(n, K) * (K - k) // K) - 1))


def queues(*lengths: int) -> Order:
    """A forward and a backward per tick; a pass spends so many ticks on an edge (from below; the last: all above)."""
    if not lengths or not all(isinstance(n, int) and n >= 1 for n in lengths):
        raise UserError(f"queues need lengths of at least 1, got {lengths}: one activation up, one gradient down")
    late = lambda k, K: sum(lengths[min(edge, len(lengths) - 1)] for edge in range(k, K - 1))  # noqa: E731
    return Order(f"queues({', '.join(map(str, lengths))})", _shifted(late))


def accumulate(order: Order, M: int) -> Order:
    """The operations of `order` with one step per `M` passes."""
    if M < 1:
        raise UserError(f"gradients are accumulated over at least 1 micro-batch, got {M}")

    def rule(k: int, K: int) -> Iterator[Op]:
        closed = 0
        for op in order.operations(k, K):
            closed += op.kind in "BW"
            if op.kind != "S" or closed % M == 0:
                yield op

    return order if M == 1 else Order(f"accumulate({order}, {M})", rule, sees=order.sees, period=M * order.period)


def pinned(order: Order, lag: Callable[[int], int]) -> Order:
    """All blocks run a pass with the weights of one moment: forwards see `lag(K)` steps fewer than passes are begun."""
    return replace(
        order, name=f"pinned({order})", sees=lambda k, K, n: max(0, n // order.period - lag(K))
    )  # fmt: skip


def two_buffered(M: int) -> Order:
    """1F1B over micro-batches, one step per `M`; forwards see the version before the last (PipeDream-2BW).

    That takes M >= K-1; with fewer micro-batches the weights are ceil((K-1) / M) versions old.
    """
    return replace(pinned(accumulate(one_f_one_b, M), lambda K: -((K - 1) // -M)), name=f"two_buffered({M})")


def rounds(sweep: bool = False) -> Order:
    """Rounds on auxiliary variables: Jacobi (all blocks at once), or a right-to-left `sweep`."""
    return Order(f"rounds(sweep={sweep})", _cycle(*("EFABS" if sweep else "EFBSA")))


def gpipe(M: int) -> Order:
    """All `M` forwards of a minibatch, then all backwards, then one step (Huang et al. 2019)."""
    return Order(f"gpipe({M})", lambda k, K: _groups(M, M), period=M)


def one_f_one_b_flush(M: int) -> Order:
    """1F1B within a minibatch of `M` micro-batches, then one step: exact gradient (PipeDream-Flush)."""
    return Order(f"one_f_one_b_flush({M})", lambda k, K: _groups(M, min(M, K - k)), period=M)


def zero_bubble(M: int) -> Order:
    """1F1B with flush whose backward is split: I sends the gradient down, W of block k waits for k more of them.

    What waits fills the gaps at the end of a minibatch; block k holds min(M, K) passes, as block 0 of 1F1B does.
    """
    return Order(f"zero_bubble({M})", lambda k, K: _groups(M, min(M, K - k), k), period=M)


def _groups(M: int, ahead: int, late: int | None = None) -> Iterator[Op]:
    """Minibatches of `M` passes, `ahead` forwards first; `late`: split backwards, W follows `late` I's behind."""
    for first in itertools.count(0, M):
        forwards = iter(range(first, first + M))
        yield from (Op("F", n) for n in itertools.islice(forwards, ahead))
        for n in range(first, first + M):
            if late is None:
                yield Op("B", n)
            else:
                yield Op("I", n)
                yield from [Op("W", n - late)] if n - late >= first else []
            yield from (Op("F", m) for m in itertools.islice(forwards, 1))
        yield from (Op("W", n) for n in range(first + max(0, M - (late or 0)), first + M) if late)
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


def _profile(order: Order, k: int, K: int) -> tuple[int, list[int]]:
    """(most passes in flight, delays of the passes of one period), read off the operations up to the steady state.

    Steady: the second period whose forwards have seen a step; of an order that ends before, its last pass.
    """
    steps = held = most = 0
    forward: dict[int, int] = {}
    delays: deque[int] = deque(maxlen=order.period)
    first: int | None = None  # pass of the first period of interest
    for op in order.operations(k, K):
        if op.kind == "S":
            steps += 1
        elif op.kind == "F":
            held += 1
            most = max(most, held)
            forward[op.batch] = steps if order.sees is None else order.sees(k, K, op.batch)
            if first is None and forward[op.batch] and op.batch % order.period == 0:
                first = op.batch + order.period
        elif op.kind in "BW":
            held -= 1
            delays.append(steps - forward.pop(op.batch))
            if first is not None and op.batch == first + order.period - 1:
                break
    return most, list(delays)
