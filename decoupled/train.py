"""`decoupled train`: one model, one method; on several processes every rank runs this, and rank 0 reports and writes.

DIR/                  config.yaml, metrics.jsonl and checkpoint.pt, see rundir.py
DIR/blocks.json       statistics of every block since the (last) start
DIR/events.jsonl.gz   what happened in the first operations since the (last) start, for `decoupled trace`

A run that was cut off goes on after the last epoch that ended: by `--resume`, or by itself (`restarts`).
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from decoupled import checkpoint, costs, registry, rundir
from decoupled.config import TrainConfig, plain
from decoupled.errors import PeerLost, UserError
from decoupled.experiment import Setting, make_trainer, scores
from decoupled.graph.train import train_graph
from decoupled.observe.eventlog import recording
from decoupled.observe.progress import Reporter
from decoupled.rl.train import train_rl
from decoupled.runtime.launch import launched_rank, under_torchrun
from decoupled.specs import check_seed, label, parse
from decoupled.trainer import Trainer


def train(
    config: TrainConfig,
    out: Path | None,
    events: int = 0,
    quiet: bool = False,
    rollout: bool = False,
    resume: bool = False,
) -> dict[str, Any] | None:
    """Train, evaluate after every epoch, and write a directory.

    Args:
        config: what to train.
        out: a directory that does not exist yet, or is empty; None: write nothing.
        events: operations per block to record. quiet: say nothing. rollout: draw an episode of a trained policy.
        resume: go on with the run in `out` after the last epoch that ended; begin it if there is none.

    Returns:
        config, dataset, history, test, blocks, startup_seconds, and FLOPs (`costs.per_sample`); None on other ranks
        than the first.

    Raises:
        UserError: an unknown name, an impossible value, `out` holds files (those of another run, with `resume`), or
            torchrun without runtime=processes.
        PeerLost: a process of the run has died or hangs, once more than `config.restarts` times.
    """
    _check(config, out, rollout, resume)
    if config.task is not None and config.env is None:
        return train_graph(config, out, events, quiet)
    left = config.restarts
    while True:
        try:
            if config.env is not None:
                return train_rl(config, out, events, quiet, rollout, resume)
            return _train(config, out, events, quiet, resume)
        except PeerLost as error:
            if not left:
                raise
            print(f"decoupled: {error}\ndecoupled: beginning again after the last epoch that ended", file=sys.stderr)
        left, resume = left - 1, True


def _train(config: TrainConfig, out: Path | None, events: int, quiet: bool, resume: bool) -> dict[str, Any] | None:
    """One attempt; on rank 0 with what there is to go on from."""
    if under_torchrun() and parse("runtime", config.runtime)[0] != "processes":
        raise UserError(f"torchrun needs runtime=processes, got runtime={config.runtime}")
    if launched_rank():
        return _run(config, None, events, True, resume, None, [])
    here = resume and out is not None and (out / "checkpoint.pt").is_file()
    state = checkpoint.to_resume(config.resume, config.recipe) if config.resume and not here else None
    if out is None:
        return _run(config, None, events, quiet, resume, state, [])
    registry.make(config.method)
    with rundir.opened(out, config, resume) as (found, history):
        return _run(config, out, events, quiet, resume, state if found is None else found, history)


def _run(
    config: TrainConfig, out: Path | None, events: int, quiet: bool, resume: bool, state: dict[str, Any] | None,
    history: list[dict[str, Any]],
) -> dict[str, Any] | None:  # fmt: skip
    first, name, setting = (
        launched_rank() == 0,
        label(config.method),
        Setting.prepare(config, registry.make(config.method)),
    )
    other_method = config.other_method and not history
    if state is not None and len(state["cuts"]) == len(setting.cuts):
        setting.cuts = list(state["cuts"])
    ended = state is not None and state["position"]["epoch"] >= config.recipe.epochs  # then its files stay
    with Reporter(setting.samples, quiet) as reporter, recording(out, name, 0 if ended else events) as logs:
        reporter.start(name)
        more = {"on_nonfinite": config.on_nonfinite, "on_batch": reporter.advance, "observers": logs}
        with make_trainer(setting, config.method, config.seed, **more) as trainer:
            if config.resume or resume:
                trainer.load_state_dict(state, other_method=other_method, missing_ok=resume)
            started = False
            while trainer.epoch < config.recipe.epochs:
                history.append(_epoch(trainer, setting, config.seed, out, reporter))
                for log in logs:
                    log.ranks.update(trainer.runtime.places)
                    log.end_run(trainer.statistics())
                if not started and trainer.runtime.startup_seconds is not None:
                    reporter.line(
                        f"the processes started in {trainer.runtime.startup_seconds:.1f} s, which is not counted"
                    )
                started = True
            test = trainer.evaluate(setting.held_out("test"))
            blocks = [asdict(block) | {"versions": None} for block in trainer.statistics()] if first and started else []
    if out is not None:
        blocks = rundir.blocks(out, blocks)
    counted = costs.per_sample(setting.cost(config.method))
    made = {"config": plain(config), "history": history, "test": test, "blocks": blocks, **counted}
    made["dataset"] = setting.dataset.summary
    return made | {"startup_seconds": trainer.runtime.startup_seconds} if first else None


def _check(config: TrainConfig, out: Path | None, rollout: bool, resume: bool) -> None:
    """Refuse an impossible seed, and what goes with other things to train."""
    check_seed(config.seed)
    if rollout and config.env is None:
        raise UserError("only a policy has a rollout; leave out --rollout, or train with env=NAME")
    cut = config.env is None and config.task is None
    if config.other_method and (config.resume is None or not cut):
        raise UserError("other_method=True goes with resume=CHECKPOINT of a network cut into blocks; leave it out")
    if config.restarts < 0:
        raise UserError(f"restarts must be at least 0, got {config.restarts}")
    if (resume or config.restarts) and config.task is not None:
        raise UserError("--resume and restarts=N are not for graphs (task=), which keep weights alone; leave them out")
    if (resume or config.restarts) and out is None:
        raise UserError("--resume and restarts=N need the directory of the run: --out DIR")
    if config.restarts and parse("runtime", config.runtime)[0] != "processes":
        raise UserError(f"restarts=N is for runtime=processes, got runtime={config.runtime}; leave it out")
    if config.restarts and under_torchrun():
        raise UserError("torchrun restarts processes itself: give it --max-restarts N, and --resume to this command")


def _epoch(trainer: Trainer, setting: Setting, seed: int, out: Path | None, reporter: Reporter) -> dict[str, Any]:
    record: dict[str, Any] = dict(trainer.fit(setting.loader(seed))[0])
    (held_out,) = scores(trainer, setting, seed, "validation")
    record |= {f"validation_{name}": value for name, value in held_out.items()}
    reporter.line(
        f"epoch {record['epoch']:3}  loss {record['loss']:.4f}  "
        f"validation accuracy {record['validation_accuracy']:.3f}  {record['samples_per_second']:.0f} samples/s"
    )
    if out is not None:
        rundir.keep(out, record, trainer.state_dict())
    return record
