"""The intake: which batch is next, what is dropped, how it ends - message by message, and in whole runs."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoupled.errors import UserError
from decoupled.intake import Intake
from decoupled.messages import Down, End, Message, Up
from decoupled.runtime.contract import Edge, Want
from decoupled.runtime.simulated import Simulated
from decoupled.runtime.timing import Timing
from decoupled.testing import Case, Tap, compare, train

CASE = Case(widths=(4, 5, 3, 4, 3), cuts=(1, 2), sizes=(6,) * 12)
UP, READY, SERVE = Want(("up",)), Want(("ready",)), Want()


def up(name: str) -> Up:
    return Up(name, batch=ord(name), round=0, indices=None, version=0, payload=())


def play(slots: int, script: str, uses: int = 0) -> tuple[str, Intake]:
    """Play `a`, `b`, ... (batches that arrive), `.` (the block is ready, as it is in the beginning) and `!` (end).

    Returns:
        What it sends, `!` for End; and the intake.
    """
    intake, sent = Intake(1, slots, uses), ""
    intake.begin(7)
    served = []
    for event in script:
        want, message = (READY, Message(0)) if event == "." else (UP, End(0) if event == "!" else up(event))
        assert want in intake.wants()
        intake.handle(want, (message,))
        while SERVE in intake.wants():
            ((_, out),) = intake.handle(SERVE, ()).sends
            served.append(out.key)
            sent += "!" if isinstance(out, End) else chr(out.batch)  # type: ignore[attr-defined]
    assert served == list(range(7, 7 + len(served)))  # passes are numbered anew, without gaps
    return sent, intake


@pytest.mark.parametrize(
    ("slots", "script", "sent"),
    [
        (4, "abc...!", "acbc"),  # the first at once, then the latest that was not used; then the least used, latest
        (4, "a....!.", "aaaaa!"),  # nothing new: the same again, until the end
        (4, "ab.!", "ab"),
        (4, "abcd!...", "adcb"),  # after the end, what was never used
        (4, "abcd!....", "adcb!"),
        (2, "abcd..", "adc"),  # b was replaced by d
        (1, "abcd..", "add"),
        (3, "!", "!"),
        (3, "a!.", "a!"),
        (3, "a.!.", "aa!"),  # used before the end: forgotten at the end
        (3, "ab..c.", "abbc"),
    ],
)
def test_the_latest_of_the_least_used(slots: int, script: str, sent: str) -> None:
    assert play(slots, script)[0] == sent


@pytest.mark.parametrize(("uses", "sent"), [(1, "ab!"), (2, "abba!"), (3, "abbaba!")])
def test_uses_are_bounded(uses: int, sent: str) -> None:
    """A block that has used up everything waits for the next batch or the end."""
    script = "ab" + "." * (2 * uses - 1)
    found, intake = play(4, script + "..!"[1:], uses)
    assert found == sent
    assert intake.reused == 2 * (uses - 1)


def test_what_is_counted() -> None:
    _, intake = play(2, "abcdef..!.")
    assert (intake.reused, intake.dropped) == (0, 3)
    _, intake = play(2, "a..b..!.")
    assert intake.dropped == 0
    assert intake.reused == 3


def test_a_pass_dropped_below_is_no_lesson() -> None:
    intake = Intake(1, 2)
    intake.handle(UP, (Up(0, batch=0, round=0, indices=None, version=0, payload=(), void=True),))
    assert intake.wants() == (UP,)


@settings(max_examples=50)
@given(slots=st.integers(1, 4), uses=st.integers(0, 3), events=st.text(alphabet="x.", max_size=40))
def test_it_never_holds_more_than_its_slots_and_always_takes_what_comes(slots: int, uses: int, events: str) -> None:
    intake = Intake(1, slots, uses)
    for event in [*events, "!"]:
        want, message = (READY, Message(0)) if event == "." else (UP, End(0) if event == "!" else up(event))
        if want not in intake.wants():  # a block is ready once per batch it was given
            assert event == "."
            continue
        intake.handle(want, (message,))
        assert len(intake._kept) <= slots
        if SERVE in intake.wants():
            intake.handle(SERVE, ())
    for _ in range(2 * slots + 2):
        if intake.wants():
            intake.handle(*((SERVE, ()) if SERVE in intake.wants() else (READY, (Message(0),))))
    assert intake.wants() == ()


def test_impossible_sizes_are_one_line() -> None:
    for given_ in ((0, 1), (1, -1)):
        with pytest.raises(UserError, match="a buffer needs at least 1 slot and uses of at least 0"):
            Intake(1, *given_)


# --- in a run -----------------------------------------------------------------------------------------------------


def buffered(timing: Timing | None = None, runtime: Any = None, epochs: int = 2, **options: Any) -> tuple[Any, Tap]:
    tap = Tap()
    spec = {"name": "dgl_async", **options}
    return train(CASE, spec, runtime=runtime or Simulated(timing or Timing()), observers=[tap], epochs=epochs), tap


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_nobody_waits_for_a_slow_neighbour(slow: int) -> None:
    """Below it all batches are met; it leaves some out; above it what there is is used up to three times."""
    blocks = buffered(Timing(slow={slow: 50.0}), uses=3)[0].trainer.statistics()
    for below, block in itertools.pairwise(blocks):
        if block.block < slow:
            assert block.dropped == 0
        elif block.block == slow:
            assert block.updates == below.updates - block.dropped
            assert block.dropped > below.updates / 2
        else:
            assert 2 * below.updates < block.updates <= 3 * below.updates
            assert block.reused == block.updates - below.updates
    assert blocks[0].updates == 2 * len(CASE.sizes)


def test_a_block_below_a_slow_one_never_stops() -> None:
    """It works without a gap from its first to its last operation."""
    _, tap = buffered(Timing(slow={2: 100.0}), epochs=1)
    spans = sorted((start, end) for name, _, start, end in tap.operations if name == "block1")
    gaps = [start - end for (_, end), (start, _) in itertools.pairwise(spans)]
    assert [gap for gap in gaps if gap] == []


@pytest.mark.parametrize("timing", [Timing(slow={1: 5.0}, latency=2.0), Timing(jitter=3.0, seed=4)])
def test_on_the_simulator_a_run_is_a_pure_function_of_the_timing(timing: Timing) -> None:
    one, other = (buffered(timing)[0] for _ in range(2))
    compare(one.weights, other.weights, tolerance=0.0)
    assert one.trainer.statistics() == other.trainer.statistics()


def test_every_batch_that_was_not_dropped_is_used() -> None:
    run_, tap = buffered(Timing(slow={1: 4.0}), slots=2)
    for k, block in enumerate(run_.trainer.statistics()[1:], 1):
        served = [m for e, m in tap.messages if e.target == f"block{k}" and isinstance(m, Up)]
        arrived = [m for e, m in tap.messages if e.target == f"intake{k}" and isinstance(m, Up)]
        assert len(served) - block.reused == len(arrived) - block.dropped
        assert block.updates == len(served)


def test_labels_stay_with_their_samples() -> None:
    _, tap = buffered(Timing(slow={1: 4.0}, jitter=1.0))
    batches = CASE.batches()
    ups: list[tuple[Edge, Any]] = [(e, m) for e, m in tap.messages if isinstance(m, Up)]
    assert len(ups) > 4 * len(CASE.sizes)
    for _, message in ups:
        _, y, indices = batches[message.batch % len(batches)]
        assert torch.equal(message.payload[1], y)
        assert torch.equal(message.indices, indices)


def test_a_block_tells_nobody_but_its_own_intake() -> None:
    _, tap = buffered()
    downs = {(e.source, e.target): m.nbytes for e, m in tap.messages if isinstance(m, Down)}
    assert downs == {("block1", "intake1"): 0, ("block2", "intake2"): 0}


def test_on_threads_it_ends_and_counts_what_it_did() -> None:
    run_, tap = buffered(runtime="threads", uses=2)
    for k, block in enumerate(run_.trainer.statistics()):
        arrived = [m for e, m in tap.messages if e.target == f"intake{k}" and isinstance(m, Up)]
        assert block.updates == (len(arrived) + block.reused - block.dropped if k else 2 * len(CASE.sizes))
        assert block.reused <= len(arrived)
