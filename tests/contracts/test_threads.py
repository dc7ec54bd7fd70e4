"""What only threads promise: who runs where, for how long, and that a bystander who waits long is no stall."""

import threading
from contextlib import closing

import pytest
import torch

from decoupled.messages import Message
from decoupled.runtime import local
from decoupled.runtime.contract import Actor, Edge, Graph, Outcome, Want
from decoupled.runtime.threads import Threads

pytestmark = pytest.mark.timeout(60)


def where(fakes, name, **options):
    """Remembers the thread and torch's thread count in it."""

    def script(seen):
        yield fakes.now
        seen.append((threading.get_ident(), torch.get_num_threads()))

    return fakes.actor(name, script, **options)


def run(runtime, fakes):
    actors = [where(fakes, "source", in_caller=True), where(fakes, "a"), where(fakes, "b")]
    runtime.run(fakes.graph(actors))
    return [actor.seen[0] for actor in actors]


def test_one_thread_per_actor_that_lives_across_runs_and_ends_at_close(fakes):
    runtime = Threads()
    (source, _), *workers = run(runtime, fakes)
    assert source == threading.get_ident()
    idents = [ident for ident, _ in workers]
    assert len({source, *idents}) == 3
    for _ in range(3):
        assert [ident for ident, _ in run(runtime, fakes)] == [source, *idents]
    alive = [thread for thread in threading.enumerate() if thread.ident in idents]
    assert len(alive) == 2
    runtime.close()
    assert not any(thread.is_alive() for thread in alive)


def test_a_failure_does_not_cost_the_threads(fakes):
    def dies(seen):
        yield fakes.now
        raise ValueError

    runtime = Threads()
    before = run(runtime, fakes)
    with pytest.raises(ValueError):
        runtime.run(fakes.graph([where(fakes, "b"), fakes.actor("a", dies)]))
    assert run(runtime, fakes) == before
    runtime.close()


@pytest.mark.parametrize("error", [None, ValueError])
def test_intra_op_threads_are_set_for_the_run_and_put_back(fakes, error):
    def script(seen):
        yield fakes.now
        if error:
            raise error

    before = torch.get_num_threads()
    runtime = Threads(intra_op=before + 1)
    try:
        assert {count for _, count in run(runtime, fakes)} == {before + 1}
        if error:
            with pytest.raises(error):
                runtime.run(fakes.graph([fakes.actor("a", script)]))
        assert torch.get_num_threads() == before
    finally:
        runtime.close()


def test_waiting_long_for_others_at_work_is_no_stall(fakes):
    """Two actors exchange messages without keys while a third waits: a stall is when nothing moves, not when what is
    waited for looks the same twice."""

    def player(serves):
        def script(seen):
            if serves:
                yield fakes.now
                yield "out", 0
            for _ in range(5000):
                yield fakes.want("in")
                yield "out", 0
            yield "done", 0

        return script

    actors = [fakes.actor("a", player(True)), fakes.actor("b", player(False)), fakes.receiver("patient", 2)]
    runtime = Threads(patience=0.005)
    try:
        runtime.run(
            fakes.graph(
                actors,
                ("a", "out", "b", "in", 2),
                ("b", "out", "a", "in", 2),
                ("a", "done", "patient", "in", 1),
                ("b", "done", "patient", "in", 1),
            )
        )
    finally:
        runtime.close()
    assert actors[2].seen == [0, 0]


def test_a_message_that_goes_to_two_is_received_by_both(monkeypatch):
    """What a tensor on a GPU must be waited for was kept by the message alone: one of the two took it uncomputed."""
    calls = []
    monkeypatch.setattr(local.cuda, "hand_over", lambda message, device: (message, lambda: calls.append(Sent.here())))

    class Sent(Actor):
        def __init__(self, name, count):
            self.name, self.device, self._left = name, None, count

        def wants(self):
            return (Want(() if self.name == "giver" else ("up",)),) if self._left else ()

        def handle(self, want, messages):
            self._left -= 1
            return Outcome("send", [("up", Message(self._left))]) if self.name == "giver" else Outcome("take")

        @staticmethod
        def here():
            return threading.get_ident()

    actors = [Sent("giver", 20), Sent("a", 20), Sent("b", 20)]
    with closing(Threads()) as runtime:
        runtime.run(Graph(actors, [Edge("giver", "up", name, "up", 3) for name in "ab"]))
    assert sorted(calls.count(thread) for thread in set(calls)) == [20, 20]
