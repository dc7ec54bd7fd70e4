"""The `decoupled` command: configuration is key=value, results are files and tables, errors are one line.

Exit codes: 0 fine, 2 a mistake in what was asked (one line, no traceback), 1 a failure of the run.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from decoupled import __version__, costs, doctor, registry
from decoupled.compare import compare
from decoupled.config import CompareConfig, FlopsConfig, InfoConfig, SimulateConfig, TrainConfig, read
from decoupled.errors import OperationError, PeerLost, RemoteError, StallError, UserError, first_line
from decoupled.observe import timeline
from decoupled.observe.conditions import said
from decoupled.observe.eventlog import LIMIT
from decoupled.observe.points import best, describe
from decoupled.observe.report import write_report
from decoupled.runtime.launch import under_torchrun
from decoupled.simulate import command as simulation
from decoupled.train import train

_KEY = r"[\w.]+="


class RunError(RuntimeError):
    """A run ended, but not as it should."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = _parser().parse_args(_words_first(sys.argv[1:] if arguments is None else arguments))
    try:
        options.run(options)
    except UserError as error:
        print(f"decoupled: {error}", file=sys.stderr)
        return 2
    except OperationError as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            print(f"decoupled: {cause}", file=sys.stderr)
            return 2
        print(f"decoupled: {first_line(error)}", file=sys.stderr)
        return 1
    except (StallError, PeerLost, RemoteError, RunError) as error:
        print(f"decoupled: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("decoupled: interrupted; all workers have stopped", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has gone (`| head`)
        sys.stderr.close()
        return 1
    return 0


def _words_first(arguments: Sequence[str]) -> list[str]:
    """Move key=value words before the options: argparse takes them in one place only."""
    words, others = [], []
    for before, word in zip(["", *arguments], arguments, strict=False):
        value = before in ("--out", "--config", "--blocks")
        (words if re.match(_KEY, word) and not value else others).append(word)
    return [*others[:1], *words, *others[1:]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="decoupled", description="Decoupled training of deep networks.")
    parser.add_argument("--version", action="version", version=f"decoupled-training {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def configured(sub: argparse.ArgumentParser, example: str) -> None:
        sub.add_argument("words", nargs="*", metavar="key=value", help=f"e.g. {example}")
        sub.add_argument("--config", metavar="FILE", help="a YAML file with the same keys")

    sub = command("compare", _compare, "compare methods under equal conditions")
    configured(sub, "suite=quick methods=[pipedream,greedy_local] seeds=1")
    sub.add_argument("--out", metavar="DIR", type=Path, help="a new directory (default: results/compare-DATE)")
    sub.add_argument("--resume", action="store_true", help="go on with the comparison in --out: what has ended stays")
    sub.add_argument("--quiet", action="store_true", help="no progress")
    sub.add_argument("--json", action="store_true", help="print results.json")

    sub = command("train", _train, "train one model with one method")
    configured(sub, "method=pipedream model=resnet20 data=fashion_mnist blocks=2 epochs=10")
    sub.add_argument(
        "--out", metavar="DIR", type=Path, help="a new directory: checkpoint, configuration, metrics, events"
    )
    sub.add_argument(
        "--resume", action="store_true", help="go on with the run in --out after its last epoch; none there: begin it"
    )
    sub.add_argument("--events", metavar="N", type=int, help=f"operations per block to record (0: none; {LIMIT})")
    sub.add_argument("--quiet", action="store_true", help="no progress")
    sub.add_argument("--json", action="store_true", help="print one JSON record")
    sub.add_argument("--rollout", action="store_true", help="with env=NAME and --out: an episode as DIR/rollout.gif")

    sub = command("simulate", _simulate, "utilisation, staleness and timeline of a method at given speeds, no training")
    configured(sub, "method=pipedream blocks=64 latency=0.5 backward=2 slow={3: 2.0}")
    sub.add_argument("--out", metavar="DIR", type=Path, help="a new directory: simulation.html, simulation.json")
    sub.add_argument("--json", action="store_true", help="print one JSON record")

    sub = command("flops", _flops, "FLOPs of a method per block, in all and on the critical path, no training")
    configured(sub, "method=greedy_local model=resnet20 data=fashion_mnist blocks=4 skip=true")
    sub.add_argument("--json", action="store_true", help="print one JSON record")

    sub = command("list", _list, "all methods")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("info", _info, "the card of a method")
    sub.add_argument("words", nargs="+", metavar="METHOD", help="its name; or method={name: fdg, beta: 0.8} blocks=8")
    sub.add_argument("--blocks", metavar="K", help="the same as blocks=K: how many the facts are given for")
    sub.add_argument("--json", action="store_true", help="print the generated facts as JSON")

    sub = command("trace", lambda options: timeline.show(options.directory), "write the timeline of a run for Perfetto")
    sub.add_argument("directory", type=Path, help="what `train --out` wrote")

    sub = command("doctor", _doctor, "what is wrong with this machine, and what to do about it")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("report", _report, "write report.html again from results.json")
    sub.add_argument("directory", type=Path)
    return parser


def _compare(options: argparse.Namespace) -> None:
    if under_torchrun():
        raise UserError("`compare` starts its own processes: run it with runtime=processes, without torchrun")
    config = read(CompareConfig, options.words, options.config)
    if options.resume and options.out is None:
        raise UserError("--resume needs the directory of the comparison: --out DIR")
    out = options.out or Path("results") / f"compare-{datetime.now():%Y%m%d-%H%M%S}"
    words = shlex.join([*options.words, *(["--config", options.config] if options.config else [])])
    results = compare(config, out, f"decoupled compare {words}".strip(), options.quiet, options.resume)
    if options.json:
        print(json.dumps(json.loads((out / "results.json").read_text(encoding="utf-8"))))
        return
    if not options.quiet:
        _print_results(results)
    print(f"data:   {results['dataset']}")
    print(f"report: {out / 'report.html'}")
    print(f"trace:  {out / 'trace.json'} (open it at ui.perfetto.dev)")
    if failed := sorted({record["label"] for record in results["records"] if record["status"] != "ok"}):
        raise RunError(f"{', '.join(failed)} failed; the errors are in {out / 'results.json'}")


def _print_results(results: dict[str, Any]) -> None:
    ran = said(results)
    table = Table(title=f"suite {results['suite']}: {ran['data']}, {ran['model']}, {ran['blocks']}")
    swept = any(record["point"] for record in results["records"])
    metric = next((record["metric"] for record in results["records"] if "metric" in record), "accuracy")
    columns = (
        "method",
        *(["best point"] if swept else []),
        f"test {metric}",
        f"speed-up over {results['baseline']}" + ", same point" * swept,
        "samples/s",
        "utilisation",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("method", "best point") else "right")
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in results["records"]:
        groups.setdefault(record["label"], []).append(record)
    for name, every in groups.items():
        records = best(every)
        good = [record for record in records if record["status"] == "ok"]
        if not good:
            table.add_row(name, "failed")
            continue
        accuracy = _mean([r.get("test_score", r["test_accuracy"]) for r in good])
        speedups = [r["speedup_over_backprop"] for r in good if r["speedup_over_backprop"]]
        busy = [_mean(r["utilisation"]) for r in good if r["utilisation"]]
        table.add_row(
            name,
            *([describe(good[0]["point"])] if swept else []),
            f"{accuracy:.3f}",
            f"{_mean(speedups):.2f}" if speedups else "",
            f"{_mean([r['samples_per_second'] for r in good]):,.0f}",
            f"{_mean(busy):.2f}" if busy else "",
        )
    Console().print(table)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _train(options: argparse.Namespace) -> None:
    config = read(TrainConfig, options.words, options.config)
    events = LIMIT if options.events is None else options.events
    if events < 0 or (options.events and options.out is None):
        raise UserError(f"--events {events} must be at least 0, and needs the directory of the run: --out DIR")
    quiet = options.quiet or options.json
    found = train(config, options.out, events, quiet, options.rollout, options.resume)
    if found is None:  # another rank than the first
        return
    if options.json:
        print(json.dumps(found))
        return
    test, metric = found["test"], found.get("metric", "accuracy")
    print(f"data: {found['dataset']}")
    loss = f", test loss {test['loss']:.4f}" if "loss" in test else ""
    print(f"test {metric} {test['score'] if 'score' in test else test['accuracy']:.4f}{loss}")
    if line := costs.heads(found, sum(block.get("auxiliary_parameters", 0) for block in found["blocks"])):
        print(line)
    if options.out is not None:
        print(f"checkpoint: {options.out / 'checkpoint.pt'}")
        if events:
            print(f"timeline:   decoupled trace {shlex.quote(str(options.out))}")


def _simulate(options: argparse.Namespace) -> None:
    config = read(SimulateConfig, options.words, options.config)
    if too_small := simulation.run(config, options.out, options.json):
        needs = [
            f"{name}: {', '.join(f'block {k} needs {need:g}' for k, need in list(blocks.items())[:8])}"
            + (f" and {len(blocks) - 8} more do not fit" if len(blocks) > 8 else "")
            + f"; memory would have to be {max(blocks.values()):g}"
            for name, blocks in too_small.items()
        ]
        raise RunError("does not fit into memory: " + "; ".join(needs))


def _flops(options: argparse.Namespace) -> None:
    config = read(FlopsConfig, options.words, options.config)
    counted = costs.count(config)
    if options.json:
        print(json.dumps(costs.as_dict(counted)))
    else:
        costs.show(counted, selects=registry.make(config.method).selection is not None)


def _list(options: argparse.Namespace) -> None:
    cards = [registry.card(name) for name in registry.methods(object)]
    if options.json:
        print(json.dumps([{"name": c.name, "family": c.family, "summary": c.summary} for c in cards]))
        return
    table = Table("method", "family", "in one sentence")
    for card in cards:
        table.add_row(card.name, card.family, card.summary)
    Console().print(table)


def _info(options: argparse.Namespace) -> None:
    names = [word for word in options.words if not re.match(_KEY, word)]
    asked = [word.removeprefix("method=") for word in options.words if word in names or word.startswith("method=")]
    if len(asked) > 1:
        raise UserError(f"one method at a time, got {', '.join(asked)}")
    words = [f"method={word}" if word in names else word for word in options.words]
    config = read(InfoConfig, [*words, *([f"blocks={options.blocks}"] if options.blocks else [])])
    if config.blocks < 1:
        raise UserError(f"blocks must be at least 1, got {config.blocks}")
    card = registry.card(config.method)
    if options.json:
        print(json.dumps({"name": card.name, "summary": card.summary, **card.facts(config.blocks)}))
        return
    text = card.render(config.blocks)
    console = Console()
    console.print(Markdown(text) if console.is_terminal else text, markup=False)


def _doctor(options: argparse.Namespace) -> None:
    if problems := doctor.show(options.json):
        raise RunError(f"to be mended: {', '.join(finding.check for finding in problems)}")


def _report(options: argparse.Namespace) -> None:
    source = options.directory / "results.json"
    if not source.is_file():
        raise UserError(f"{source} does not exist; give a directory written by `decoupled compare`")
    try:
        results = json.loads(source.read_text(encoding="utf-8"))
        write_report(results, options.directory / "report.html")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{source} is not a result of `decoupled compare` ({error}); run the comparison again"
        ) from error
    print(f"report: {options.directory / 'report.html'}")
