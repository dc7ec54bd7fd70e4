"""The benchmark of methods with late gradients: who takes part, what is divided by what, and what blocks do alone."""

from contextlib import nullcontext
from threading import Barrier

import pytest
import torch

from decoupled import registry
from decoupled.benchmarks import delayed_speed
from decoupled.benchmarks.peers import alone, contest
from decoupled.benchmarks.peers.contest import Measurement
from decoupled.benchmarks.peers.setting import Setting

SMALL = Setting("resnet8", (1, 8, 8), 4, 2)


def test_every_method_with_late_gradients_takes_part_by_what_it_keeps():
    found = {kind: delayed_speed.contestants(kind) for kind in delayed_speed.KINDS}
    names = {kind: {spec["name"] for spec in specs.values()} for kind, specs in found.items()}
    assert {"pipedream", "ddg", "fdg", "adl", "dfa"} <= names["keeps graphs"]
    assert {"features_replay", "pipemare", "dsp"} <= names["replays"] - names["keeps graphs"]
    assert names["reverses"] == {"petra"}
    assert not {"backprop", "gpipe", "greedy_local", "zero_bubble"} & set().union(*names.values())
    late = {n for n in registry.methods() if registry.family(n) == "delayed_gradients"}
    assert late <= set().union(*names.values())


def test_what_replays_in_other_blocks_is_cut_apart():
    specs = delayed_speed.contestants("replays", ["pipemare", "async_nesterov", "dsp"])
    parts = [(where, list(found)) for where, found in delayed_speed.alike(specs)]
    assert parts == [((True, False), ["dsp", "pipemare"]), ((True, True), ["async_nesterov,stash=False"])]


def test_a_cut_counts_who_replays(monkeypatch):
    asked = []
    monkeypatch.setattr(contest, "split", lambda units, *given, replays: (asked.append(replays(0)), [units[:3]])[1])
    assert contest.find_cut(SMALL, lambda k: k == 0, tries=1) == 3
    assert contest.find_cut(SMALL, tries=1) == 3
    assert asked == [True, False]


def test_a_kind_is_cut_for_the_blocks_that_replay(monkeypatch):
    monkeypatch.setattr(contest, "find_cut", lambda setting, replays: 10 * replays(0) + replays(1))
    cuts = [delayed_speed._setting(delayed_speed.Options(), "replays", (True, top)).cut for top in (False, True)]
    assert cuts == [10, 11]


def test_at_once_is_at_once_with_one_thread_each():
    meet, threads = Barrier(2), []

    def run(batches):
        meet.wait(timeout=20)
        threads.append((batches, torch.get_num_threads()))

    alone._together([run, run])(3)
    assert threads == [(3, 1), (3, 1)]


def measured(**seconds):
    return {name.replace("_", " "): Measurement(value, value, 0, 0.0) for name, value in seconds.items()}


def test_what_is_divided_by_what():
    one = measured(m_plain_loop=6.0, m=4.0, m_serial=7.0, m_block_0=3.0, m_block_1=3.6)
    assert delayed_speed.ratio("keeps graphs", "m", one)[0] == 1.5
    assert delayed_speed.ratio("replays", "m", one) == (0.9, 1.0)
    assert delayed_speed.ratio("reverses", "m", one) == (1.75, pytest.approx(7 / 3.6))


@pytest.mark.parametrize("spec", [{"name": "features_replay"}, {"name": "petra"}, {"name": "pipemare"}], ids=str)
def test_blocks_work_alone_as_long_as_they_are_asked(spec):
    runs = alone.build(SMALL, 0, {"m": spec})
    assert list(runs) == ["m serial", "m block 0", "m block 1", "m at once"]
    for run in runs.values():
        for batches in (2, 4, 2):
            run(batches)


def test_what_is_compared_runs_right_after_one_another(monkeypatch):
    class Recording:
        def __init__(self):
            self.ran = []

        def run(self, name, batches):
            self.ran.append((name, batches))
            return contest.Measurement(1.0, 1.0, 0.0, 0.0)

    host = Recording()
    monkeypatch.setattr(contest, "start", lambda *given: nullcontext([host]))
    monkeypatch.setattr(contest, "wait_quiet", lambda deadline: None)
    group = contest.Group(dict, {"a": "a", "b": "b", "plain": "plain"})
    bouts = [[("a", "a"), ("a plain", "plain")], [("b", "b"), ("b plain", "plain")]]
    found = list(contest.hold_rounds(SMALL, [group], 3, 8, 0.0, lambda line: None, bouts))
    assert [list(one) for one in found] == [
        ["a", "a plain", "b", "b plain"], ["b plain", "b", "a plain", "a"], ["a", "a plain", "b", "b plain"],
    ]  # fmt: skip
    ran = " ".join(name for name, batches in host.ran if batches == 8)
    assert ran == "a plain b plain plain b plain a a plain b plain"


def test_the_page_says_what_was_missed():
    rounds = [measured(m=4.0, m_serial=6.0, m_block_0=3.0, m_block_1=3.9, m_at_once=3.6)] * 3
    text = delayed_speed.section("replays", SMALL, {"m": {"name": "m"}}, rounds, {})
    row = "| m | >= 0.95 | 0.97 (0.97 .. 0.97) | 1.00 | yes | 4000.0 | 0.00 | 3000.0, 3900.0 | 0.90 (0.90 .. 0.90) |"
    assert row in text
    assert "Every block below the top replays" in text
    text = delayed_speed.section("replays", SMALL, {"m": {"name": "m"}}, rounds, {}, everywhere=True)
    assert "Every block replays" in text
    assert "**no**" in delayed_speed.section("reverses", SMALL, {"m": {"name": "m"}}, rounds, {})


@pytest.mark.parametrize("words", [["--batches", "6"], ["--kinds", "x"], ["--only", "backprop"]])
def test_wrong_words_are_refused(words):
    with pytest.raises(SystemExit) as caught:
        delayed_speed.parse(words)
    assert caught.value.code == 2
