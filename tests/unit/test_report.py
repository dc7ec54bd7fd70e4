"""The report: numbers equal the records', text is escaped, the page stands alone, labels keep apart."""

import itertools
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from decoupled.config import CompareConfig, changed, plain, read
from decoupled.observe import charts, conditions
from decoupled.observe.conditions import settings
from decoupled.observe.report import _timelines, findings, render, summarise, table, write_report
from decoupled.records import threads


def record(method="backprop", seed=0, blocks=2, **changes):
    speed = 1.0 + seed / 10
    points = [(e, 0.5 + 0.1 * e + seed / 100) for e in (1, 2, 3)]
    curve = [{"epoch": e, "samples": 1000 * e, "seconds": e / speed, "validation_accuracy": a} for e, a in points]
    steps = [(f"block{k}", op, 5 + t / 1000) for k in range(blocks) for t, op in enumerate(("F0", "B0", "S"))]
    timeline = [{"actor": actor, "op": op, "start": start, "end": start + 0.001} for actor, op, start in steps]
    usual = {
        "method": method, "label": method.title(), "seed": seed, "config": {"method": method, "lr": 0.1},
        "status": "ok", "error": None, "kind": "method", "test_accuracy": 0.8 + seed / 100, "test_loss": 0.5,
        "epochs": 3, "samples": 3000, "wall_seconds": 3 / speed, "samples_per_second": 1000 * speed,
        "speedup_over_backprop": speed, "utilisation": [0.5] * blocks, "updates": [4] * blocks, "parameters": 1234,
        "peak_held_bytes": [2**20 * (k + 1) for k in range(blocks)], "auxiliary_parameters": 0,
        "bytes_up_per_sample": [2048.0] * (blocks - 1), "bytes_down_per_sample": [1024.0] * (blocks - 1),
        "staleness": [{"0": 1, "1": 3}] + [{"0": 4}] * (blocks - 1), "curve": curve, "timeline": timeline,
    }  # fmt: skip
    return usual | changes


def failed(method, error, seed=0):
    kept = {"method": method, "label": method.title(), "seed": seed, "kind": "method", "config": {}}
    return dict.fromkeys(record()) | kept | {"status": "failed", "error": error}


def control(method, seed=0, **changes):
    lists = ("utilisation", "peak_held_bytes", "bytes_up_per_sample", "bytes_down_per_sample", "staleness", "timeline")
    return record(method, seed, kind="control", **{key: [] for key in lists}, **changes)


def results(*records, **changes) -> dict[str, Any]:
    machine = dict.fromkeys(("torch", "python", "cpu", "threads", "device", "platform"), "x")
    usual: dict[str, Any] = {
        "suite": "quick", "created": "2026-01-02T03:04:05+00:00", "command": "decoupled compare", "data": "digits",
        "model": "mlp", "blocks": 2, "runtime": "threads", "baseline": "backprop", "environment": machine,
    }  # fmt: skip
    usual["records"] = list(records)
    return usual | changes


def full(blocks=2) -> dict[str, Any]:
    methods = ("backprop", "pipedream", "stochastic_block_admm", *(f"method_{n}" for n in range(10)))
    records = [record(m, s, blocks, samples_per_second=2e7 + s * 1e6) for m in methods for s in range(3)]
    return results(*records, control("plain_pytorch"), control("only_last"), failed("broken", "boom"), blocks=blocks)


class Page(HTMLParser):
    """Checks that tags balance; collects the table rows, all text, and the placed text of each chart."""

    def __init__(self, html):
        super().__init__()
        self.open, self.rows, self.charts, self.tags, self.words = [], [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attrs = {key: value or "" for key, value in attrs}
        self.tags.append((tag, attrs))
        self.open += [] if tag == "meta" else [tag]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append([])
        elif tag == "svg" and "chart" in attrs.get("class", ""):
            self.charts.append((attrs["aria-label"], [float(n) for n in attrs["viewbox"].split()], []))
        elif tag == "text":
            self.charts[-1][2].append([attrs, ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if "text" in self.open:
            self.charts[-1][2][-1][1] += data
        elif "title" not in self.open and ("td" in self.open or "th" in self.open) and data.strip():
            self.rows[-1][-1].append(data.strip())

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))


def boxes(texts):
    """(left, right, top, bottom, text) of placed text, each character taken as wide as charts.py takes it."""
    for attrs, text in texts:
        x, y, width = float(attrs["x"]), float(attrs["y"]), len(text.strip()) * charts.CHARACTER
        left = x - {"start": 0, "middle": width / 2, "end": width}[attrs.get("text-anchor", "start")]
        yield left, left + width, y - 10, y + 2, text


def test_numbers_in_the_table_are_those_of_the_records():
    changes = {"peak_held_bytes": [3 * 2**20, 2**20], "parameters": 98765, "auxiliary_parameters": 4321}
    data = results(*(record("backprop", s) for s in (0, 1, 2)), *(record("ddg", s, **changes) for s in (0, 2)))
    page = Page(render(data))
    head, backprop, ddg = page.rows[:3]
    names = [cell[0] for cell in head]
    shown = dict(zip(names, ddg, strict=True))
    assert backprop[names.index("Test accuracy")] == ["81.0", "80.0–82.0"]
    assert shown["Test accuracy"] == ["81.0", "80.0–82.0"]  # seeds 0 and 2: 0.80, 0.82
    assert shown["Speed-up"] == ["1.10", "1.00–1.20"]
    assert shown["Throughput"] == ["1,100", "1,000–1,200"]
    assert shown["Training"] == ["2.75", "2.50–3.00"]
    assert shown["Test loss"] == ["0.500"], "no range where all seeds agree"
    assert shown["Utilisation"] == ["50.0"]
    assert shown["Held at peak"] == ["4.00", "max 3.00"]  # MiB
    assert shown["Traffic up"] == ["2.00", "down 1.00"]  # KiB
    assert shown["Staleness"] == ["0.38", "max 1"]  # 3 of 8 updates
    assert shown["Parameters"] == ["98,765", "+ 4,321"]
    assert "2 of 3 seeds" in ddg[0][-1], "missing seeds are never hidden"


def test_what_corrections_keep_counts_as_held():
    changes: dict[str, Any] = {"peak_held_bytes": [3 * 2**20, 2**20], "correction_bytes": [2**19, 2**21]}
    page = Page(render(results(record("backprop", 0), record("spectrain", 0, **changes))))
    names = [cell[0] for cell in page.rows[0]]
    assert page.rows[2][names.index("Held at peak")] == ["6.50", "max 3.50"]  # MiB


def test_the_best_of_each_column_is_marked_among_methods_only():
    data = results(
        record("backprop", test_accuracy=0.9), record("ddg", test_accuracy=0.8, speedup_over_backprop=1.5),
        control("plain_pytorch", test_accuracy=0.99, speedup_over_backprop=3.0),
    )  # fmt: skip
    columns, rows = table(summarise(data))
    best = {column.head: [row["cells"][i]["best"] for row in rows] for i, column in enumerate(columns)}
    assert best["Test accuracy"] == [True, False, False]
    assert best["Speed-up"] == [False, True, False]
    assert not any(best["Parameters"])


def test_the_summary_names_the_fastest_the_most_accurate_and_the_level_ones():
    backprop = [record("backprop", s, test_accuracy=a, speedup_over_backprop=1.0) for s, a in enumerate((0.90, 0.92))]
    greedy = [record("greedy", s, test_accuracy=0.7, speedup_over_backprop=1.9) for s in (0, 1)]
    ddg = [record("ddg", s, test_accuracy=0.9, speedup_over_backprop=1.6) for s in (0, 1)]
    frozen = control("only_last", test_accuracy=0.75, speedup_over_backprop=9.0)
    data = results(*backprop, *greedy, *ddg, frozen)
    found = findings(summarise(data))
    assert [found[key].name for key in ("fastest", "best", "level")] == ["greedy", "backprop", "ddg"]
    assert [m.name for m in found["below"]] == ["greedy"]
    text = Page(render(data)).text
    assert "Greedy trained fastest: 1.90 times the speed of Backprop on the same runtime" in text
    assert "test accuracy of 70.0% against 91.0% of Backprop" in text
    assert "Ddg was the fastest: 1.60 times" in text
    assert "Not above this: Greedy;" in text
    assert "Numbers are means over 2 seeds" in text


def test_a_lead_in_accuracy_inside_the_range_over_seeds_is_said_to_be():
    backprop = [record("backprop", s, test_accuracy=a) for s, a in enumerate((0.90, 0.92))]
    better = [record("ddg", s, test_accuracy=a) for s, a in enumerate((0.915, 0.925))]
    said = "1.0 points above Backprop (their ranges over the seeds overlap)"
    assert said in Page(render(results(*backprop, *better))).text
    apart = [record("ddg", s, test_accuracy=0.95) for s in (0, 1)]
    assert "overlap" not in Page(render(results(*backprop, *apart))).text


def swept(method, size, loss, accuracy, rate, speedup, **changes):
    point, changes = {"point": {"batch_size": size}}, changes | {"label": method}
    found = record(method, **point, test_accuracy=accuracy, samples_per_second=rate, **changes)
    found["curve"][-1]["validation_loss"] = loss
    return found | {"speedup_over_backprop": speedup}


def test_a_speed_up_is_never_beside_the_baselines_numbers_of_another_point():
    small = [swept("backprop", 32, 0.2, 0.899, 12_100, 1.0), swept("pipedream", 32, 0.9, 0.4, 12_000, 0.99)]
    large = [swept("backprop", 128, 0.9, 0.576, 42_100, 1.0), swept("pipedream", 128, 0.2, 0.515, 44_200, 1.05)]
    html = render(results(*small, *large))
    page = Page(html)
    assert (
        "pipedream has the greatest speed-up: 1.05 times the speed of backprop at the same point (batch_size=128) on "
        "the same runtime, with a test accuracy of 51.5% against 57.6% of backprop there and 89.9% at the best point "
        "of backprop (batch_size=32)."
    ) in page.text
    assert "× baseline, same point" in page.text
    assert "throughputs of two rows do not divide to them" in page.text
    assert "dashed line" not in page.text
    assert 'class="reference"' not in html
    slower = Page(render(results(*small, large[0], large[1] | {"speedup_over_backprop": 0.9}))).text
    assert "No method trained faster than backprop at the same point of the sweep on the same runtime." in slower
    control_there = swept("plain_pytorch", 128, 0.2, 0.9, 80_000, 1.9, kind="control")
    text = Page(render(results(*small, large[0], control_there))).text
    assert "plain_pytorch, ran at 1.90 times the speed of backprop at the same point (batch_size=128)." in text


def test_speed_ups_at_the_baselines_own_point_are_told_plainly():
    both = [swept("backprop", 32, 0.2, 0.9, 12_100, 1.0), swept("ddg", 32, 0.2, 0.8, 13_000, 1.1)]
    html = render(results(*both, swept("backprop", 128, 0.9, 0.5, 42_100, 1.0)))
    text = Page(html).text
    assert "ddg trained fastest: 1.10 times the speed of backprop on the same runtime, with a test accuracy of" in text
    assert "at the same point" not in text
    assert "(dashed line)" in text
    assert 'class="reference"' in html


@pytest.mark.parametrize("blocks", [1, 2, 8, 32])
def test_no_label_of_a_chart_touches_another_or_leaves_the_chart(blocks):
    page = Page(render(full(blocks)))
    assert len(page.charts) >= 2 + 3 + 13 + 13
    for title, (_, _, width, height), texts in page.charts:
        placed = list(boxes(texts))
        for left, right, top, bottom, text in placed:
            inside = left >= -1 and right <= width + 1 and top >= -2 and bottom <= height + 1
            assert inside, (title, text)
        for one, two in itertools.combinations(placed, 2):
            apart = one[1] <= two[0] or two[1] <= one[0] or one[3] <= two[2] or two[3] <= one[2]
            assert apart, (title, one, two)


def test_every_method_keeps_its_style_through_the_page():
    summaries, page = summarise(full()), Page(render(full()))
    assert len({m.style for m in summaries}) == len(summaries)
    drawn = [attrs["class"] for tag, attrs in page.tags if tag == "g" and "series" in attrs.get("class", "")]
    assert sorted(drawn) == sorted([f"series {m.style}" for m in summaries if m.runs] * 2)


def test_text_from_the_records_is_escaped():
    evil = '<script>alert("x")</script>'
    data: dict[str, Any] = full() | dict.fromkeys(("suite", "command", "data", "model", "runtime"), evil)
    data["records"] = [r | {"label": evil + r["method"], "config": {evil: evil}} for r in data["records"]]
    data["records"].append(failed(evil, evil))
    data["records"][0]["timeline"] = [{"actor": evil, "op": evil, "start": 0.0, "end": 1.0}]
    html = render(data)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") > 20
    Page(html)


def test_the_page_needs_nothing_from_outside():
    html = render(full())
    assert not re.search(r"https?:|//[a-z]|url\(|@import", html)
    for tag, attrs in Page(html).tags:
        assert not {"src", "data", "action"} & set(attrs), tag
        assert attrs.get("href", "#").startswith("#")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium, which lays the page out")
def test_the_table_of_results_fits_into_a_page_of_1400_pixels(tmp_path):
    sizes = {"parameters": 11_173_962, "auxiliary_parameters": 123_456, "flops_per_sample": [4.9e8, 1.2e8]}
    runs = [record(m, s, samples_per_second=2e5 + 5e4 * s, test_loss=1.145 + s / 9, **sizes)
            for m in ("backprop", "stochastic_block_admm") for s in (0, 1)]  # fmt: skip
    measure = (
        "<script>let e = document.querySelector('#results ~ .scroll'); document.title = e.scrollWidth - e.clientWidth"
    )
    page = tmp_path / "report.html"
    page.write_text(re.sub('<meta http-equiv="Content-Sec[^>]*>', "", render(results(*runs))) + measure + "</script>")
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    words = [*browser, "--window-size=1400,1000", "--dump-dom", page.as_uri()]
    found = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>0</title>" in found, "how many pixels are cut off"


def test_controls_stand_apart_below_the_methods():
    rows = Page(render(full())).rows
    first = [row[0][0] for row in rows]
    line = next(i for i, name in enumerate(first) if name.startswith("Controls"))
    assert first[line + 1 : line + 3] == ["Plain_Pytorch", "Only_Last"]
    assert "Backprop" in first[:line]
    assert rows[line + 1][-4:-1] == [["–"]] * 3, "what a control does not have is a dash"


def test_failures_are_shown_with_their_error():
    page = Page(render(results(record(), failed("ddg", "Traceback:\n  line\nBlockError: block 1, batch 7"))))
    row = next(row for row in page.rows if row[0][0] == "Ddg")
    assert row[1] == ["failed: BlockError: block 1, batch 7"]
    assert "Runs failed in 1 method: Ddg." in page.text
    assert "Traceback: line BlockError" in page.text


def test_a_failed_seed_does_not_hide_the_others():
    page = Page(render(results(record(), record(seed=1), record("ddg"), failed("ddg", "boom", seed=1))))
    row = next(row for row in page.rows if row[0][0] == "Ddg")
    assert row[1] == ["80.0"]
    assert "1 of 2 seeds" in row[0][-1]
    assert "boom" in page.text


@pytest.mark.parametrize("key", [k for k in record() if k not in ("method", "seed", "status")])
def test_any_value_may_be_missing(key):
    absent = {k: v for k, v in record("ddg").items() if k != key}
    empty = [] if isinstance(record()[key], list) else None
    for gap in (absent, record("ddg") | {key: None}, record("ddg") | {key: empty}):
        Page(render(results(record(), gap)))
        Page(render(results(gap)))


@pytest.mark.parametrize(
    "data",
    [
        results(),
        results(record()),
        results(record("ddg", speedup_over_backprop=None)),
        results(failed("backprop", None), failed("ddg", "")),
        results(control("plain_pytorch")),
        results(record(test_accuracy=math.nan, test_loss=math.inf), record("ddg")),
        results(record(peak_held_bytes=[0, 0], utilisation=[0.0, 0.0], bytes_up_per_sample=[0.0])),
        results(record(blocks=1), environment={}, created=None, blocks=None),
        results(record(curve=[{"epoch": 1, "seconds": 0.0, "validation_accuracy": 0.5}])),
        results(record(curve=[{"epoch": 1, "samples": 10, "validation_accuracy": math.nan}])),
        results(record(timeline=[{"actor": "block0", "op": "S", "start": 1.0, "end": 1.0}])),
        results(record(staleness=[{}, None, {"0": 0}]), record("ddg", staleness=[{"0": 1, "400": 2}])),
    ],
)
def test_unusual_results_still_make_a_page(data):
    before = repr(data)
    assert ">nan<" not in render(data)
    assert before == repr(data), "the results are only read"


def test_curves_are_means_over_the_seeds_of_an_epoch():
    longer = record(seed=2)
    longer["curve"].append({"epoch": 4, "samples": 4000, "seconds": 4.0, "validation_accuracy": 0.1})
    html = render(results(record(seed=0), longer))
    series = re.findall(r'<g class="series [^"]*"><title>Backprop (\S+)</title>', html)
    assert series == ["81.0", "81.0"]  # epoch 3, which both seeds have: 0.80 and 0.82


def test_two_settings_of_a_method_stay_apart():
    two, three = (record("overlap", label=f"overlap(reach={n})", test_accuracy=n / 10) for n in (2, 3))
    rows = Page(render(results(record(), two, three))).rows
    assert [row[:2] for row in rows[2:4]] == [
        [["overlap(reach=2)", "overlap"], ["20.0"]], [["overlap(reach=3)", "overlap"], ["30.0"]]
    ]  # fmt: skip


def test_write_report_makes_the_folder(tmp_path):
    write_report(full(), tmp_path / "a" / "report.html")
    assert (tmp_path / "a" / "report.html").read_text(encoding="utf-8") == render(full())


def test_ticks_are_round_and_inside():
    assert charts.ticks(0, 0.9) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert charts.ticks(63, 91) == pytest.approx([70, 80, 90])
    assert charts.ticks(-3, 3) == pytest.approx([-2, 0, 2])
    assert charts.tick_texts([0.0, 0.2, 0.4]) == ["0.0", "0.2", "0.4"]
    assert charts.tick_texts([0, 10_000, 20_000]) == ["0", "10,000", "20,000"]


def test_spread_keeps_order_distance_and_place():
    assert charts.spread([10, 50, 90], 15, 0, 100) == [10, 50, 90]
    assert charts.spread([50, 50, 50], 10, 0, 100) == pytest.approx([40, 50, 60])
    assert charts.spread([0, 1, 99, 100], 15, 0, 100) == pytest.approx([0, 15, 85, 100])


def test_significant_digits():
    numbers = (0, 12345.6, 1.2345, 0.00012345, 999.6, math.nan)
    assert [charts.significant(n) for n in numbers] == ["0", "12,300", "1.23", "0.000123", "1,000", "not finite"]


@pytest.mark.parametrize(("count", "text"), [(1, "1 thread"), (2, "2 threads")])
def test_threads_are_counted_in_words(count, text, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    assert threads() == text
    machine = results()["environment"] | {"threads": count}
    assert f", {count} intra-op{text[1:]} " in Page(render(results(record(), environment=machine))).text


def test_settings_leave_out_what_does_not_apply():
    config = {"task": None, "env": None, "steps": 9, "precision": "bf16", "method": {"name": "x", "sigma": None}}
    assert settings(config) == {"sigma": "null", "precision": "bf16"}
    assert settings(config | {"env": "Hopper-v5"})["steps"] == "9"


@pytest.mark.parametrize(
    "point",
    [
        {"lr": 0.5, "blocks": [1, 2]}, {"model.width": 8, "data.limit": 9}, {"recipe.lr": 0.2, "runtime": "simulated"},
        {"recipe": {"optimizer": "adam", "lr": 0.01}}, {"data": {"limit": 7}}, {"model": {"name": "mlp", "depth": 2}},
    ],
)  # fmt: skip
def test_the_page_knows_the_configuration_of_a_point_as_it_ran(point):
    config = read(CompareConfig, ["data={name: digits, limit: 5}", "model=resnet8"])
    assert conditions.at(plain(config), point) == plain(changed(config, point))


def test_what_is_swept_is_said_with_the_values_that_ran():
    words = ["sweep={lr: [0.3, 0.5], blocks: [1, 3], model.width: [8, 16]}", "model={name: mlp, width: 32}"]
    config = plain(read(CompareConfig, words))
    points = [{"lr": lr, "blocks": n, "model.width": w} for lr, n, w in ((0.3, 1, 8), (0.5, 1, 8), (0.5, 3, 16))]
    runs = [record("ddg", n, point=point) | {"blocks": point["blocks"]} for n, point in enumerate(points)]
    html = render(results(*runs, config=config))
    assert "<code>lr=0.3 or 0.5</code>" in html
    assert "<code>width=8 or 16</code>" in html
    text = Page(html).text
    assert "1 method on digits with mlp(width=8) or mlp(width=16)" in text
    assert "Blocks and runtime1 or 3 blocks, threads" in text
    other: Any = {"point": {"model": "resnet8", "data": "xor", "runtime": {"name": "simulated", "jitter": 0.1}}}
    text = Page(render(results(record("ddg"), record("ddg", 1, **other), config=config | {"data": "digits"}))).text
    assert "on digits or xor with mlp(width=32) or resnet8" in text
    assert "threads or simulated(jitter=0.1)" in text
    assert "Where the runtime was simulated: times are" in text


def test_the_legend_of_timelines_says_what_a_letter_means_for_whom() -> None:
    spans = [("block0", "F0"), ("block0", "E0"), ("actor 0", "E0"), ("learner", "L0"), ("evaluator", "evaluation")]
    timeline = [{"actor": a, "op": op, "start": n, "end": n + 1.0} for n, (a, op) in enumerate(spans)]
    one: Any = SimpleNamespace(label="x", runs=[{"seed": 0, "timeline": timeline}])
    found = _timelines([one])
    assert found["legend"] == {"F": "forward", "E": "act / emit", "L": "learn"}
    assert 'class="op op-L"' in found["figures"][0][1] and 'class="op op-other"' in found["figures"][0][1]


def test_labels_of_bars_begin_inside_the_picture() -> None:
    label = "larger_rl(units=16, ofe_units=8, ofe_layers=2)"
    bars = charts.bar_chart([charts.Bar(label, "k0", [1.0], "1")], "x", "t")
    blocks = charts.block_bars([(label, "k0", [0.5])], "t")
    for picture in (bars, blocks):
        found = re.search(r'<text x="([0-9.]+)"[^>]*text-anchor="end"[^>]*>(larger_rl[^<]*)<', str(picture))
        assert found and float(found[1]) - len(found[2]) * charts.CHARACTER >= 0, picture


@pytest.mark.parametrize(
    ("characters", "shown"), [(40, "dsp(corrections=['discrepancy'])"), (12, "dsp(c…ncy'])"), (2, "…)"), (1, "…")]
)
def test_a_label_that_does_not_fit_keeps_both_ends(characters, shown):
    assert charts.short("dsp(corrections=['discrepancy'])", characters * charts.CHARACTER) == shown
    assert len(shown) <= characters
