"""`decoupled train env=...`: one environment, one method; the same files as for a network cut into blocks.

DIR/                  config.yaml, metrics.jsonl (per epoch: steps / epochs steps), checkpoint.pt, see rundir.py
DIR/events.jsonl.gz   what happened in the first operations, for `decoupled trace`
DIR/rollout.gif       one episode of the trained policy, if it is asked for
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from decoupled import checkpoint, registry, rundir
from decoupled.config import TrainConfig, plain
from decoupled.errors import UserError
from decoupled.observe.eventlog import recording
from decoupled.observe.progress import Reporter
from decoupled.rl.experiment import EPISODES, RLSetting
from decoupled.rl.pace import Pace
from decoupled.rl.render import write_gif
from decoupled.rl.roles import Roles
from decoupled.rl.trainer import RLTrainer
from decoupled.runtime.launch import under_torchrun
from decoupled.specs import label


def train_rl(
    config: TrainConfig, out: Path | None, events: int = 0, quiet: bool = False, rollout: bool = False,
    resume: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train, evaluate after every epoch, and write a directory; see `decoupled.train.train`.

    Returns:
        config, history, test, blocks (one entry per role), dataset, startup_seconds, metric.

    Raises:
        UserError: an unknown name, an impossible value, or `out` holds files (those of another run, with `resume`).
        PeerLost: a process of the run has died or hangs.
    """
    if under_torchrun():
        raise UserError("env= starts its own processes (runtime=processes): leave out torchrun")
    if rollout and out is None:
        raise UserError("a rollout is a file of the run's directory: add --out DIR, or leave out --rollout")
    registry.make(config.method, Roles)
    setting = RLSetting.prepare(config)
    here = resume and out is not None and (out / "checkpoint.pt").is_file()
    state = checkpoint.to_resume(config.resume, config.recipe) if config.resume and not here else None
    with nullcontext((None, [])) if out is None else rundir.opened(out, config, resume) as (found, history):
        ended = found is not None and found["memory"]["pace"]["steps"] >= config.steps  # then its files stay
        return _run(config, setting, out, 0 if ended else events, quiet, rollout, found or state, history)


def _run(
    config: TrainConfig, setting: RLSetting, out: Path | None, events: int, quiet: bool, rollout: bool,
    state: dict[str, Any] | None, history: list[dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    name = label(config.method)
    with Reporter(setting.samples, quiet) as reporter, recording(out, name, events) as logs:
        reporter.start(name)

        def advance(steps: int) -> None:
            reporter.advance(steps)
            if not steps:
                _pretraining(reporter, name, trainer.memory.pace)

        with setting.trainer(config.method, config.seed, on_steps=advance, observers=logs) as trainer:
            if state is not None:
                trainer.load_state_dict(state)
            while trainer.steps < config.steps:
                history.append(_epoch(trainer, min(setting.epoch, config.steps - trainer.steps), out, reporter))
                for log in logs:
                    log.ranks.update(trainer.runtime.places)
                    log.end_run()
            test = trainer.evaluate(2 * EPISODES)
            if rollout and out is not None:
                reporter.line(write_gif(config.env, trainer.agent, out / "rollout.gif", config.seed))
            roles, startup = trainer.statistics(), trainer.runtime.startup_seconds
    return {
        "config": plain(config), "history": history, "test": {"score": test["return"], **test},
        "blocks": [asdict(role) for role in roles], "startup_seconds": startup, "metric": "return",
        "dataset": setting.summary,
    }  # fmt: skip


def _pretraining(reporter: Reporter, name: str, pace: Pace) -> None:
    """No environment step comes while the features are trained first: say what the time goes into."""
    if pace.pretrained == 1:
        reporter.line(f"{pace.pretrain} updates of the features before the first of the policy")
    left = pace.pretrained < pace.pretrain
    reporter.start(f"{name}, features {pace.pretrained}/{pace.pretrain}" if left else name)


def _epoch(trainer: RLTrainer, steps: int, out: Path | None, reporter: Reporter) -> dict[str, Any]:
    record = trainer.fit(steps)
    held_out = trainer.evaluate(EPISODES)
    record |= {f"validation_{key}": value for key, value in held_out.items()}
    reporter.line(
        f"{record['steps']:8} steps  {record['updates']:8} updates  return {held_out['return']:9.1f} "
        f"(+-{held_out['spread']:.1f})  {record['steps_per_second']:.0f} steps/s  "
        f"{record['updates_per_second']:.0f} updates/s"
    )
    if out is not None:
        rundir.keep(out, record, trainer.state_dict())
    return record
