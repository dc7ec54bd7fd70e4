"""The directory of a training run, new or gone on with.

DIR/config.yaml       what was asked; a run that goes on must ask for the same
DIR/metrics.jsonl     one record per epoch, written before the checkpoint: one row too many is of an epoch cut off there
DIR/checkpoint.pt     the state after the latest epoch
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from decoupled import checkpoint, registry
from decoupled.compare import fresh_directory
from decoupled.config import TrainConfig, plain
from decoupled.errors import UserError
from decoupled.files import write_whole, writing
from decoupled.resumed import alone


@contextmanager
def opened(
    out: Path, config: TrainConfig, resume: bool
) -> Iterator[tuple[dict[str, Any] | None, list[dict[str, Any]]]]:
    """Make `out`, or find what it holds; nobody else writes to it meanwhile, where the system can see to that.

    Args:
        out: the directory.
        config: what is asked.
        resume: go on from its checkpoint if it has one; what was written after that is forgotten.

    Yields:
        The state of the checkpoint (None: there is none) and the records of the epochs before it.

    Raises:
        UserError: files are there (without `resume`), or with `resume` those of another run.
    """
    known = (out / "config.yaml").is_file()
    if not (resume and known):
        if resume:
            (out / "config.yaml.new").unlink(missing_ok=True)  # of one that was killed
        fresh_directory(out, *(["choose another --out, or go on with the run in it: --resume"] if known else []))
    with alone(out):
        if known:
            _check(out, config)
        else:
            write_whole(out / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain(config))))
        state = checkpoint.load(out / "checkpoint.pt") if (out / "checkpoint.pt").is_file() else None
        yield state, _rows(out, state.get("position", state)["epoch"] if state else 0)


def keep(out: Path, record: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write the record of an epoch, then the state after it."""
    path = out / "metrics.jsonl"
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
    checkpoint.save(state, out / "checkpoint.pt")


def blocks(out: Path, statistics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write the statistics of all blocks; without any (nothing was left to train) those of before stay."""
    path = out / "blocks.json"
    if statistics:
        write_whole(path, json.dumps(statistics) + "\n")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def _check(out: Path, config: TrainConfig) -> None:
    """See that the same is asked; how often to restart may differ, and the runtime where it changes no number."""
    try:
        before = OmegaConf.to_container(OmegaConf.load(out / "config.yaml"))
    except Exception as error:  # of yaml, of omegaconf or of the system
        raise UserError(
            f"{out / 'config.yaml'} cannot be read ({type(error).__name__}); choose another --out"
        ) from None
    if not isinstance(before, dict):
        raise UserError(f"{out / 'config.yaml'} is not the configuration of a run; choose another --out")
    now = json.loads(json.dumps(plain(config)))
    free = {"restarts", *(["runtime"] if config.env is None and registry.make(config.method).fixed else [])}
    if other := sorted(k for k in now.keys() | before.keys() if k not in free and now.get(k) != before.get(k)):
        was = ", ".join(f"{key}={json.dumps(before.get(key))}" for key in other)
        raise UserError(f"{out} was made with {was}; ask for the same, or choose another --out without --resume")


def _rows(out: Path, epochs: int) -> list[dict[str, Any]]:
    """The records of the first `epochs` epochs; others are removed."""
    path = out / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows: list[dict[str, Any]] = []
    for line in lines:
        try:
            row = json.loads(line)
            if row["epoch"] > epochs:
                break
        except (ValueError, TypeError, KeyError):  # cut off in the middle
            break
        rows.append(row)
    there = [row["epoch"] for row in rows]
    if epochs and (not there or there != list(range(there[0], epochs + 1))):
        raise UserError(
            f"{path} lacks epochs before {out / 'checkpoint.pt'}, written after {epochs}; go on from that one "
            f"elsewhere: resume={out / 'checkpoint.pt'} with another --out"
        )
    if len(rows) < len(lines):
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows
