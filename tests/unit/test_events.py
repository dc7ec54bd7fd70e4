"""The event log and the timeline made of it: bounded, honest about what was cut, a valid trace, damage is named."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from decoupled import cli
from decoupled.errors import UserError
from decoupled.messages import Message, Up
from decoupled.observe import timeline as timeline_module
from decoupled.observe.eventlog import EventLog, recording
from decoupled.observe.events import FILE, Extent, Operation, Take, Transfer, Versions, Wait, read
from decoupled.observe.timeline import summary, timeline
from decoupled.observe.trace import Counter, Flow, write_trace
from decoupled.runtime.contract import Edge
from decoupled.testing import Case, train

CASE = Case(widths=(4, 5, 5, 3), cuts=(1, 2), sizes=(6,) * 5)
UP = Edge("block0", "up", "block1", "up", 2)


def small(log: EventLog) -> None:
    """Block 0 makes two messages, block 1 takes the first at once and the second late; a clock that starts at 100."""
    log.operation("block0", "F0", 100.0, 101.0)
    log.operation("block0", "F1", 101.0, 102.0)
    for key, sent in ((0, 101.0), (1, 102.0)):
        message = Up(key, batch=key, round=0, indices=None, version=7, payload=())
        log.delivery(UP, message, sent, sent + 0.5)
        log.taken("block1", "up", message, (101.5, 104.5)[key])
    log.wait("block1", "messages", 100.0, 101.5)
    log.wait("block1", "room", 104.5, 104.5)
    log.operation("block1", "F0", 101.5, 104.5)
    log.operation("block1", "F1", 104.5, 107.5)


def check(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Check a file against the trace-event format and what Perfetto needs to draw it; returns its events by phase."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in json.loads(text)["traceEvents"]:
        found[event["ph"]].append(event)
    timed = [event for phase in "XsfC" for event in found[phase]]
    assert all(event["ts"] >= -1e-3 for event in timed)
    assert all(event["dur"] >= 0 for event in found["X"])
    assert all(event["args"]["value"] >= 0 for event in found["C"])
    everything = [e for e in json.loads(text)["traceEvents"] if e["ph"] != "M"]
    assert all(a["ts"] <= b["ts"] for a, b in itertools.pairwise(everything) if a["pid"] == b["pid"])
    named = {(e["pid"], e["tid"]) for e in found["M"] if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for phase in "Xsf" for e in found[phase]} <= named
    lanes: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for e in found["X"]:
        lanes[e["pid"], e["tid"]].append((e["ts"], e["ts"] + e["dur"]))
    for lane in lanes.values():
        assert all(a[1] <= b[0] + 1e-3 for a, b in itertools.pairwise(sorted(lane))), "slices of a lane do not overlap"
    tails, heads = ({e["id"]: e for e in found[phase]} for phase in "sf")
    assert len(tails) == len(found["s"]) and set(tails) == set(heads), "every arrow has one tail and one head"
    for number, tail in tails.items():
        assert tail["ts"] <= heads[number]["ts"] + 1e-3, "no arrow points back in time"
        for end in (tail, heads[number]):
            lane = lanes[end["pid"], end["tid"]]
            assert any(a - 1e-3 <= end["ts"] <= b + 1e-3 for a, b in lane), "an arrow hangs on a slice at both ends"
    return found


def test_a_log_becomes_events_from_time_zero_and_comes_back_from_its_file(tmp_path: Path) -> None:
    log = EventLog("run", ranks={"block1": 3})
    small(log)
    events = log.events()
    assert events.of(Extent) == [Extent(0.0, 7.5)]
    assert [op[:3] for op in events.of(Operation)] == [
        ("block0", "F0", 0.0), ("block0", "F1", 1.0), ("block1", "F0", 1.5), ("block1", "F1", 4.5),
    ]  # fmt: skip
    assert events.of(Transfer) == [Transfer(0, "Up", 0, 7, 0, 1.0, 1.5), Transfer(0, "Up", 1, 7, 0, 2.0, 2.5)]
    assert events.of(Take) == [Take("block1", "up", "Up", 0, 1.5), Take("block1", "up", "Up", 1, 4.5)]
    assert events.of(Wait) == [Wait("block1", "messages", 0.0, 1.5)], "a wait of no length is none"
    assert events.until is None
    path = events.save(tmp_path)
    assert read(tmp_path) == events
    (tmp_path / "events.jsonl").write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()
    assert read(tmp_path) == events, "the file may be unpacked"


def test_the_timeline_has_lanes_arrows_and_queues() -> None:
    log = EventLog("run", ranks={"block1": 3})
    small(log)
    spans, flows, counters = timeline(log.events())
    assert [(s.track, s.name, s.start, s.end) for s in spans if s.kind] == [
        ("block1 (rank 3) wait", "messages", 0.0, 1.5),
        ("block0 send", "up 0", 1.0, 1.5),
        ("block0 send", "up 1", 2.0, 2.5),
        ("block1 (rank 3) receive", "up 0", 1.5, 1.5),
        ("block1 (rank 3) receive", "up 1", 2.5, 4.5),
    ]
    assert flows == [
        Flow("run", "block0", 1.0, "block1 (rank 3)", 1.5, "up 0"),
        Flow("run", "block0", 2.0, "block1 (rank 3)", 4.5, "up 1"),
    ]
    assert [(c.name, c.time, c.value) for c in counters] == [
        ("queue block1.up", 1.5, 1), ("queue block1.up", 1.5, 0), ("queue block1.up", 2.5, 1),
        ("queue block1.up", 4.5, 0),
    ]  # fmt: skip


def test_the_summary_tells_where_the_time_went() -> None:
    log = EventLog()
    small(log)
    below, above = summary(log.events())
    assert (below.actor, below.busy, below.queued) == ("block0", pytest.approx(2 / 7.5), 0.0)
    assert (above.busy, above.messages, above.room) == (pytest.approx(6 / 7.5), pytest.approx(1.5 / 7.5), 0.0)
    assert above.queued == pytest.approx(2 / 7.5)
    assert below.staleness is None


def test_messages_that_wait_together_get_lanes_of_their_own(tmp_path: Path) -> None:
    log = EventLog()
    for key in range(3):
        log.delivery(UP, Message(key), 0.0, float(key))
        log.taken("block1", "up", Message(key), 5.0 + key)
    log.operation("block0", "F0", 0.0, 1.0)
    spans, flows, counters = timeline(log.events())
    assert [s.track for s in spans if s.kind == "receive"] == [f"block1 receive{n}" for n in ("", " 2", " 3")]
    assert max(c.value for c in counters) == 3
    write_trace(spans, flows, tmp_path / "trace.json", counters)
    check(tmp_path / "trace.json")


def test_a_message_taken_before_its_sender_looks_at_the_clock_is_no_negative_queue() -> None:
    log = EventLog()
    log.delivery(UP, Message(0), 1.0, 1.5)
    log.taken("block1", "up", Message(0), 1.25)
    log.delivery(UP, Message(1), 2.0, 2.5)  # and one that nobody takes waits until the run is over
    log.operation("block1", "F0", 1.25, 4.0)
    values = [(c.time, c.value) for c in timeline(log.events())[2]]
    assert values == [(0.25, 1), (0.25, 0), (1.5, 1), (3.0, 0)]


def test_a_log_is_bounded_and_says_where_it_was_cut(tmp_path: Path) -> None:
    log = EventLog(limit=10)
    for n in range(50):
        log.operation("block0", f"F{n}", float(n), n + 1.0)
        log.operation("block1", f"F{n}", 2.0 * n, 2 * n + 2.0)
        log.delivery(UP, Message(n), n + 1.0, n + 1.5)
        log.wait("block1", "room", float(n), n + 0.5)
    assert sum(map(len, log._kept.values())) == 40
    events = log.events()
    assert events.until == 10.0, "block0's eleventh operation began then"
    assert [op.name for op in events.of(Operation) if op.actor == "block1"] == ["F0", "F1", "F2", "F3", "F4"]
    assert events.of(Extent) == [Extent(0.0, 10.0)]
    assert [row.busy for row in summary(events)] == [1.0, 1.0]
    events.save(tmp_path)
    assert read(tmp_path).until == 10.0


def test_a_clock_that_starts_again_with_every_run_goes_on_behind() -> None:
    log = EventLog(limit=3)
    for _ in range(2):
        log.operation("block0", "F0", 0.0, 4.0)
        log.end_run()
    events = log.events()
    assert [op.start for op in events.of(Operation)] == [0.0, 4.0]
    assert events.of(Extent) == [Extent(0.0, 4.0), Extent(4.0, 8.0)]
    assert [s.name for s in timeline(events)[0] if s.track == "runs"] == ["run 1", "run 2"]
    for _ in range(2):  # cut in a run of which nothing was kept
        log.operation("block0", "F0", 0.0, 4.0)
        log.end_run()
    assert (log.events().until, len(log.events().of(Operation))) == (12.0, 3)


def test_a_clock_that_goes_on_keeps_its_gaps() -> None:
    log = EventLog()
    for start in (50.0, 60.0):
        log.operation("block0", "F0", start, start + 4.0)
        log.end_run()
    assert log.events().of(Extent) == [Extent(0.0, 4.0), Extent(10.0, 14.0)]


@pytest.mark.parametrize("runtime", ["simulated", "threads"])
def test_a_real_run_becomes_a_valid_trace_with_its_staleness(tmp_path: Path, runtime: str) -> None:
    log = EventLog("a run")
    run = train(CASE, "pipedream", runtime=runtime, observers=[log])
    log.end_run(run.trainer.statistics())
    events = log.events()
    for block in run.trainer.statistics():
        late = sorted(v.backward - v.forward for v in events.of(Versions) if v.actor == f"block{block.block}")
        assert late == sorted(n for n, count in block.staleness.items() for _ in range(count))
    spans, flows, counters = timeline(events)
    path = tmp_path / "trace.json.gz"
    write_trace(spans, flows, path, counters)
    found = check(path)
    categories = {e["cat"] for e in found["X"]}
    assert categories >= {"forward", "backward", "step", "send", "receive", "wait"}
    assert len(found["s"]) == sum(take.kind != "End" for take in events.of(Take)) > 20
    assert {e["name"] for e in found["C"]} >= {"queue block1.up", "queue block1.down", "staleness block0"}
    last = {e["name"]: e["args"]["value"] for e in found["C"]}
    assert {last[name] for name in last if name.startswith("queue")} == {0}, "in the end every message was taken"
    mean = sum(v.backward - v.forward for v in events.of(Versions) if v.actor == "block0") / len(CASE.sizes)
    assert summary(events)[0].staleness == pytest.approx(mean)


def test_a_log_of_a_run_that_fails_is_saved(tmp_path: Path) -> None:
    def fail() -> None:
        with recording(tmp_path, "run") as logs:
            logs[0].operation("block0", "F0", 0.0, 1.0)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert len(read(tmp_path).of(Operation)) == 1
    for nowhere in (recording(None, "run"), recording(tmp_path / "other", "run", limit=0)):
        with nowhere as logs:
            assert logs == []
    assert not (tmp_path / "other").exists()


# --- the file -----------------------------------------------------------------------------------------------------


def saved(directory: Path) -> list[str]:
    log = EventLog()
    small(log)
    log.end_run()
    return gzip.decompress(log.events().save(directory).read_bytes()).decode().splitlines()


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (0, "{", "damaged at its beginning"),
        (0, "[]", "damaged at its beginning"),
        (0, '{"format": 2}', "has format 2, this version reads 1"),
        (3, '["operation","block0","F0",1.0', "damaged near line 4"),
        (3, '["operation","block0","F0",1.0]', "operation has 4 fields, not 3"),
        (3, '["operation","block0","F0",2.0,1.0]', "operation ends before it starts"),
        (3, '["operation","block0","F0",NaN,1.0]', "cannot have start nan"),
        (3, '["operation",0,"F0",0.0,1.0]', "cannot have actor 0"),
        (3, '["dance","block0"]', "'dance'"),
        (3, '["transfer",5,"Up",0,null,0,0.0,1.0]', "an edge that is not listed"),
        (3, None, "events instead of"),
        (3, "7", "damaged near line 4"),
    ],
)
def test_damage_is_named(tmp_path: Path, line: int, text: str | None, message: str) -> None:
    lines = saved(tmp_path)
    lines[line : line + 1] = [] if text is None else [text]
    (tmp_path / FILE).write_bytes(gzip.compress("\n".join(lines).encode()))
    with pytest.raises(UserError, match="train again") as refused:
        read(tmp_path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_damage_is_worse_than_a_user_error(tmp_path: Path) -> None:
    saved(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    draw = random.Random(0)
    for n in range(300):
        data = bytearray(whole[: draw.randrange(len(whole))] if n % 2 else whole)
        for _ in range(draw.randrange(1, 4) if data else 0):
            data[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / FILE).write_bytes(data)
        with contextlib.suppress(UserError):
            timeline(read(tmp_path))


def test_the_command_draws_what_train_has_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = ["method=pipedream", "data={name: digits, limit: 200}", "model={name: mlp, width: 16, depth: 3}"]
    words += ["epochs=2", "batch_size=50", "--quiet", "--out", str(out)]
    assert cli.main(["train", *words, "--events", "6"]) == 0
    capsys.readouterr()
    assert cli.main(["trace", str(out)]) == 0
    text = capsys.readouterr().out
    assert "block1" in text and "cut: the first" in text and str(out / "trace.json") in text
    assert max(map(len, text.splitlines()[:8])) <= 80
    assert check(out / "trace.json")["X"]
    assert cli.main(["train", *words[:-1], str(tmp_path / "other"), "--events", "0"]) == 0
    assert not (tmp_path / "other" / FILE).exists()


def test_a_large_trace_is_compressed_and_an_empty_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path)
    monkeypatch.setattr(timeline_module, "LARGE", 3)
    assert cli.main(["trace", str(tmp_path)]) == 0
    assert f"trace: {tmp_path / 'trace.json.gz'} (" in capsys.readouterr().out
    assert len(check(tmp_path / "trace.json.gz")["X"]) == 9
    EventLog().events().save(tmp_path)
    assert cli.main(["trace", str(tmp_path)]) == 2
    assert "ended before its first operation; train again" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["nowhere", "empty", "file"])
def test_a_directory_without_events_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert cli.main(["trace", str(tmp_path / place)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{tmp_path / place} holds no {FILE}; give a directory that" in error


def test_counters_keep_their_order_at_one_time(tmp_path: Path) -> None:
    """A message that is taken as it arrives: up, then down, whatever else happens at that time."""
    write_trace([], [], tmp_path / "t.json", [Counter("p", "queue", 1.0, 1), Counter("p", "queue", 1.0, 0)])
    assert [e["args"]["value"] for e in check(tmp_path / "t.json")["C"]] == [1, 0]
