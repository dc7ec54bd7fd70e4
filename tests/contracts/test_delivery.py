"""What every runtime promises about messages: matched by key, nothing lost, everything bounded, loops allowed."""

import itertools

import pytest

from decoupled.errors import ProtocolError, StallError
from decoupled.messages import Message
from decoupled.runtime.contract import Mailbox, Observer

pytestmark = pytest.mark.timeout(60)


def test_messages_meet_by_key_and_not_by_order_of_arrival(runtime, fakes):
    def joiner(seen):
        for key in (2, 0, 1):
            left, right = yield fakes.want("left", "right", key=key)
            seen.append((left.key, right.key))

    join = fakes.actor("join", joiner)
    actors = [fakes.sender("a", [0, 1, 2]), fakes.sender("b", [2, 1, 0]), join]
    runtime.run(fakes.graph(actors, ("a", "out", "join", "left", 3), ("b", "out", "join", "right", 3)))
    assert join.seen == [(2, 2), (0, 0), (1, 1)]


def test_a_want_without_a_key_takes_any_key_that_all_its_ports_hold(runtime, fakes):
    def joiner(seen):
        for _ in range(3):
            left, right = yield fakes.want("left", "right")
            seen.append((left.key, right.key))

    join = fakes.actor("join", joiner)
    actors = [fakes.sender("a", [7, 0, 1, 2]), fakes.sender("b", [2, 1, 0]), join]
    runtime.run(fakes.graph(actors, ("a", "out", "join", "left", 4), ("b", "out", "join", "right", 3)))
    assert sorted(join.seen) == [(0, 0), (1, 1), (2, 2)]  # 7 has no partner and is left where it is


def test_keys_are_any_hashable_state(runtime, fakes):
    take = fakes.receiver("b", 2)
    keys = [("node", 3, frozenset({1})), "end"]
    runtime.run(fakes.graph([fakes.sender("a", keys), take], ("a", "out", "b", "in", 1)))
    assert take.seen == keys


def test_the_first_want_that_can_be_met_is_taken(runtime, fakes):
    def script(seen):
        yield fakes.now
        for out in ("low", "high"):
            yield out, 1
            yield out, 2
        yield fakes.want("low", "high", key=2)  # when the second ones are here, so are the first
        (message,) = yield [fakes.want("none"), fakes.want("high"), fakes.want("low")]
        seen.append(("high", message.key))
        (message,) = yield [fakes.want("none"), fakes.want("high"), fakes.want("low")]
        seen.append(("low", message.key))

    one = fakes.actor("one", script)
    ports = [("one", port, "one", port, 2) for port in ("low", "high", "none")]
    runtime.run(fakes.graph([one], *ports))
    assert one.seen == [("high", 1), ("low", 1)]


def test_messages_of_one_edge_keep_their_order(runtime, fakes):
    take = fakes.receiver("b", 50)
    runtime.run(fakes.graph([fakes.sender("a", range(50)), take], ("a", "out", "b", "in", 3)))
    assert take.seen == list(range(50))


def test_an_out_may_have_many_edges_or_none(runtime, fakes):
    takers = [fakes.receiver(name, 5) for name in ("b", "c")]
    actors = [fakes.sender("a", range(5)), fakes.sender("deaf", range(5), out="nowhere"), *takers]
    runtime.run(fakes.graph(actors, ("a", "out", "b", "in", 1), ("a", "out", "c", "in", 2)))
    assert [taker.seen for taker in takers] == [list(range(5))] * 2


def test_an_actor_may_send_to_itself(runtime, fakes):
    def countdown(seen):
        yield fakes.now
        yield "again", 5
        while True:
            (message,) = yield fakes.want("in")
            seen.append(message.key)
            if not message.key:
                return
            yield "again", message.key - 1

    loop = fakes.actor("loop", countdown)
    runtime.run(fakes.graph([loop], ("loop", "again", "loop", "in", 1)))
    assert loop.seen == [5, 4, 3, 2, 1, 0]


def test_a_token_goes_round_a_ring_until_it_is_used_up(runtime, fakes):
    def member(first):
        def script(seen):
            if first:
                yield fakes.now
                yield "next", 10
            while True:
                (message,) = yield fakes.want("in")
                seen.append(message.key)
                if message.key > -3:  # one turn below 0 tells everybody to leave
                    yield "next", message.key - 1
                if message.key <= 0:
                    return

        return script

    ring = [fakes.actor(name, member(name == "a")) for name in "abc"]
    edges = [(x.name, "next", y.name, "in", 1) for x, y in zip(ring, ring[1:] + ring[:1], strict=True)]
    runtime.run(fakes.graph(ring, *edges))
    assert [member.seen for member in ring] == [[8, 5, 2, -1], [10, 7, 4, 1, -2], [9, 6, 3, 0]]


# --- bounds -------------------------------------------------------------------------------------------------------


def flood(fakes, capacity, opened_by):
    """A fast producer, a consumer behind a gate, and the gate, which opens at the producer's operation `opened_by`."""

    def producer(seen):
        for key in range(20):
            yield fakes.now
            seen.append(key)
            yield "tick", key
            yield "out", key

    def gate(seen):
        yield fakes.want("ticks", key=opened_by)
        yield "go", 0
        for _ in range(19):
            yield fakes.want("ticks")

    def consumer(seen):
        yield fakes.want("go")
        for taken in range(20):
            seen.append(len(produce.seen) - taken)  # handed over or waiting
            yield fakes.want("in")

    produce, consume = fakes.actor("producer", producer), fakes.actor("consumer", consumer)
    graph = fakes.graph(
        [produce, fakes.actor("gate", gate), consume],
        ("producer", "tick", "gate", "ticks", 20),
        ("producer", "out", "consumer", "in", capacity),
        ("gate", "go", "consumer", "go", 1),
    )
    return graph, produce, consume


@pytest.mark.parametrize("capacity", [1, 2, 5])
def test_a_producer_can_run_ahead_by_the_capacity_of_the_edge(runtime, fakes, capacity):
    """`capacity` messages wait and one more is in its hand: then it has just told the gate of number `capacity`."""
    graph, produce, consume = flood(fakes, capacity, opened_by=capacity)
    runtime.run(graph)
    assert produce.seen == list(range(20))
    assert max(consume.seen) <= capacity + 2  # one more is on its way into the room that the last take has made


@pytest.mark.parametrize("capacity", [1, 2, 5])
def test_and_not_by_one_more(runtime, fakes, capacity):
    graph, produce, _ = flood(fakes, capacity, opened_by=capacity + 1)
    with pytest.raises(StallError, match=r"producer waits for room on producer\.out->consumer\.in"):
        runtime.run(graph)
    assert len(produce.seen) == capacity + 1


# --- what is reported ---------------------------------------------------------------------------------------------


class Diary(Observer):
    def __init__(self):
        self.operations, self.deliveries, self.takes, self.waits = [], [], [], []
        self.times = {}  # actor -> (start, end) of all it did and waited for, as reported

    def operation(self, actor, operation, start, end):
        self.operations.append((actor, operation, end - start))
        self.times.setdefault(actor, []).append((start, end))

    def delivery(self, edge, message, sent, arrived):
        self.deliveries.append((str(edge), message.key, arrived - sent))

    def taken(self, actor, port, message, time):
        self.takes.append((actor, port, message.key, time))

    def wait(self, actor, what, start, end):
        self.waits.append((actor, what, end - start))
        self.times.setdefault(actor, []).append((start, end))


def test_observers_see_every_operation_and_every_message(runtime, fakes):
    diary = Diary()
    graph = fakes.graph([fakes.sender("a", range(4)), fakes.receiver("b", 4)], ("a", "out", "b", "in", 1))
    timings = runtime.run(graph, [diary])
    assert sorted((actor, operation) for actor, operation, _ in diary.operations) == [("a", "X")] * 4 + [("b", "X")] * 4
    assert [(edge, key) for edge, key, _ in diary.deliveries] == [("a.out->b.in", key) for key in range(4)]
    assert all(seconds >= 0 for *_, seconds in diary.operations + diary.deliveries)
    for name in "ab":
        spent = sum(seconds for actor, _, seconds in diary.operations if actor == name)
        assert timings.busy[name] == pytest.approx(spent)
        assert timings.wait[name] >= 0
        assert timings.busy[name] + timings.wait[name] <= timings.elapsed * (1 + 1e-9)


def test_observers_see_every_message_taken_as_an_operation_begins(runtime, fakes):
    def joiner(seen):
        for key in (1, 0):
            yield fakes.want("left", "right", key=key)
        yield fakes.want("left")

    join, diary = fakes.actor("join", joiner), Diary()
    actors = [fakes.sender("a", [0, 1, 2, 3]), fakes.sender("b", [0, 1]), join]
    edges = [("a", "out", "join", "left", 4), ("b", "out", "join", "right", 2)]
    runtime.run(fakes.graph(actors, *edges), [diary])
    assert [take[:3] for take in diary.takes] == [
        ("join", "left", 1), ("join", "right", 1), ("join", "left", 0), ("join", "right", 0), ("join", "left", 2),
    ]  # fmt: skip
    starts = [start for start, _ in diary.times["join"]]
    assert {time for *_, time in diary.takes} <= set(starts), "a message is taken when an operation begins"


def test_observers_see_what_an_actor_waits_for_between_its_operations(runtime, fakes):
    """Operations and waits of an actor follow each other without overlap, within what the runtime tells."""
    graph, *_ = flood(fakes, 1, opened_by=1)
    diary = Diary()
    timings = runtime.run(graph, [diary])
    for name in ("producer", "gate", "consumer"):
        times = sorted(diary.times[name])
        assert all(a <= b for a, b in times), "no wait ends before it starts"
        assert all(b <= c for (_, b), (c, _) in itertools.pairwise(times)), f"{name} did two things at a time"
        waited = sum(seconds for actor, _, seconds in diary.waits if actor == name)
        assert waited <= timings.wait[name] * (1 + 1e-9)
    assert {what for _, what, _ in diary.waits} == {"messages", "room"}


# --- wiring mistakes ----------------------------------------------------------------------------------------------


def test_a_graph_is_checked_before_anything_runs(fakes):
    a, b = fakes.sender("a", []), fakes.receiver("b", 0)
    with pytest.raises(ProtocolError, match=r"a\.out->b\.in: capacity must be at least 1"):
        fakes.graph([a, b], ("a", "out", "b", "in", 0))
    with pytest.raises(ProtocolError, match=r"not unique.*'a', 'a'"):
        fakes.graph([a, fakes.sender("a", [])])
    with pytest.raises(ProtocolError, match=r"a\.out->c\.in joins an actor that is not in the graph"):
        fakes.graph([a, b], ("a", "out", "c", "in", 1))


def test_a_mailbox_takes_the_first_message_that_fits_and_leaves_the_others(fakes):
    box = Mailbox({"x": 3, "y": 1})
    for port, key in (("x", 5), ("x", 6), ("x", 7), ("y", 6)):
        box.put(port, Message(key))
    assert (box.room("x"), box.room("y")) == (0, 0)
    taken = [box.take([want]) for want in (fakes.want("x", key=9), fakes.want("x", "y", key=5), fakes.want("x", "y"))]
    assert [found and [m.key for m in found[1]] for found in taken] == [None, None, [6, 6]]
    assert box.waiting() == {"x": [5, 7]}
    assert (box.room("x"), box.room("y")) == (1, 1)


def dropping(fakes, capacity, count=6):
    """A sender that never waits, and a receiver beside it that takes nothing before the sender has finished."""

    def late(seen):
        yield fakes.want("go")
        for _ in range(min(capacity, count)):
            (message,) = yield fakes.want("in")
            seen.append(message.key)

    def sender(seen):
        for key in range(count):
            yield fakes.now
            yield "out", key
        yield fakes.now
        yield "go", "now"

    take = fakes.actor("b", late, beside="a")
    edges = ("a", "out", "b", "in", capacity, True), ("a", "go", "b", "go", 1)
    return take, fakes.graph([fakes.actor("a", sender), take], *edges)


@pytest.mark.parametrize("capacity", [1, 2, 9])
def test_an_edge_that_drops_keeps_the_newest_and_never_makes_its_sender_wait(runtime, fakes, capacity):
    take, graph = dropping(fakes, capacity)
    runtime.run(graph)
    assert take.seen == list(range(6))[-capacity:]


def test_what_is_waited_for_is_handed_over_and_not_dropped(runtime, fakes):
    """Every message meets a receiver that waits for it, so that even one slot loses nothing."""

    def sender(seen):
        for key in range(6):
            yield fakes.want("ready")
            yield "out", key

    def receiver(seen):
        for _ in range(6):
            yield fakes.now
            yield "ready", 0
            (message,) = yield fakes.want("in")
            seen.append(message.key)

    take = fakes.actor("b", receiver, beside="a")
    edges = ("a", "out", "b", "in", 1, True), ("b", "ready", "a", "ready", 1)
    runtime.run(fakes.graph([fakes.actor("a", sender), take], *edges))
    assert take.seen == list(range(6))


def test_a_port_drops_or_it_does_not(fakes):
    actors = [fakes.sender("a", [0]), fakes.sender("b", [0]), fakes.receiver("c", 2)]
    with pytest.raises(ProtocolError, match="shares its port"):
        fakes.graph(actors, ("a", "out", "c", "in", 1, True), ("b", "out", "c", "in", 1))


def test_an_edge_that_drops_stays_in_its_process(runtime, fakes):
    """Where the two ends have no common process, that is said; where there is but one, all is well."""
    actors = [fakes.sender("a", [0]), fakes.receiver("b", 1)]
    graph = fakes.graph(actors, ("a", "out", "b", "in", 1, True))
    if hasattr(runtime, "_ranks"):
        with pytest.raises(ProtocolError, match=r"a\.out->b\.in drops messages and leads to another process"):
            runtime.run(graph)
    else:
        runtime.run(graph)
        assert actors[1].seen == [0]
