"""What every runtime promises when something goes wrong: the first failure is raised, nobody hangs, nothing is left."""

import traceback

import pytest

from decoupled.errors import StallError

pytestmark = pytest.mark.timeout(60)


class Broken(RuntimeError):
    pass


def worker(fakes, fail_at, error):
    """Takes messages on `in` and hands them on; raises `error` at number `fail_at`."""

    def script(seen):
        for n in range(100):
            (message,) = yield fakes.want("in")
            if n == fail_at:
                raise error
            seen.append(message.key)
            yield "out", message.key

    return fakes.actor("worker", script)


def chain(fakes, middle, keys=range(100), in_caller=False, capacity=1):
    """source -> worker -> sink"""
    actors = [fakes.sender("source", keys, in_caller=in_caller), middle, fakes.receiver("sink", 100)]
    return fakes.graph(
        actors, ("source", "out", "worker", "in", capacity), ("worker", "out", "sink", "in", capacity)
    )  # fmt: skip


@pytest.mark.parametrize("in_caller", [False, True])
def test_the_failure_itself_is_raised_with_its_traceback(runtime, fakes, in_caller):
    """The same exception object; senders that wait for room and receivers that wait for messages all leave."""
    error = Broken("at the third")
    with pytest.raises(Broken) as caught:
        runtime.run(chain(fakes, worker(fakes, 3, error), in_caller=in_caller))
    assert caught.value is error
    assert "script" in [frame.name for frame in traceback.extract_tb(caught.tb)]


def test_nothing_happens_after_a_failure(runtime, fakes):
    middle = worker(fakes, 3, Broken())
    graph = chain(fakes, middle)
    with pytest.raises(Broken):
        runtime.run(graph)
    source, _, sink = graph.actors
    assert middle.seen == [0, 1, 2]
    assert len(source.seen) <= 3 + 1 + 1 + 1  # taken, failed on, waiting, in its hand
    assert set(sink.seen) <= {0, 1, 2}


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_the_caller_stops_everybody(runtime, fakes, interrupt):
    def source(seen):
        for key in range(5):
            yield fakes.now
            yield "out", key
        yield fakes.now
        raise interrupt

    actors = [fakes.actor("source", source, in_caller=True), fakes.receiver("sink", 100)]
    with pytest.raises(interrupt):
        runtime.run(fakes.graph(actors, ("source", "out", "sink", "in", 1)))
    assert actors[1].seen == list(range(len(actors[1].seen)))


def test_a_stall_names_who_waits_for_what(runtime, fakes):
    def stuck(seen):
        yield fakes.want("in", key="never")

    actors = [fakes.sender("a", [0, 1, 2]), fakes.actor("b", stuck), fakes.actor("c", stuck)]
    with pytest.raises(StallError) as caught:
        runtime.run(fakes.graph(actors, ("a", "out", "b", "in", 1), ("b", "out", "c", "in", 1)))
    text = str(caught.value)
    assert "a waits for room on a.out->b.in" in text
    assert "b waits for [(('in',), 'never')]" in text
    assert "{'in': [0]}" in text  # what it holds instead
    assert "c waits for [(('in',), 'never')]" in text


def test_finished_actors_do_not_hide_a_stall(runtime, fakes):
    def stuck(seen):
        yield fakes.want("in", key="never")

    actors = [fakes.sender("a", [0]), fakes.actor("b", stuck)]
    with pytest.raises(StallError, match="b waits for"):
        runtime.run(fakes.graph(actors, ("a", "out", "b", "in", 1)))


def test_a_runtime_works_again_after_a_failure_a_stall_and_an_interrupt(runtime, fakes):
    for error in (Broken(), KeyboardInterrupt(), None):
        middle = worker(fakes, 50 if error else -1, error)
        graph = chain(fakes, middle, keys=range(100) if error else range(70), in_caller=True)
        with pytest.raises(type(error) if error else StallError):
            runtime.run(graph)
        good = chain(fakes, worker(fakes, -1, None), in_caller=True)
        runtime.run(good)
        assert good.actors[2].seen == list(range(100))


def test_an_empty_graph_and_a_closed_runtime_do_no_harm(runtime, fakes):
    assert runtime.run(fakes.graph([])).busy == {}
    runtime.close()
    runtime.close()
