"""Traces: the file is a valid Chrome trace with named tracks; the text table aligns, wraps and keeps the times."""

import json
import re

import pytest

from decoupled.observe.trace import (
    Counter,
    Flow,
    Span,
    natural_key,
    opening,
    operation_batch,
    operation_kind,
    spans_of,
    timeline_table,
    write_trace,
)

# Two blocks, one batch: forward up, backward down, on a virtual clock (seconds).
SPANS = [
    Span("pipedream, seed 0", "block0", "F0", 0.0, 1.0),
    Span("pipedream, seed 0", "block1", "F0", 1.0, 2.0, {"version": 7}),
    Span("pipedream, seed 0", "block1", "B0", 2.0, 4.0),
    Span("pipedream, seed 0", "block0", "B0", 4.5, 6.5),
    Span("pipedream, seed 0", "block0", "S", 6.5, 6.5),
]
FLOWS = [
    Flow("pipedream, seed 0", "block0", 1.0, "block1", 1.0, "Up 0"),
    Flow("pipedream, seed 0", "block1", 4.0, "block0", 4.5, "Down 0"),
]


def events(path, kind):
    return [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == kind]


def test_operations_become_complete_events_in_microseconds(tmp_path):
    write_trace(SPANS, FLOWS, tmp_path / "deep" / "trace.json")
    complete = events(tmp_path / "deep" / "trace.json", "X")
    assert [(e["name"], e["cat"], e["ts"], e["dur"]) for e in complete] == [
        ("F0", "forward", 0, 1e6),
        ("F0", "forward", 1e6, 1e6),
        ("B0", "backward", 2e6, 2e6),
        ("B0", "backward", 4.5e6, 2e6),
        ("S", "step", 6.5e6, 0),
    ]
    assert complete[1]["args"] == {"batch": 0, "version": 7}
    assert complete[4]["args"] == {}


def test_every_process_and_track_is_named_and_numbered_apart(tmp_path):
    other = [Span("ddg, seed 0", f"block{k}", "F0", 0, 1) for k in (10, 2)]
    write_trace([*SPANS, *other], [], tmp_path / "t.json")
    names = events(tmp_path / "t.json", "M")
    processes = {e["args"]["name"]: e["pid"] for e in names if e["name"] == "process_name"}
    threads = {(e["pid"], e["args"]["name"]): e["tid"] for e in names if e["name"] == "thread_name"}
    assert list(processes) == ["pipedream, seed 0", "ddg, seed 0"]
    assert len(set(processes.values())) == 2
    ddg = processes["ddg, seed 0"]
    assert threads[ddg, "block2"] < threads[ddg, "block10"], "tracks stand in natural order"
    order = {(e["pid"], e["tid"]): e["args"]["sort_index"] for e in names if e["name"] == "thread_sort_index"}
    assert order == {(pid, tid): tid for (pid, _), tid in threads.items()}
    expected = [(processes[s.process], threads[processes[s.process], s.track]) for s in [*SPANS, *other]]
    assert [(e["pid"], e["tid"]) for e in events(tmp_path / "t.json", "X")] == expected


def test_an_arrow_starts_inside_the_sending_operation_and_ends_at_the_receiving_one(tmp_path):
    write_trace(SPANS, FLOWS, tmp_path / "t.json")
    tails, heads = events(tmp_path / "t.json", "s"), events(tmp_path / "t.json", "f")
    assert [e["id"] for e in tails] == [e["id"] for e in heads] == [0, 1]
    sent = {e["id"]: e for e in tails}
    for flow, head in zip(FLOWS, heads, strict=True):
        tail = sent[head["id"]]
        sender = next(s for s in SPANS if s.track == flow.source and s.end == flow.start)
        assert sender.start * 1e6 <= tail["ts"] < sender.end * 1e6
        assert head["ts"] == flow.end * 1e6
        assert head["bp"] == "e"
    assert (tails[1]["tid"], heads[1]["tid"]) == (heads[0]["tid"], tails[0]["tid"])


@pytest.mark.parametrize("arrived", [4.2, 5.0])
def test_an_arrow_to_an_idle_or_busy_track_is_bound_to_its_next_operation(tmp_path, arrived):
    write_trace(SPANS, [Flow("pipedream, seed 0", "block1", 4.0, "block0", arrived, "Down 0")], tmp_path / "t.json")
    assert "bp" not in events(tmp_path / "t.json", "f")[0]


def test_counters_are_written_in_time_order(tmp_path):
    process = SPANS[0].process
    counters = [Counter(process, "held bytes", 2.0, 10), Counter(process, "held bytes", 1.0, 20)]
    write_trace(SPANS, [], tmp_path / "t.json", counters)
    assert [(e["ts"], e["args"]["value"]) for e in events(tmp_path / "t.json", "C")] == [(1e6, 20), (2e6, 10)]


def test_a_span_that_ends_before_it_starts_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"B3 of ddg/block1 ends at 1.0 s, before its start at 2.0 s"):
        write_trace([Span("ddg", "block1", "B3", 2.0, 1.0)], [], tmp_path / "t.json")
    with pytest.raises(ValueError, match="ends at nan"):
        write_trace([Span("ddg", "block1", "B3", 2.0, float("nan"))], [], tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()


def test_an_empty_trace_is_still_a_trace(tmp_path):
    write_trace([], [], tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"] == []


def test_operation_names():
    assert [operation_kind(n, "block0") for n in ("F3", "B12", "I0", "W0", "S", "E1", "A1", "F*")] == [
        "forward", "backward", "input gradient", "weight gradient", "step", "emit", "answer", "forward",
    ]  # fmt: skip
    assert [operation_kind(name, "block0") for name in ("", "evaluate", "Fetch", "Z1")] == ["other"] * 4
    assert operation_kind("F recurrent (0, 1)", "worker0") == "forward"
    assert [operation_batch(name) for name in ("F3", "B12", "S", "evaluate")] == [3, 12, None, None]
    assert sorted(["block10", "block2", "actor", "2"], key=natural_key) == ["2", "actor", "block2", "block10"]


@pytest.mark.parametrize(
    ("track", "kinds"),
    [
        ("block0 (rank 1)", {"E3": "emit", "A3": "answer", "S": "step", "P3": "probe", "C3": "other", "L3": "other"}),
        ("learner", {"S3": "step", "P0": "pretrain", "E3": "act"}),
        ("actor1", {"E3": "act"}),
        ("replay", {"A3": "draw"}),
        ("selector (rank 0)", {"C3": "choose", "L3": "learn"}),
        ("worker0", {"F recurrent (0, 1)": "forward", "B recurrent (0, 1)": "backward"}),
    ],
)
def test_what_a_letter_stands_for_depends_on_the_actor(tmp_path, track, kinds):
    """Environment steps were called emit, drawn batches answer, and what only other actors do was other."""
    write_trace([Span("p", track, name, n, n + 1) for n, name in enumerate(kinds)], [], tmp_path / "t.json")
    assert {e["name"]: e["cat"] for e in events(tmp_path / "t.json", "X")} == kinds


def test_an_opening_ends_where_the_first_track_has_done_so_many_operations():
    slow = [Span("p", "block0", f"F{n}", 3 * n, 3 * n + 3) for n in range(9)]
    fast = [Span("p", "block1", f"F{n}", n, n + 1) for n in range(9)]
    assert [(s.track, s.name) for s in opening([*slow, *fast], 4)] == [
        ("block0", "F0"), *(("block1", f"F{n}") for n in range(4))
    ]  # fmt: skip
    assert opening([*slow, *fast], 10) == [*slow, *fast], "no track has as many: all of them"
    assert opening([], 3) == []


def test_results_become_one_process_per_run_with_a_timeline():
    event = {"actor": "block0", "op": "F0", "start": 1.0, "end": 1.5}
    records = [
        {"method": "ddg", "label": "DDG", "seed": 0, "timeline": [event]},
        {"method": "ddg", "label": "DDG", "seed": 1, "timeline": None},
        {"method": "fdg", "label": None, "seed": 2, "timeline": [event]},
    ]
    assert [(s.process, s.track, s.name, s.start, s.end) for s in spans_of({"records": records})] == [
        ("DDG, seed 0", "block0", "F0", 1.0, 1.5),
        ("fdg, seed 2", "block0", "F0", 1.0, 1.5),
    ]


def test_table_of_a_virtual_clock_has_equal_slots():
    assert timeline_table(SPANS, width=100).splitlines() == [
        "time    0.0  0.5  1.0  1.5  2.0  2.5  3.0  3.5  4.0  4.5  5.0  5.5  6.0",
        "block0  F0   -    .    .    .    .    .    .    .    B0+S -    -    -",
        "block1  .    .    F0   -    B0   -    -    -    .    .    .    .    .",
    ]


def test_table_of_measured_times_keeps_the_order_of_operations():
    spans = [Span("p", "block0", "F0", 0.00012, 0.00231), Span("p", "block1", "F0", 0.00244, 0.00519)]
    spans += [Span("p", "block1", "B0", 0.00523, 0.0101), Span("p", "block0", "F1", 0.00233, 0.00607)]
    assert [line.split()[1:] for line in timeline_table(spans).splitlines()[1:]] == [
        ["F0", "F1", "-", "-"],
        [".", ".", "F0", "B0"],
    ]


@pytest.mark.parametrize("width", [24, 40, 79, 200])
def test_table_stays_within_its_width_and_aligns(width):
    spans = [Span("p", f"block{k}", f"F{n}", n + k, n + k + 1) for k in range(12) for n in range(30)]
    text = timeline_table(spans, width)
    panels = text.split("\n\n")
    assert max(map(len, text.splitlines())) <= width
    seen = {k: [] for k in range(12)}
    for panel in panels:
        head, *rows = panel.splitlines()
        columns = [match.start() for match in re.finditer(r"\S+", head)][1:]
        assert [row.split()[0] for row in rows] == [f"block{k}" for k in range(12)]
        for k, row in enumerate(rows):
            assert [match.start() for match in re.finditer(r"\S+", row)][1:] == columns
            seen[k] += row.split()[1:]
    for k, cells in seen.items():
        assert [c for c in cells if c != "."] == [f"F{n}" for n in range(30)]
        assert cells.index("F0") == k


def test_table_names_the_process_only_where_there_are_several():
    one, two = Span("a", "block0", "F0", 0, 1), Span("b", "block0", "F0", 0, 1)
    assert timeline_table([one]).splitlines()[1] == "block0  F0"
    assert [line.split()[0] for line in timeline_table([one, two]).splitlines()] == ["time", "a/block0", "b/block0"]


def test_table_without_operations_or_without_room():
    assert timeline_table([]) == "(no operations)"
    with pytest.raises(ValueError, match="width 8 holds no column") as refused:
        timeline_table(SPANS, width=8)
    least = int(str(refused.value).split()[-1])
    assert max(map(len, timeline_table(SPANS, least).splitlines())) <= least
    with pytest.raises(ValueError, match="holds no column"):
        timeline_table(SPANS, least - 1)
    assert "S" in timeline_table([Span("p", "block0", "S", 2.0, 2.0)])
