"""`decoupled compare`: every method under equal conditions, three files that say how it went.

DIR/results.json   one record per method and seed
DIR/report.html    the same for a reader
DIR/trace.json     the first operations of every method, for Perfetto

results.json is written after every run, so that an interrupted comparison can be resumed: what has ended well stays,
and only the rest is run.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from decoupled import costs, registry, resumed, sweep
from decoupled.config import CompareConfig, baseline, plain, suite_methods
from decoupled.errors import OperationError, UserError
from decoupled.observe.claims import check
from decoupled.observe.points import describe
from decoupled.observe.progress import Reporter
from decoupled.observe.recorder import Recorder
from decoupled.observe.report import write_report
from decoupled.observe.trace import Span, write_trace
from decoupled.records import environment, threads
from decoupled.specs import label

Spec = str | Mapping[str, Any]


def compare(
    config: CompareConfig, out: Path, command: str, quiet: bool = False, resume: bool = False
) -> dict[str, Any]:
    """Run a comparison and write its files.

    A method that fails is recorded with its error; the others go on. On Ctrl-C what is finished is still written.

    Args:
        config: what to compare. out: a directory that does not exist yet, or is empty.
        command: how this was called, for the report.
        quiet: say nothing.
        resume: go on with the comparison in `out`: its runs that ended well are kept, with the cuts they had, and the
            others are tried again. Methods, seeds and points of the sweep may be added, none may be missing.

    Returns:
        The content of results.json.

    Raises:
        UserError: nothing to compare, an unknown name, `out` holds files, or to be resumed it holds none, or those of
            another comparison or of other data, or another process writes to it.
    """
    given = config.methods if isinstance(config.methods, list) else [config.methods]
    kind = sweep.kind(config)
    specs: list[Spec] = list(given) or list(registry.methods(kind.trains))
    if kind.baseline is None and config.baseline not in map(label, specs):
        specs.insert(0, baseline(config))  # no table without it
    if config.seeds < 1:
        raise UserError(f"seeds must be at least 1, got {config.seeds}")
    for spec in specs:
        registry.make(spec, kind.trains)  # wrong names are refused before anything runs
    check(config.claims, config.cutoffs, _labels(config, specs) if config.claims else ())
    with ExitStack() as stack:
        if resume:
            stack.enter_context(resumed.alone(out))
        before = resumed.read(out, config, kind.controls) if resume else {}
        settings = sweep.settings(config, [(record["point"], record["cuts"]) for record in before.values()])
        contestants: list[Spec] = [*specs, *(kind.controls if config.controls else ())]
        asked = {
            (seed, describe(point), label(spec)): (seed, point, setting, spec)
            for seed, (point, setting), spec in itertools.product(range(config.seeds), settings, contestants)
        }
        if resume:
            resumed.check(out, before, asked, settings[0][1].summary)
        else:
            fresh_directory(out, "choose another --out, remove it, or go on with a comparison by --resume")
            stack.enter_context(resumed.alone(out))
        return _compare(config, asked, before, out, command, quiet)


def _labels(config: CompareConfig, specs: Sequence[Spec]) -> set[str]:
    """Whom claims may be about: what is compared, and the suite's methods, though fewer may be asked for."""
    kind = sweep.kind(config)
    controls = (text.format(threads=threads()) for text in kind.controls.values())
    suite = suite_methods(config.suite) or registry.methods(kind.trains)
    return {*map(label, [*specs, *suite]), *controls}


def _compare(
    config: CompareConfig,
    asked: Mapping[resumed.Run, tuple[int, sweep.Point, sweep.AnySetting, Spec]],
    before: Mapping[resumed.Run, dict[str, Any]],
    out: Path,
    command: str,
    quiet: bool,
) -> dict[str, Any]:
    """Run what is missing, and write the files."""
    found, recorders = dict(before), list[Recorder]()
    missing = [run for run in asked if run not in found or found[run]["status"] != "ok"]
    _, first, main, _ = next(iter(asked.values()))

    def results() -> dict[str, Any]:
        return _results(config, main, [found[run] for run in asked if run in found], command)

    with Reporter(sum(asked[run][2].samples for run in missing), quiet) as reporter:
        try:
            for run in missing:
                seed, point, setting, spec = asked[run]
                traced = recorders if seed == 0 and point == first else []
                found[run] = _one(setting, point, spec, seed, reporter, traced)
                resumed.save(out, _finite(results()))
        finally:
            _write(out, results(), recorders)
    return results()


def fresh_directory(out: Path, remedy: str = "choose another --out, or remove it") -> None:
    """Make `out`; refuse to write where files are.

    Args:
        remedy: what to do where there are files.

    Raises:
        UserError: it exists and is not an empty directory.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; nothing was overwritten: {remedy}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the directory {out} ({error.strerror}); choose another --out") from None


def _one(
    setting: sweep.AnySetting,
    point: sweep.Point,
    spec: Spec,
    seed: int,
    reporter: Reporter,
    recorders: list[Recorder],
) -> dict[str, Any]:
    where = {"point": point, "blocks": len(setting.cuts) + 1, "cuts": setting.cuts}
    what = " ".join(filter(None, (f"{label(spec):24}", describe(point), f"seed {seed}")))
    reporter.start(what)
    began = time.perf_counter()
    try:
        if isinstance(spec, str) and spec in setting.controls:
            record = setting.run_control(spec, seed, reporter.advance)
        else:
            record, recorder = setting.run_method(spec, seed, reporter.advance)
            recorders.append(recorder)
    except (OperationError, UserError) as error:  # a method may refuse the optimizer of a point
        reporter.line(f"{what}  failed: {error}")
        return _failed(spec, seed, error) | where
    score = record.get("test_score", record["test_accuracy"])
    reporter.line(
        f"{what}  test {record.get('metric', 'accuracy')} {score:.3f}  "
        f"{record['samples_per_second']:8.0f} samples/s  {time.perf_counter() - began:5.1f} s"
    )
    return record | where


def _failed(spec: Spec, seed: int, error: Exception) -> dict[str, Any]:
    name = spec if isinstance(spec, str) else str(spec["name"])
    nothing = dict.fromkeys(
        ("test_accuracy", "test_loss", "wall_seconds", "samples_per_second", "speedup_over_backprop", "parameters")
    )
    lists = ("utilisation", "peak_held_bytes", "bytes_up_per_sample", "bytes_down_per_sample", "staleness", "updates")
    return {
        "method": name, "label": label(spec), "family": registry.family(name), "kind": "method", "seed": seed,
        "config": {"method": spec if isinstance(spec, str) else dict(spec)}, "status": "failed", "error": str(error),
        "epochs": 0, "samples": 0, "auxiliary_parameters": 0, "curve": [], "timeline": [],
        "environment": environment(), **costs.UNCOUNTED, **nothing, **{name: [] for name in lists},
    }  # fmt: skip


def _results(
    config: CompareConfig, setting: sweep.AnySetting, records: list[dict[str, Any]], command: str
) -> dict[str, Any]:
    baseline = setting.baseline or config.baseline
    base = [r for r in records if r["label"] == baseline and r["status"] == "ok" and not _simulated(config, r)]
    pace = {_beside(r): r["samples_per_second"] for r in base}
    for record in records:
        reference, own = pace.get(_beside(record)), record["samples_per_second"]
        record["speedup_over_backprop"] = own / reference if reference and own else None
    trained = config.env or config.task or config.data
    data, model = (spec if isinstance(spec, str) else label(spec) for spec in (trained, config.model))
    return {
        "suite": config.suite,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "environment": environment(),
        "data": data,
        "dataset": setting.summary,
        "model": "its own networks" if config.env else "its graph" if config.task else model,
        "blocks": len(setting.cuts) + 1,
        "cuts": setting.cuts,
        "runtime": config.runtime,
        "baseline": baseline,
        "config": plain(config),
        "records": records,
    }


def _simulated(config: CompareConfig, record: Mapping[str, Any]) -> bool:
    """Whether one thread did all the work of a run, so that its pace says nothing."""
    runtime = record["point"].get("runtime", config.runtime)
    return (runtime if isinstance(runtime, str) else runtime.get("name")) == "simulated"


def _beside(record: Mapping[str, Any]) -> tuple[int, str, str]:
    """Paces are compared at the same seed and point, on the same machine."""
    return record["seed"], describe(record["point"]), json.dumps(record["environment"], sort_keys=True)


def _write(out: Path, results: dict[str, Any], recorders: list[Recorder]) -> None:
    resumed.save(out, _finite(results))
    spans = [span for recorder in recorders for span in recorder.spans]
    flows = [flow for recorder in recorders for flow in recorder.flows]
    if spans or not (out / "trace.json").exists():
        write_trace([*_kept_spans(results, {span.process for span in spans}), *spans], flows, out / "trace.json")
    if results["records"]:
        write_report(results, out / "report.html")


def _kept_spans(results: Mapping[str, Any], but: set[str]) -> list[Span]:
    """The operations that records remember: of the first run of every method `but` those recorded now."""
    first: dict[str, Any] = {}
    for record in results["records"]:
        if record["timeline"] and record["label"] not in but:
            first.setdefault(record["label"], record["timeline"])
    return [Span(name, e["actor"], e["op"], e["start"], e["end"]) for name, spans in first.items() for e in spans]


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: null instead."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
