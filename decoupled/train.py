"""`decoupled train`: one model, one method; on several processes every rank runs this, and rank 0 reports and writes.

DIR/config.yaml       what was asked
DIR/metrics.jsonl     one record per epoch
DIR/blocks.json       statistics of every block
DIR/checkpoint.pt     the state after the latest epoch
DIR/events.jsonl.gz   what happened in the first operations, for `decoupled trace`
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from decoupled import checkpoint, costs, registry
from decoupled.compare import fresh_directory
from decoupled.config import TrainConfig, plain
from decoupled.errors import UserError
from decoupled.experiment import Setting, label, make_trainer, scores
from decoupled.graph.train import train_graph
from decoupled.observe.eventlog import recording
from decoupled.observe.progress import Reporter
from decoupled.rl.train import train_rl
from decoupled.runtime.launch import launched_rank, under_torchrun
from decoupled.specs import parse
from decoupled.trainer import Trainer


def train(
    config: TrainConfig, out: Path | None, events: int = 0, quiet: bool = False, rollout: bool = False
) -> dict[str, Any] | None:
    """Train, evaluate after every epoch, and write a directory.

    Args:
        config: what to train.
        out: a directory that does not exist yet, or is empty; None: write nothing.
        events: operations per block to record. quiet: say nothing. rollout: draw an episode of a trained policy.

    Returns:
        config, dataset, history, test, blocks, startup_seconds, and FLOPs (`costs.per_sample`); None on other ranks
        than the first.

    Raises:
        UserError: an unknown name, an impossible value, `out` holds files, or torchrun without runtime=processes.
    """
    _check(config, rollout)
    if config.env is not None:
        return train_rl(config, out, events, quiet, rollout)
    if config.task is not None:
        return train_graph(config, out, events, quiet)
    method = registry.make(config.method)
    if under_torchrun() and parse("runtime", config.runtime)[0] != "processes":
        raise UserError(f"torchrun needs runtime=processes, got runtime={config.runtime}")
    first, name = launched_rank() == 0, label(config.method)
    state = checkpoint.load(config.resume) if config.resume and first else None
    setting = Setting.prepare(config, method)
    if state is not None and len(state["cuts"]) == len(setting.cuts):
        setting.cuts = list(state["cuts"])
    if not first:
        out = None
    if out is not None:
        fresh_directory(out)
        OmegaConf.save(OmegaConf.create(plain(config)), out / "config.yaml")
    history: list[dict[str, Any]] = []
    with Reporter(setting.samples, quiet or not first) as reporter, recording(out, name, events) as logs:
        reporter.start(name)
        more = {"on_nonfinite": config.on_nonfinite, "on_batch": reporter.advance, "observers": logs}
        with make_trainer(setting, config.method, config.seed, **more) as trainer:
            if config.resume:
                trainer.load_state_dict(state, other_method=config.other_method)
            while trainer.epoch < config.recipe.epochs:
                history.append(_epoch(trainer, setting, config.seed, out, reporter))
                for log in logs:
                    log.ranks.update(trainer.runtime.places)
                    log.end_run(trainer.statistics())
                if len(history) == 1 and trainer.runtime.startup_seconds is not None:
                    reporter.line(
                        f"the processes started in {trainer.runtime.startup_seconds:.1f} s, which is not counted"
                    )
            test = trainer.evaluate(setting.held_out("test"))
            blocks = [asdict(block) | {"versions": None} for block in trainer.statistics()] if first else []
    if out is not None:
        (out / "blocks.json").write_text(json.dumps(blocks) + "\n", encoding="utf-8")
    counted = costs.per_sample(setting.cost(config.method))
    found = {"config": plain(config), "history": history, "test": test, "blocks": blocks, **counted}
    found["dataset"] = setting.dataset.summary
    return found | {"startup_seconds": trainer.runtime.startup_seconds} if first else None


def _check(config: TrainConfig, rollout: bool) -> None:
    """Refuse what goes with other things to train."""
    if rollout and config.env is None:
        raise UserError("only a policy has a rollout; leave out --rollout, or train with env=NAME")
    if config.other_method and (config.resume is None or config.env is not None or config.task is not None):
        raise UserError("other_method=True goes with resume=CHECKPOINT of a network cut into blocks; leave it out")


def _epoch(trainer: Trainer, setting: Setting, seed: int, out: Path | None, reporter: Reporter) -> dict[str, Any]:
    record: dict[str, Any] = dict(trainer.fit(setting.loader(seed))[0])
    (held_out,) = scores(trainer, setting, seed, "validation")
    record |= {f"validation_{name}": value for name, value in held_out.items()}
    reporter.line(
        f"epoch {record['epoch']:3}  loss {record['loss']:.4f}  "
        f"validation accuracy {record['validation_accuracy']:.3f}  {record['samples_per_second']:.0f} samples/s"
    )
    if out is not None:
        checkpoint.save(trainer.state_dict(), out / "checkpoint.pt")
        with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return record
