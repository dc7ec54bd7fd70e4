"""What only the simulator promises: an exact virtual clock, the durations it was given, and the same run each time."""

from collections.abc import Hashable

import pytest

from decoupled.messages import Message
from decoupled.runtime.contract import Edge, Observer
from decoupled.runtime.simulated import Simulated
from decoupled.runtime.timing import Timing


class Clock(Observer):
    def __init__(self):
        self.operations, self.arrivals, self.takes, self.waits = [], [], [], []

    def operation(self, actor, operation, start, end):
        self.operations.append((actor, start, end))

    def delivery(self, edge, message, sent, arrived):
        self.arrivals.append((message.key, sent, arrived))

    def taken(self, actor, port, message, time):
        self.takes.append((actor, port, message.key, time))

    def wait(self, actor, what, start, end):
        if end > start:
            self.waits.append((actor, what, start, end))


def test_operations_and_messages_take_the_time_they_are_given(fakes):
    clock = Clock()
    costs = {"a": 2.0, "b": 5.0}
    runtime = Simulated(cost=lambda actor, operation: costs[actor], latency=lambda edge, message: 0.5)
    graph = fakes.graph([fakes.sender("a", range(3)), fakes.receiver("b", 3)], ("a", "out", "b", "in", 1))
    timings = runtime.run(graph, [clock])
    assert [row for row in clock.operations if row[0] == "b"] == [("b", 2.5, 7.5), ("b", 7.5, 12.5), ("b", 12.5, 17.5)]
    # message 1 finds room at 4, when 0 has been taken; message 2 is ready at 6 and finds room when 1 is taken, at 7.5
    assert clock.arrivals == [(0, 2.0, 2.5), (1, 4.0, 4.5), (2, 7.5, 8.0)]
    assert clock.takes == [("b", "in", 0, 2.5), ("b", "in", 1, 7.5), ("b", "in", 2, 12.5)]
    assert clock.waits == [("b", "messages", 0.0, 2.5), ("a", "room", 6.0, 7.5)]
    assert timings.elapsed == 17.5
    assert timings.busy == {"a": 6.0, "b": 15.0}
    assert timings.wait == {"a": 11.5, "b": 2.5}


@pytest.mark.parametrize(("fifo", "expected"), [(True, [0, 1, 2]), (False, [1, 2, 0])])
def test_messages_overtake_only_if_they_may(fakes, fifo, expected):
    latency: dict[Hashable, float] = {0: 10.0, 1: 1.0, 2: 3.0}
    runtime = Simulated(cost=lambda *_: 0.0, latency=lambda edge, message: latency[message.key], fifo=fifo)
    take = fakes.receiver("b", 3)
    runtime.run(fakes.graph([fakes.sender("a", range(3)), take], ("a", "out", "b", "in", 3)))
    assert take.seen == expected


def test_a_message_under_way_takes_room(fakes):
    """Capacity bounds what has been sent and not been taken, not only what has arrived."""
    clock = Clock()
    runtime = Simulated(cost=lambda *_: 1.0, latency=lambda *_: 100.0)
    graph = fakes.graph([fakes.sender("a", range(3)), fakes.receiver("b", 3)], ("a", "out", "b", "in", 1))
    runtime.run(graph, [clock])
    assert [sent for _, sent, _ in clock.arrivals] == [1.0, 101.0, 201.0]


def test_timing_gives_every_block_its_durations():
    cost = Timing(forward=[1.0, 2.0], backward=3.0, step=0.25, slow={1: 10.0}).cost()
    found = {op: (cost("block0", op), cost("block1", op)) for op in ("F0", "B7", "I7", "W7", "S", "E1", "A1")}
    assert found == {
        "F0": (1.0, 20.0), "B7": (3.0, 30.0), "I7": (1.5, 15.0), "W7": (1.5, 15.0), "S": (0.25, 2.5),
        "E1": (0.0, 0.0), "A1": (0.0, 0.0),
    }  # fmt: skip
    assert cost("source", "F0") == 0.0
    assert Timing(forward=1.0, backward=2.0, recompute=True).cost()("block0", "B0") == 3.0


def test_only_messages_between_blocks_are_delayed():
    delay = Timing(latency=2.0).delay()
    assert delay(Edge("block0", "up", "block1", "up", 1), Message(0)) == 2.0
    assert delay(Edge("source", "block0", "block0", "data", 1), Message(0)) == 0.0


def test_jitter_is_bounded_and_drawn_from_the_seed():
    def draws(seed):
        cost = Timing(jitter=0.5, seed=seed).cost()
        return [cost("block0", "F0") for _ in range(200)]

    first = draws(1)
    assert first == draws(1) != draws(2)
    assert 1.0 <= min(first) < 1.05
    assert 1.45 < max(first) < 1.5
