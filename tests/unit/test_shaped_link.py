"""The benchmarks over a shaped line and with a slow block: what they conclude, and (slow) that they run."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ET
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from decoupled.benchmarks import plot, shaped_link, slow_block
from decoupled.benchmarks.peers.contest import Group, Measurement
from decoupled.benchmarks.peers.network import Link, Network, Unavailable
from decoupled.benchmarks.peers.setting import Setting
from decoupled.benchmarks.peers.slowed import STEPS, Jitter, Slowed
from decoupled.benchmarks.shaped_link import Findings, Pair, Run

TINY = Setting(model="resnet8", image=(1, 8, 8), batch_size=4, cut=2)
FACTS = {"cores": 2, "cpu": "a processor", "torch": "2", "python": "3", "system": "Linux", "date": "today"}


def lines(**kept: tuple[float, float]) -> Findings:
    """On 200 and 50 Mbit/s, 1000 samples/s unshaped; 12500 bytes per sample up and 100 down: 100 Mbit/s."""
    sent = (12500.0, 100.0)
    pairs = [{n: Pair(Run(1000.0 * k[i], sent), Run(1000.0, sent)) for n, k in kept.items()} for i in range(2)]
    return Findings([{Link(200, 5): pairs[0], Link(50, 5): pairs[1]}], 64, {"pipedream": 2})


def test_findings_ask_only_where_the_line_carries_the_bytes() -> None:
    found = lines(greedy_local=(0.95, 0.45), pipedream=(0.8, 0.4))
    wide, narrow = Link(200, 5), Link(50, 5)
    assert found.links == [wide, narrow]
    assert found.needed("pipedream") == pytest.approx(100)
    assert found.carries("pipedream", wide) and not found.carries("pipedream", narrow)
    assert found.by_rate("pipedream", narrow) == pytest.approx(0.5)
    assert found.holds("greedy_local") is True
    assert found.holds("pipedream") is False
    assert Findings([{narrow: found.rounds[0][narrow]}], 64, {}).holds("pipedream") is None


def test_what_an_order_keeps_follows_from_the_passes_under_way() -> None:
    """64 ms a batch; a round trip has 10 ms of delay and 64 * 12600 bytes at 200 Mbit/s: 32.3 ms."""
    found = lines(greedy_local=(0.95, 0.45), pipedream=(0.8, 0.4))
    assert found.by_order("pipedream", Link(200, 5)) == pytest.approx(128 / (128 + 10 + 32.256))
    assert Findings(found.rounds, 64, {"pipedream": 4}).by_order("pipedream", Link(200, 5)) == 1.0
    assert found.by_order("greedy_local", Link(200, 5)) == 1.0


def test_ratios_are_taken_within_a_pair() -> None:
    sent, line = (12500.0, 100.0), Link(200, 5)
    quick, slow = Pair(Run(800.0, sent), Run(1000.0, sent)), Pair(Run(300.0, sent), Run(500.0, sent))
    kept = Findings([{line: {"DDP": quick}}, {line: {"DDP": slow}}], 64, {}).kept("DDP", line)
    assert (kept.low, kept.high) == (pytest.approx(0.6), pytest.approx(0.8))


def test_the_page_says_where_what_falls() -> None:
    found = lines(greedy_local=(0.95, 0.45), pipedream=(0.75, 0.4), DDP=(0.4, 0.3))
    page = shaped_link.page(found, shaped_link.Options(rounds=1), "TCP with cubic. By a relay.", FACTS, 60.0)
    assert "| greedy_local | 1000 (1000 .. 1000) | 12500 | 100 | 100 | 1 of 1 | 0.95 | yes |" in page
    assert "| 200 Mbit/s, 5 ms | 0.95 | **0.75** of 0.75 | **0.40** |" in page
    assert "| 50 Mbit/s, 5 ms | 0.45 of 0.50 | 0.40 of 0.48 | 0.30 of 0.50 |" in page
    assert "| DDP | the line can carry its bytes | 200 Mbit/s, 5 ms (0.40) |" in page
    assert (
        "--rates 1000 500 50" in page
        and "a round trip has twice the delay. TCP with cubic. By a relay. The free" in page
    )


def test_the_picture_is_well_formed_and_has_every_line() -> None:
    found = lines(greedy_local=(0.95, 0.45), DDP=(0.4, 0.3))
    text = shaped_link.picture(found)
    tree = ET.fromstring(text)
    assert len(list(tree.iter("{http://www.w3.org/2000/svg}polyline"))) == 3  # two contestants and the limit
    assert "5 ms each way" in text


def test_axes_are_logarithmic_from_zero() -> None:
    axes = plot.Axes("x", "y", [10, 100, 1000], [0, 1])
    left, middle, right = (axes.place(x, 0.5)[0] for x in axes.x_ticks)
    assert middle == pytest.approx((left + right) / 2)
    assert axes.place(10, 0)[1] > axes.place(10, 1)[1] == axes.place(10, 7)[1] == 0


def test_every_rate_meets_every_delay() -> None:
    links = shaped_link.parse(["--rates", "10", "20", "--delays", "0", "3"]).links()
    assert links == [Link(10, 0), Link(10, 3), Link(20, 0), Link(20, 3)]


def test_the_unshaped_line_comes_first_on_one_line_and_second_on_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    class Line:
        now = Link()

        def shape(self, link: Link) -> None:
            self.now = link

    line, seen = Line(), dict[str, list[bool]]()
    options = shaped_link.Options(rounds=2, rates=[100], delays=[0, 1, 2])
    monkeypatch.setattr(shaped_link.contest, "start", lambda *_: nullcontext(shaped_link.groups(options.credit)))

    def measure(group: Group, run: str, *_: object) -> Run:
        seen.setdefault(group.runs[run], []).append(line.now == Link())
        return Run(1.0, (1.0, 1.0))

    monkeypatch.setattr(shaped_link, "_measure", measure)
    list(shaped_link.hold_rounds(options, line, lambda said: None))  # type: ignore[arg-type]
    once = [True, False, False, True, True, False]
    assert set(seen) == {*shaped_link.DECOUPLED, "torch 1F1B", "DDP"}
    assert all(found == once + [not first for first in once] for found in seen.values())


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--delays", "-1"], ["--rates", "0"]])
def test_wrong_options_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        shaped_link.parse(wrong)


def test_jitter_is_one_on_average_and_the_same_for_everybody() -> None:
    one, other = Jitter(3), Jitter(3)
    drawn = [one.draw() for _ in range(3 * STEPS)]
    assert drawn == [other.draw() for _ in range(3 * STEPS)]
    assert [sum(drawn[i : i + STEPS]) / STEPS for i in (0, STEPS, 2 * STEPS)] == [1.0] * 3
    assert min(drawn) > 0 and max(drawn) < 2 and drawn[:STEPS] != sorted(drawn[:STEPS])


def test_a_slowed_block_sleeps_and_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    ticks = iter(range(100))
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr("time.thread_time", lambda: float(next(ticks)))
    inner = nn.Linear(3, 2)
    block, x = Slowed(inner), torch.randn(4, 3, requires_grad=True)
    block(x).square().sum().backward()
    factors = [Jitter(0).draw(), Jitter(1).draw()]
    assert slept == factors  # each took one tick
    weight, at_x = inner.weight.grad, x.grad
    inner.weight.grad = x.grad = None
    inner(x).square().sum().backward()
    assert weight is not None and at_x is not None and inner.weight.grad is not None and x.grad is not None
    assert torch.equal(weight, inner.weight.grad) and torch.equal(at_x, x.grad)
    block.eval()(x)
    assert len(slept) == 2


def test_the_slow_blocks_page_compares_with_the_fastest_flush() -> None:
    seconds = {name: random.Random(0).random() + 1 for group in slow_block.groups(4) for name in group.runs.values()}
    seconds |= {slow_block.FREE: 1.0, "one_f_one_b_flush M=4": 1.25, "one_f_one_b_flush M=2": 1.5}
    rounds = [{name: Measurement(s, s, 0.0, 0.0) for name, s in seconds.items()}]
    page = slow_block.page(rounds, slow_block.Options(rounds=1), FACTS, 60.0)
    assert "| >= 1.20 | 1.25 (1.25 .. 1.25) | yes |" in page
    assert "| free(4) | 1000.0 (1000.0 .. 1000.0) | 64 |" in page


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_slow_block_runs(tmp_path: Path) -> None:
    options = slow_block.Options(rounds=1, batches=3, setting=TINY)
    files = slow_block.run(options, lambda line: None)
    assert "free(4)" in files["slow_block.md"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_shaped_line_runs() -> None:
    try:
        Network().close()
    except Unavailable as error:
        pytest.skip(f"no network namespaces here: {error}")
    options = shaped_link.Options(rounds=1, seconds=0.05, rates=[100], delays=[0, 1], setting=TINY)
    said: list[str] = []
    files = shaped_link.run(options, said.append)
    assert len(said) == 2
    assert "| 100 Mbit/s, 1 ms |" in files["shaped_link.md"]
    ET.fromstring(files["shaped_link.svg"])
