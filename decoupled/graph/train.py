"""`decoupled train task=...`: one graph, one method; the same files as for a network cut into blocks.

DIR/config.yaml       what was asked
DIR/metrics.jsonl     one record per epoch
DIR/graph.svg         the graph, coloured by worker
DIR/checkpoint.pt     the weights after the latest epoch, by node
DIR/events.jsonl.gz   what happened in the first operations, for `decoupled trace`
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from decoupled import checkpoint
from decoupled.compare import fresh_directory
from decoupled.config import TrainConfig, plain
from decoupled.errors import UserError
from decoupled.files import writing
from decoupled.graph.draw import svg
from decoupled.graph.experiment import GraphSetting
from decoupled.observe.eventlog import recording
from decoupled.observe.progress import Reporter
from decoupled.runtime.launch import under_torchrun
from decoupled.specs import label


def train_graph(config: TrainConfig, out: Path | None, events: int = 0, quiet: bool = False) -> dict[str, Any]:
    """Train, evaluate after every epoch, and write a directory; see `decoupled.train.train`.

    Returns:
        config, history, test, blocks (one entry per worker), nodes, dataset, startup_seconds, metric.

    Raises:
        UserError: an unknown name, an impossible value, or `out` holds files.
    """
    if config.resume or under_torchrun():
        raise UserError("a task starts anew and starts its own processes: leave out resume= and torchrun")
    setting, name, history = GraphSetting.prepare(config), label(config.method), []
    if out is not None:
        fresh_directory(out)
        OmegaConf.save(OmegaConf.create(plain(config)), out / "config.yaml")
    with Reporter(setting.samples, quiet) as reporter, recording(out, name, events) as logs:
        reporter.start(name)
        with setting.trainer(config.method, config.seed, on_retire=reporter.advance, observers=logs) as trainer:
            while trainer.epoch < config.recipe.epochs:
                record = trainer.fit(setting.splits["train"], shuffle=config.seed)[0]
                held_out = setting.named(trainer.evaluate(setting.splits["validation"]))
                record |= {f"validation_{key}": value for key, value in held_out.items()}
                history.append(record)
                for log in logs:
                    log.ranks.update(trainer.runtime.places)
                    log.end_run()
                reporter.line(
                    f"epoch {record['epoch']:3}  loss {record['loss']:.4f}  validation {setting.work.metric} "
                    f"{held_out['score']:.4f}  {record['samples_per_second']:.0f} samples/s"
                )
                if out is not None:
                    checkpoint.save(trainer.graph.module.state_dict(), out / "checkpoint.pt")
                    rows = out / "metrics.jsonl"
                    with writing(rows), rows.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
            if out is not None:
                (out / "graph.svg").write_text(svg(trainer.graph, trainer.places), encoding="utf-8")
            test = setting.named(trainer.evaluate(setting.splits["test"]))
            workers, nodes = map(list, (trainer.statistics(), trainer.nodes()))
            startup = trainer.runtime.startup_seconds
    return {
        "config": plain(config), "history": history, "test": test, "blocks": [asdict(w) for w in workers],
        "nodes": [asdict(node) for node in nodes], "startup_seconds": startup, "metric": setting.work.metric,
        "dataset": setting.summary,
    }  # fmt: skip
