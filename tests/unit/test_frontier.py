"""Price and time of a loss, the frontier, and claims held against results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from decoupled import cli
from decoupled.config import CompareConfig, read, suite_methods, suites
from decoupled.errors import UserError
from decoupled.flops import cost
from decoupled.models import build
from decoupled.observe import claims, frontier
from decoupled.observe.frontier import configurations, least, reach
from decoupled.observe.report import render
from decoupled.specs import label


def record(label: str, point: int, losses: list[float], seed: int = 0, chain: float = 1e6, **changes: Any) -> dict:
    """A run whose epochs take one second and `point` million FLOPs each, `chain` of them on the critical path."""
    curve = [
        {"epoch": e, "seconds": e, "flops": e * 1e6 * point, "sequential_flops": e * chain, "validation_loss": loss}
        for e, loss in enumerate(losses, 1)
    ]
    prices = {"example": 1e6, "chain": chain, "head": 0.0, "update": 0.0, "longest_update": 0.0}
    usual = {
        "label": label, "method": label, "point": {"batch_size": point}, "seed": seed, "status": "ok", "curve": curve,
        "flops": prices, "kind": "method", "test_accuracy": 0.5, "speedup_over_backprop": 1.0,
    }  # fmt: skip
    return usual | changes


def results(records: list[dict], **config: Any) -> dict[str, Any]:
    machine: dict[str, Any] = dict.fromkeys(("torch", "python", "cpu", "threads", "device", "platform"), "x")
    return {
        "suite": "s", "created": "2026-01-02", "command": "c", "data": "d", "model": "m", "blocks": 4,
        "runtime": "threads", "baseline": "a", "environment": machine | {"cores": 2}, "config": config,
        "records": records,
    }  # fmt: skip


def test_a_loss_is_reached_between_two_evaluations() -> None:
    run = record("a", 2, [3.0, 1.0, 2.0, 0.5])
    assert reach(run, 1.5) == {"seconds": 1.75, "flops": 3.5e6, "sequential_flops": 1.75e6}
    assert reach(run, 4.0) == {"seconds": 1.0, "flops": 2e6, "sequential_flops": 1e6}, "no earlier than measured"
    assert reach(run, 0.4) is None
    assert reach(record("a", 1, [math.nan, 0.1]), 1.0) is None, "diverged"


def test_a_configuration_counts_if_all_its_seeds_reach_the_loss() -> None:
    runs = [record("a", 1, [1.0], 0), record("a", 1, [2.0, 1.0], 1), record("a", 2, [1.0], 0), record("a", 2, [9.0], 1)]
    (one,) = configurations(runs, 1.0)
    assert one["seconds"] == 1.5
    assert least(runs, 1.0, "flops") == 1.5e6
    assert least(runs, 0.5, "flops") == math.inf


def test_the_page_says_that_all_seeds_must_reach_a_loss() -> None:
    runs = [record("a", 1, [0.5], 0), record("a", 1, [1.0], 1), record("b", 1, [1.0], 0), record("b", 1, [1.0], 1)]
    page = render(results(runs, cutoffs=[1.0, 0.6, 0.1]))
    assert "of which all seeds reach the loss;" in page
    assert "<p>Not reached by all seeds of any configuration. At most: a, 1 of 2 seeds.</p>" in page, (
        "their mean is 0.75"
    )
    assert "<p>Not reached by all seeds of any configuration.</p>" in page, "0.1"
    runs[3] = record("b", 1, [0.5], 1)
    assert "<small>reached by 1 of 2 seeds at most</small>" not in render(results(runs[:1] + runs[2:], cutoffs=[1.0]))
    assert "<small>reached by 1 of 2 seeds at most</small>" in render(results(runs[:1] + runs[2:], cutoffs=[0.6]))
    alone = render(results([record("a", 1, [0.5])], cutoffs=[0.1]))
    assert "<p>No configuration reached it.</p>" in alone


def test_a_seed_that_failed_did_not_reach_a_loss() -> None:
    broken = record("b", 1, [], 1, status="failed", flops=None, error="boom", test_accuracy=None)
    runs = [record("a", 1, [0.5], 0), record("a", 1, [0.5], 1), record("b", 1, [0.5], 0), broken]
    shown = frontier.section(results(runs, cutoffs=[0.6]), {"a": "kb d0", "b": "k0 d0"})
    assert shown is not None
    assert [row["cells"][0] for row in shown["cutoffs"][0]["rows"]] == ["1.00", "–"]
    assert shown["cutoffs"][0]["rows"][1]["partly"] == "1 of 2 seeds"
    assert shown["uncounted"] == []


def test_the_frontier_has_what_nothing_beats_in_both() -> None:
    points = [(3, 3), (1, 9), (2, 4), (2, 3), (4, 1), (5, 1)]
    assert frontier.frontier(points) == [(1, 9), (2, 3), (4, 1)]
    assert frontier.frontier([]) == []


CLAIM = {"text": "quality", "measure": "validation_loss", "order": [["a"], ["b", "gone"], ["c"]]}
TIME = {"text": "time", "measure": "seconds", "order": [["b"], ["a"]]}


def test_claims_are_computed_from_the_records() -> None:
    runs = [
        *[record("a", 1, [0.5 + seed / 10], seed) for seed in (0, 1)],
        *[record("b", 1, [0.7 + seed / 10], seed) for seed in (0, 1)],
        *[record("c", 1, [0.75 + seed / 10], seed) for seed in (0, 1)],
    ]
    (found,) = claims.findings(results(runs, claims=[CLAIM]))
    assert [step.verdict for step in found.steps] == ["yes", "open"]
    assert found.verdict == "1 of 2 steps reproduced, 1 open"
    (found,) = claims.findings(results(runs, claims=[CLAIM | {"order": [["b"], ["a"]]}]))
    assert found.verdict == "not reproduced"
    assert "0.750" in str(found.steps[0])


def test_claims_about_reaching_a_loss() -> None:
    runs = [record("a", 1, [1.0, 0.5], chain=4e6), record("b", 1, [1.0, 0.9], chain=1e6)]
    claim = {"text": "time", "measure": "sequential_flops", "order": [["b"], ["a"]], "cutoff": "each"}
    loose, tight, never = claims.findings(results(runs, claims=[claim], cutoffs=[1.0, 0.6])), [], []
    assert [(f.text, f.verdict) for f in loose] == [
        ("time (loss 1)", "reproduced"), ("time (loss 0.6)", "not reproduced")
    ]  # fmt: skip
    assert "b not reached" in str(loose[1].steps[0])
    tight = claims.findings(results(runs, claims=[claim | {"cutoff": "tightest"}], cutoffs=[1.0, 0.6, 0.1]))
    assert [f.text for f in tight] == ["time (loss 0.6)"]
    for cutoff in (0.1, "tightest", "each"):
        (never,) = claims.findings(results(runs, claims=[claim | {"cutoff": cutoff}], cutoffs=[0.1]))
        assert never.text == "time (loss 0.1)"
        assert never.verdict == "not checked: not reached by all seeds of any configuration"


def test_a_claim_that_cannot_be_checked_stays_and_says_why() -> None:
    runs = [record("a", 1, [0.5]), record("b", 1, [math.nan]), record("c", 1, [math.nan]), record("d", 1, [0.6])]
    runs[3] |= {"flops": None, "curve": [{"epoch": 1, "seconds": 1, "validation_loss": 0.6}]}
    quality, chain = {"text": "q", "measure": "validation_loss"}, {"text": "s", "measure": "chain"}
    price = {"text": "p", "measure": "flops", "cutoff": 0.7}

    def verdict(claim: dict, *order: list[str]) -> str:
        (found,) = claims.findings(results(runs, claims=[claim | {"order": list(order)}]))
        return found.verdict

    assert verdict(quality, ["b"], ["c"]) == "not checked: no run ended with a loss"
    assert verdict(quality, ["a"], ["b"], ["c"]) == "1 of 2 steps reproduced, 1 not checked"
    assert verdict(quality, ["a"], ["gone", "lost"]) == "not checked: not run: gone, lost"
    assert verdict(chain, ["a"], ["d"]) == verdict(price, ["d"], ["a"]) == "not checked: FLOPs were not counted"
    said = [CLAIM | {"order": [["a"], ["b", "gone"], ["c"]]}, price | {"order": [["b"], ["c"]]}]
    page = render(results(runs, claims=said, cutoffs=[0.7]))
    for text in ("a 0.500 before b failed or diverged: yes", "before c failed or diverged: not checked",
                 "Not run, so left out: gone", "p (loss 0.7): not checked: not reached by all seeds"):  # fmt: skip
        assert text in page


def test_claims_about_the_critical_path_are_checked_for_every_model() -> None:
    runs = [
        record(x, n, [1.0], chain=chain) for x, n, chain in (("a", 1, 1e6), ("b", 1, 2e6), ("a", 2, 4e6), ("b", 2, 3e6))
    ]
    runs = [run | {"point": {"blocks": run["point"]["batch_size"]}} for run in runs]
    claim = {"text": "s", "measure": "chain", "order": [["a"], ["b"]]}
    found = claims.findings(results(runs, claims=claim))
    assert [(f.text, f.verdict) for f in found] == [
        ("s (blocks=1)", "reproduced"), ("s (blocks=2)", "not reproduced")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "cutoffs", "message"),
    [
        ([{"text": "x"}], [], "a claim has text, measure, order"),
        ([CLAIM | {"measure": "los"}], [], "unknown measure 'los'"),
        ([CLAIM | {"cutoff": 1.0}], [], "a cutoff goes with"),
        ("x", [], "a claim has"),
        ([CLAIM | {"text": 5}], [], "the text of a claim must be words, got 5"),
        (
            [CLAIM | {"order": ["a", "b"]}],
            [],
            "order must be a list of two groups or more, got ['a', 'b']; write [[a], ",
        ),
        ([CLAIM | {"order": 5}], [], "order must be a list of two groups or more, got 5"),
        ([CLAIM | {"order": [["a"]]}], [], "two groups or more"),
        ([CLAIM | {"order": [["a"], []]}], [], "two groups or more"),
        ([CLAIM | {"order": [["a"], [{"name": "b"}]]}], [], "a group must list labels, got {'name': 'b'}"),
        (
            [CLAIM | {"order": [["backprob"], ["a"]]}],
            [],
            "claim 'quality': 'backprob' is none of what is compared. Did",
        ),
        ([CLAIM | {"order": [["a"], ["b", "a"]]}], [], "'a' stands in order more than once"),
        (
            [TIME | {"cutoff": "loosest"}],
            [0.5],
            "cutoff must be tightest, each, or a validation loss above 0, got 'loo",
        ),
        ([TIME | {"cutoff": -1}], [0.5], "cutoff must be"),
        ([TIME | {"cutoff": None}], [0.5], "cutoff must be"),
        ([TIME | {"cutoff": "each"}], [], "there are none; write cutoffs=[0.5]"),
        ([], 0.5, "cutoffs must be a list"),
        ([], [-1], "cutoffs must be a list"),
    ],
)
def test_wrong_claims_are_one_clear_line(wrong: Any, cutoffs: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        claims.check(wrong, cutoffs, ["a", "b", "c", "gone", "backprop"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suite", suites())
def test_the_suites_claim_what_can_be_checked(suite: str) -> None:
    config = read(CompareConfig, [f"suite={suite}"])
    assert suite_methods(suite) == config.methods
    claims.check(config.claims, config.cutoffs, {label(spec) for spec in config.methods})


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ("order: [backprop, greedy_local]", "order must be a list of two groups"),
        ("order: [[backprob], [greedy_local]]", "'backprob' is none of what is compared. Did you mean 'backprop'?"),
        ("cutoff: loosest, order: [[backprop], [greedy_local]]", "cutoff must be tightest, each, or"),
    ],
)
def test_a_wrong_claim_is_refused_before_anything_is_trained(
    claim: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    measure = "seconds" if "cutoff" in claim else "validation_loss"
    words = ["methods=[backprop,greedy_local]", "cutoffs=[1.0]", f"claims=[{{text: x, measure: {measure}, {claim}}}]"]
    assert cli.main(["compare", *words, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_claims_may_be_about_controls_and_about_methods_of_the_suite_that_are_not_asked_for(tmp_path: Path) -> None:
    suite = tmp_path / "mine.yaml"
    suite.write_text(
        "baseline: backprop\nmethods: [backprop, ddg]\ndata: {name: digits, limit: 50}\nblocks: 1\n"
        "model: {name: mlp, width: 8, depth: 2}\nepochs: 1\nseeds: 1\nclaims:\n"
        "  - {text: x, measure: validation_loss, order: [[backprop], [ddg], [only the last block]]}\n"
    )
    words = [f"suite={suite}", "methods=[backprop]", "--quiet", "--out", str(tmp_path / "out")]
    assert cli.main(["compare", *words]) == 0
    assert "Not run, so left out: ddg" in (tmp_path / "out" / "report.html").read_text()


def test_the_page_shows_frontiers_prediction_and_claims() -> None:
    runs = [record("a", n, [1.0, 0.5], chain=1e6) for n in (1, 2)] + [record("b", 1, [1.0, 0.5], chain=5e5)]
    data = results(runs, claims=[CLAIM], cutoffs=[0.6, 0.1])
    shown = frontier.section(data, {"a": "kb d0", "b": "k0 d0"})
    assert shown is not None
    assert [part["cutoff"] for part in shown["cutoffs"]] == ["0.6", "0.1"]
    assert [len(part["figures"]) for part in shown["cutoffs"]] == [2, 0]
    predicted = {row["label"]: row["cells"][2:4] for row in shown["model"]}
    assert predicted == {"a": ["1.00", "1.00"], "b": ["2.00", "2.00"]}
    page = render(data)
    for text in ("sequential MFLOP", "No configuration reached it", "quality: ", "Predicted"):
        assert text in page
    assert "Left out" not in page
    left_out = render(results([*runs, record("b", 2, [1.0, 0.5], flops=None)], cutoffs=[0.6]))
    assert "Left out, for their FLOPs are not counted: b, batch_size=2." in left_out


def test_what_the_model_predicts_is_said_of_every_model_of_a_sweep() -> None:
    def at(label: str, blocks: int, lr: float, chain: float, faster: float) -> dict:
        found = record(label, 1, [1.0], chain=chain, speedup_over_backprop=faster, blocks=blocks)
        return found | {"point": {"blocks": blocks, "lr": lr}}

    runs = [at("a", n, lr, 1e6, 1.0) for n in (1, 4) for lr in (0.1, 0.2)]
    runs += [at("b", 1, lr, 8e5, 1.1) for lr in (0.1, 0.2)] + [at("b", 4, 0.1, 2.5e5, 1.5), at("b", 4, 0.2, 2.5e5, 1.7)]
    shown = frontier.section(results(runs, cutoffs=[1.0]), {"a": "kb d0", "b": "k0 d0"})
    assert shown is not None
    rows = {row["label"]: row["cells"][1:] for row in shown["model"]}
    assert rows["b, blocks=1"] == ["0.800", "1.25", "1.00", "1.10 (1.10–1.10)"], "one worker does all of both"
    assert rows["b, blocks=4"] == ["0.250", "4.00", "2.00", "1.60 (1.50–1.70)"]
    assert list(rows) == ["a, blocks=1", "a, blocks=4", "b, blocks=1", "b, blocks=4"], "not one per learning rate"
    assert shown["workers"] == "1 or 2"
    assert "1 or 2 workers" in render(results(runs, cutoffs=[1.0]))


def test_compare_prices_a_run_as_flops_counts_it(tmp_path: Path) -> None:
    out, size = tmp_path / "out", 40
    words = ["data={name: digits, limit: 100}", "model={name: mlp, width: 16, depth: 3}", "blocks=[1,2]", "epochs=2"]
    words += ["methods=[backprop,greedy_local,block_admm]", "cutoffs=[5.0]", "seeds=1", "controls=false"]
    assert cli.main(["compare", *words, f"batch_size={size}", "optimizer=adam", "--quiet", "--out", str(out)]) == 0
    backprop, greedy, admm = json.loads((out / "results.json").read_text())["records"]
    assert admm["flops"] is None
    units = build({"name": "mlp", "width": 16, "depth": 3}, (1, 8, 8), 10)
    for record, name in ((backprop, "backprop"), (greedy, "greedy_local")):
        expected = cost(units, (1, 8, 8), name, update=13)
        last = record["curve"][-1]
        steps = 2 * 3  # epochs of 40, 40 and 20 examples
        assert last["flops"] == pytest.approx(200 * expected.price(1) + (steps - 200) * (expected.price(0)))
        assert last["sequential_flops"] == pytest.approx(steps * expected.time())


@pytest.mark.parametrize("method", ["backprop", "dgl_async", "frozen_below", "pipemare", "pipedream_2bw"])
def test_a_run_is_priced_by_what_its_blocks_did(method: str, tmp_path: Path) -> None:
    """Also where a block takes batches several times, makes no step, or one for several micro-batches."""
    out, size = tmp_path / "out", 25
    words = ["data={name: digits, limit: 100}", "model={name: mlp, width: 16, depth: 3}", "blocks=[1,2]", "epochs=2"]
    words += [f"methods=[{method}]", f"baseline={method}", "cutoffs=[5.0]", "seeds=1", "controls=false"]
    words += ["runtime={name: simulated}", f"batch_size={size}", "--quiet", "--out", str(out)]
    assert cli.main(["compare", *words]) == 0
    (record,) = json.loads((out / "results.json").read_text())["records"]
    units = build({"name": "mlp", "width": 16, "depth": 3}, (1, 8, 8), 10)
    counted, last = cost(units, (1, 8, 8), method, update=4), record["curve"][-1]
    seen, steps = last["block_samples"], record["updates"]
    assert last["block_updates"] == steps
    if method == "dgl_async":
        assert max(seen) > 200, "the blocks above take batches again"
        assert steps == [n // size for n in seen]
    elif method == "frozen_below":
        assert (seen, steps) == ([200] * 3, [0, 8, 8])
    else:
        assert (seen, steps) == ([200] * 3, [8] * 3)
    work = [n * block.work for n, block in zip(seen, counted.blocks, strict=True)]
    update = [n * block.update for n, block in zip(steps, counted.blocks, strict=True)]
    assert last["flops"] == pytest.approx(sum(work) + sum(update))
    chains = [sum(work[k] for k in run) / size for run in counted.locked]
    assert last["sequential_flops"] == pytest.approx(max(chains) + max(update))
