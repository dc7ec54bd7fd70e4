"""Orders: the golden vectors of the notes, what every order must satisfy, and the text it prints and parses."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoupled import order as orders
from decoupled.errors import UserError
from decoupled.order import (
    Order,
    accumulate,
    admitting,
    explicit,
    free,
    gpipe,
    objectives,
    one_f_one_b_flush,
    parse,
    pinned,
    queues,
    rounds,
    truncated,
    two_buffered,
    zero_bubble,
)
from decoupled.plan import ANY, FixedPlan, FreePlan, Op, S, versions

DELAYED = {
    "sync": orders.sync,
    "local": orders.local,
    "answered": orders.answered,
    "lockstep": orders.lockstep,
    "one_f_one_b": orders.one_f_one_b,
    "tick": orders.tick,
    "tick_backward_first": orders.tick_backward_first,
}
GROUPED = {f"{make.__name__}({M})": make(M) for make in (gpipe, one_f_one_b_flush) for M in (1, 2, 4)}
ACCUMULATED = {f"accumulate(tick, {M})": accumulate(orders.tick, M) for M in (1, 2, 3)}
ACCUMULATED |= {f"two_buffered({M})": two_buffered(M) for M in (1, 3)}
SPLIT = {f"zero_bubble({M})": zero_bubble(M) for M in (1, 2, 5)}
OTHERS = {f"queues({n})": queues(n) for n in (1, 3)} | SPLIT | ACCUMULATED
OTHERS |= {f"admitting({n})": admitting(n) for n in (1, 2, 4)}
OTHERS |= {"pinned": pinned(orders.one_f_one_b, lambda K: K - 1)}
OTHERS |= {f"truncated({n})": truncated(n) for n in (1, 2, 3, 9)} | {"rounds": rounds(), "sweep": rounds(sweep=True)}
ALL = DELAYED | GROUPED | OTHERS
every_order = pytest.mark.parametrize("order", ALL.values(), ids=ALL)
places = st.integers(1, 6).flatmap(lambda K: st.tuples(st.integers(0, K - 1), st.just(K)))


def golden(name, k, K):
    """Updates between forward and backward of one batch: the table of notes/methods.md 1.2, typed in."""
    d = K - 1 - k
    return {"sync": 0, "local": 0, "answered": 0, "lockstep": d, "one_f_one_b": d, "tick": 2 * d}.get(
        name, max(0, 2 * d - 1)
    )


def in_flight(name, k, K):
    d = K - 1 - k
    return {"sync": 1, "local": 1, "answered": 1, "lockstep": d + 1, "one_f_one_b": d + 1, "tick": 2 * d + 1}.get(
        name, max(1, 2 * d)
    )


# --- golden vectors (B8) ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "vector"),
    [
        ("tick", [(14, 20), (16, 20), (18, 20), (20, 20)]),
        ("tick_backward_first", [(15, 20), (17, 20), (19, 20), (20, 20)]),
        ("lockstep", [(17, 20), (18, 20), (19, 20), (20, 20)]),
        ("one_f_one_b", [(17, 20), (18, 20), (19, 20), (20, 20)]),
        ("sync", [(20, 20)] * 4),
    ],
)
def test_versions_of_batch_20_in_4_blocks(name, vector):
    assert [versions(DELAYED[name].operations(k, 4), 20) for k in range(4)] == vector


@pytest.mark.parametrize("K", range(1, 7))
@pytest.mark.parametrize("name", DELAYED)
def test_versions_for_every_number_of_blocks(name, K):
    for k, batch in itertools.product(range(K), range(25)):
        late = golden(name, k, K)
        assert versions(DELAYED[name].operations(k, K), batch) == (max(0, batch - late), batch)


@pytest.mark.parametrize("K", range(1, 7))
@pytest.mark.parametrize("name", DELAYED)
def test_delay_and_room(name, K):
    for k in range(K):
        assert DELAYED[name].delay(k, K) == golden(name, k, K)
        assert DELAYED[name].in_flight(k, K) == in_flight(name, k, K)


@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_no_pass_is_later_than_its_admission_allows(n):
    """B7: never more than min(n, K-k) - 1 updates at block k; K and more are 1F1B, one is backpropagation."""
    for K in range(1, 7):
        late = [admitting(n).delays(k, K) for k in range(K)]
        assert late == [[math.ceil(min(n, K) * (K - k) / K) - 1] for k in range(K)]
        for k in range(K):
            assert late[k][0] <= min(n, K - k) - 1
            assert admitting(n).in_flight(k, K) == late[k][0] + 1
            assert n < K or admitting(n).text(k, K, 9) == orders.one_f_one_b.text(k, K, 9)
    assert [admitting(3).delay(k, 8) for k in range(8)] == [2, 2, 2, 1, 1, 1, 0, 0]
    assert admitting(1).text(0, 4, 9) == orders.sync.text(0, 4, 9)
    with pytest.raises(UserError, match="at least 1 pass must be admitted, got 0"):
        admitting(0)


def test_lockstep_and_asynchronous_1f1b_are_the_same_operations():
    for blocks in range(1, 7):
        for k in range(blocks):
            assert orders.lockstep.text(k, blocks, 9) == orders.one_f_one_b.text(k, blocks, 9)


@pytest.mark.parametrize(
    ("order", "texts"),
    [
        (orders.sync, ["F0 B0 S F1 B1 S F2 B2 S"] * 3),
        (orders.lockstep, ["F0 F1 F2 B0 S B1 S B2 S", "F0 F1 B0 S F2 B1 S B2 S", "F0 B0 S F1 B1 S F2 B2 S"]),
        (
            orders.tick_backward_first,
            ["F0 F1 F2 B0 S B1 S B2 S", "F0 F1 B0 S F2 B1 S B2 S", "F0 B0 S F1 B1 S F2 B2 S"],
        ),
        (orders.answered, ["F0 B0 S A0 F1 B1 S A1 F2 B2 S A2"] * 3),
        (gpipe(2), ["F0 F1 B0 B1 S F2 B2 S"] * 3),
        (one_f_one_b_flush(3), ["F0 F1 F2 B0 B1 B2 S", "F0 F1 B0 F2 B1 B2 S", "F0 B0 F1 B1 F2 B2 S"]),
        (
            zero_bubble(3),
            ["F0 F1 F2 I0 W0 I1 W1 I2 W2 S", "F0 F1 I0 F2 I1 W0 I2 W1 W2 S", "F0 I0 F1 I1 F2 I2 W0 W1 W2 S"],
        ),
        (accumulate(orders.tick, 3), ["F0 F1 F2 B0 B1 B2 S", "F0 F1 F2 B0 B1 B2 S", "F0 B0 F1 B1 F2 B2 S"]),
        (two_buffered(2), ["F0 F1 F2 B0 B1 S B2 S", "F0 F1 B0 F2 B1 S B2 S", "F0 B0 F1 B1 S F2 B2 S"]),
        (queues(3), ["F0 F1 F2 B0 S B1 S B2 S", "F0 F1 F2 B0 S B1 S B2 S", "F0 B0 S F1 B1 S F2 B2 S"]),
        (truncated(1), ["F0 W0 S F1 W1 S F2 W2 S"] * 3),
        (
            truncated(2),
            ["F0 W0 S F1 W1 S F2 W2 S", "F0 I0 W0 S F1 I1 W1 S F2 I2 W2 S", "F0 B0 S F1 B1 S F2 B2 S"],
        ),
        (rounds(), ["E0 F0 B0 S A0 E1 F1 B1 S A1 E2 F2 B2 S A2"] * 3),
        (rounds(sweep=True), ["E0 F0 A0 B0 S E1 F1 A1 B1 S E2 F2 A2 B2 S"] * 3),
    ],
    ids=str,
)
def test_three_batches_through_three_blocks(order, texts):
    assert [order.text(k, 3, 3) for k in range(3)] == texts


# --- what every order must satisfy --------------------------------------------------------------------------------


@every_order
@given(place=places, batches=st.integers(0, 12))
def test_every_pass_goes_forward_once_and_is_closed_once_and_stepped_for(order, place, batches):
    text = order.text(*place, batches).split()
    for kind in "FE":
        found = [int(op[1:]) for op in text if op[0] == kind]
        assert found in ([], list(range(batches)))
    assert [int(op[1:]) for op in text if op[0] == "F"] == list(range(batches))
    assert [int(op[1:]) for op in text if op[0] in "BW"] == list(range(batches))
    for n in range(batches):
        closed = next(i for i, op in enumerate(text) if op in (f"B{n}", f"W{n}"))
        assert text.index(f"F{n}") < closed
        assert "S" in text[closed:]
        assert all(text.index(f"F{n}") < i < closed for i, op in enumerate(text) if op == f"I{n}")
    owed = False  # no step without a gradient
    for op in text:
        assert op != "S" or owed
        owed = (owed or op[0] in "BW") and op != "S"


@every_order
@given(place=places, batches=st.integers(1, 12))
def test_a_short_run_is_a_long_one_with_the_later_passes_left_out(order, place, batches):
    """The end of a run is no special case: the passes that exist meet the same versions."""
    short, long = (parse(order.text(*place, n)) for n in (batches, 40))
    for n in range(batches):
        assert versions(short, n) == versions(long, n)


@every_order
@given(place=places)
def test_text_is_parsed_back(order, place):
    text = order.text(*place, 7)
    assert " ".join(map(str, parse(text))) == text


@every_order
@given(place=places)
def test_adjacent_is_that_nothing_lies_between_a_forward_and_the_last_of_its_backward(order, place):
    ops = [(op.kind, op.batch) for op in parse(order.text(*place, 40)) if op.kind in "FBIWS"]
    alone = []
    for n in range(40):
        start, end = (
            next(i for i, op in enumerate(ops) if op in found) for found in ([("F", n)], [("B", n), ("W", n)])
        )
        alone.append({batch for _, batch in ops[start : end + 1]} == {n})
    assert order.adjacent(*place) == (all(alone) and not order.delay(*place))


def test_what_is_written_by_hand_is_not_called_adjacent():
    """It may change after its first passes."""
    order = orders.explicit(["F0 B0 S F1 B1 S F2 B2 S F3 F4 B3 S B4 S"])
    assert not order.adjacent(0, 1) and order.in_flight(0, 1) == 1


@every_order
@given(place=places)
def test_the_room_an_order_asks_for_is_the_most_it_uses(order, place):
    held = list(
        itertools.accumulate({"F": 1, "B": -1, "W": -1}.get(op.kind, 0) for op in parse(order.text(*place, 40)))
    )
    assert max(held) == order.in_flight(*place)
    assert held[-1] == 0


@pytest.mark.parametrize("M", [1, 2, 5, 8])
def test_grouped_orders_step_once_per_minibatch_and_are_never_late(M):
    for make, K in itertools.product((gpipe, one_f_one_b_flush), range(1, 6)):
        for k in range(K):
            order = make(M)
            text = order.text(k, K, 3 * M).split()
            assert [i for i, op in enumerate(text) if op == "S"] == [(g + 1) * (2 * M + 1) - 1 for g in range(3)]
            assert order.delay(k, K) == 0
            assert order.in_flight(k, K) == (M if make is gpipe else min(M, K - k))


def met(order, k, K, batch):
    """(steps that the weights of the forward have seen, steps before the backward)."""
    forward, backward = versions(order.operations(k, K), batch)
    return (forward if order.sees is None else order.sees(k, K, batch)), backward


@pytest.mark.parametrize(
    ("order", "vector"),
    [
        # the arithmetic: backward of pass 20 sees 20 // M steps, its forward (20 - 2(K-1-k)) // M
        (accumulate(orders.tick, 1), [(14, 20), (16, 20), (18, 20), (20, 20)]),
        (accumulate(orders.tick, 2), [(7, 10), (8, 10), (9, 10), (10, 10)]),
        (accumulate(orders.tick, 4), [(3, 5), (4, 5), (4, 5), (5, 5)]),
        (two_buffered(4), [(4, 5)] * 4),
        (two_buffered(3), [(5, 6)] * 4),
        (two_buffered(1), [(17, 20)] * 4),
        (pinned(orders.one_f_one_b, lambda K: K - 1), [(17, 20)] * 4),
        (queues(3), [(11, 20), (14, 20), (17, 20), (20, 20)]),
    ],
    ids=str,
)
def test_versions_of_pass_20_in_4_blocks(order, vector):
    assert [met(order, k, 4, 20) for k in range(4)] == vector


@pytest.mark.parametrize("M", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("K", range(1, 7))
def test_accumulation_divides_the_delay(K, M):
    """B10: every pass of the steady state is floor or ceil of D / M updates late, on average D / M."""
    order = accumulate(orders.tick, M)
    for k in range(K):
        late = 2 * (K - 1 - k)
        assert len(order.delays(k, K)) == M
        assert set(order.delays(k, K)) == {late // M, -(-late // M)}
        assert sum(order.delays(k, K)) == late
        assert order.in_flight(k, K) == late + 1


@pytest.mark.parametrize("K", range(1, 7))
def test_two_buffers_do_from_k_minus_1_micro_batches_on(K):
    """B6: every gradient is one update late, in all blocks; a forward never wants weights that are not there yet."""
    for M, k in itertools.product(range(1, 8), range(K)):
        order = two_buffered(M)
        assert order.sees is not None
        assert set(order.delays(k, K)) == {-(-(K - 1) // M)}
        for n in range(60):
            assert order.sees(k, K, n) <= versions(order.operations(k, K), n)[0]
        steps = 0
        alive = []  # versions that exist or are needed again, today's included
        for op in parse(order.text(k, K, 12 * M)):
            steps += op.kind == "S"
            if op.kind == "F":
                alive.append(steps - order.sees(k, K, op.batch) + 1)
        assert max(alive) <= 1 + -(-(K - 1) // M)


@pytest.mark.parametrize("M", [1, 2, 4, 9])
@pytest.mark.parametrize("K", range(1, 6))
def test_split_backwards_hold_no_more_than_1f1b_at_the_bottom(K, M):
    for k in range(K):
        assert zero_bubble(M).in_flight(k, K) == min(M, K) == one_f_one_b_flush(M).in_flight(0, K)
        assert zero_bubble(M).delays(k, K) == [0] * M


def test_what_cannot_be_accumulated_or_queued():
    with pytest.raises(UserError, match="accumulated over at least 1 micro-batch, got 0"):
        accumulate(orders.tick, 0)
    wrongs: list[Any] = [(0,), (), (2, 0), (1.5,)]
    for wrong in wrongs:
        with pytest.raises(UserError, match="queues need lengths of at least 1, got"):
            queues(*wrong)


def test_every_edge_may_have_a_queue_of_its_own():
    """From below; the last length is that of all edges above."""
    assert [queues(3, 1).delay(k, 4) for k in range(4)] == [5, 2, 1, 0]
    assert [queues(2, 2, 2).text(k, 4, 6) for k in range(4)] == [queues(2).text(k, 4, 6) for k in range(4)]
    assert str(queues(3, 1)) == "queues(3, 1)"


# --- truncated ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", range(1, 7))
@pytest.mark.parametrize("reach", range(1, 8))
def test_every_objective_reaches_down_as_far_as_its_reach(K, reach):
    """There are K - reach + 1 objectives (at least one), each heard by `reach` blocks; every block hears one."""
    n = min(reach, K)
    heard = {k: set(objectives(k, K, reach)) for k in range(K)}
    for j in range(K):
        assert {k for k in heard if j in heard[k]} == (set(range(j - n + 1, j + 1)) if j >= n - 1 else set())
    assert all(heard.values())
    assert len(set().union(*heard.values())) == K - n + 1


@pytest.mark.parametrize("K", range(1, 7))
@pytest.mark.parametrize("reach", range(1, 8))
def test_a_block_sends_down_one_gradient_per_objective_heard_below(K, reach):
    for k in range(1, K):
        sent = [op for op in parse(truncated(reach).text(k, K, 1)) if op.kind in "BI"]
        assert len(sent) == len([j for j in objectives(k - 1, K, reach) if j >= k])


# --- plans --------------------------------------------------------------------------------------------------------


def test_a_fixed_plan_ends_where_the_passes_end_even_if_it_hears_of_it_late():
    plan = FixedPlan(orders.lockstep.operations(0, 3))
    for text in ("F0", "F1"):
        assert [str(op) for op in plan.options()] == [text]
        plan.done(plan.options()[0])
    plan.end(2)
    rest = []
    while options := plan.options():
        rest.append(str(options[0]))
        plan.done(options[0])
    assert rest == ["B0", "S", "B1", "S"]
    assert plan.finished


def test_a_plan_without_passes_does_nothing():
    for order in [*ALL.values(), free()]:
        plan = order.plan(0, 3)
        plan.end(0)
        assert plan.finished
        assert plan.options() == ()


def test_a_free_plan_answers_before_it_takes_new_work_and_keeps_its_credit():
    plan = FreePlan(2)
    back, fore = Op("B", ANY), Op("F", ANY)
    assert plan.options() == (fore,)
    plan.done(fore)
    assert plan.options() == (back, fore)
    plan.done(fore)
    assert plan.options() == (back,)
    plan.done(back)
    assert plan.options() == (S,)
    plan.done(S)
    assert plan.options() == (back, fore)


def test_a_free_plan_ends_with_the_last_pass_even_if_it_hears_of_the_end_before():
    plan = FreePlan(2)
    back, fore = Op("B", ANY), Op("F", ANY)
    plan.end(2)
    for op in (fore, back, S):
        assert op in plan.options()
        plan.done(op)
    assert not plan.finished
    plan.done(fore)
    assert plan.options() == (back,)
    plan.done(back)
    assert not plan.finished
    plan.done(S)
    assert plan.finished
    assert plan.options() == ()


def test_credit_of_free_orders():
    assert [free().in_flight(k, 4) for k in range(4)] == [4, 3, 2, 1]
    assert free(3).in_flight(0, 4) == 3
    assert free(lambda k, K: K + k).in_flight(1, 4) == 5
    assert [str(order) for order in (free(), free(3), free(lambda k, K: 1))] == ["free", "free(3)", "free(custom)"]
    with pytest.raises(UserError, match="credit of at least 1, got 0"):
        free(0).plan(0, 2)
    with pytest.raises(ValueError, match="decided by arrivals"):
        free().operations(0, 2)


# --- text ---------------------------------------------------------------------------------------------------------

ops = st.builds(Op, st.sampled_from("FBIWEA"), st.integers(0, 999)) | st.just(S)


@given(st.lists(ops))
def test_operations_print_and_parse(found):
    assert parse(" ".join(map(str, found))) == found


@pytest.mark.parametrize("word", ["F", "S3", "X1", "F-1", "f0", "F0,", "F1.0", "B0S", "F*"])
def test_what_is_no_operation_is_named(word):
    with pytest.raises(UserError, match="is not an operation") as caught:
        parse(f"F0 {word} S")
    assert repr(word) in str(caught.value)


def test_an_explicit_order_is_what_was_written():
    texts = ["F0 F1 B0 S B1 S", "F0 B0 S F1 B1 S"]
    order = explicit(texts)
    assert [order.text(k, 2, 2) for k in range(2)] == texts
    with pytest.raises(UserError, match="written for 2 blocks, the network has 3"):
        order.operations(0, 3)


def test_an_explicit_order_knows_its_room_and_delay():
    order = explicit(["F0 F1 B0 S B1 S", "F0 B0 S F1 B1 S"])
    assert [order.in_flight(k, 2) for k in range(2)] == [2, 1]
    assert [order.delay(k, 2) for k in range(2)] == [1, 0]


def test_versions_need_a_backward():
    with pytest.raises(ValueError, match="no backward of pass 1"):
        versions(parse("F0 B0 S F1"), 1)


def test_an_order_prints_its_name():
    assert isinstance(gpipe(3), Order)
    assert [str(o) for o in (gpipe(3), one_f_one_b_flush(2), truncated(4), rounds())] == [
        "gpipe(3)", "one_f_one_b_flush(2)", "truncated(4)", "rounds(sweep=False)",
    ]  # fmt: skip
