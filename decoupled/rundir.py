"""The directory of a training run, new or gone on with.

DIR/config.yaml       what was asked; a run that goes on must ask for the same
DIR/metrics.jsonl     one record per epoch, written before the checkpoint: one row too many is of an epoch cut off there
DIR/checkpoint.pt     the state after the latest epoch
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from decoupled import checkpoint
from decoupled.compare import fresh_directory
from decoupled.config import TrainConfig, plain
from decoupled.errors import UserError

MAY_DIFFER = {"runtime", "restarts"}  # they change no number


def begin(out: Path, config: TrainConfig, resume: bool) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Make `out`, or find what it holds.

    Args:
        out: the directory.
        config: what is asked.
        resume: go on from its checkpoint if it has one; what was written after that is forgotten.

    Returns:
        The state of the checkpoint (None: there is none) and the records of the epochs before it.

    Raises:
        UserError: files are there (without `resume`), or with `resume` those of another run.
    """
    known = (out / "config.yaml").is_file()
    if not (resume and known):
        fresh_directory(out, *(["choose another --out, or go on with the run in it: --resume"] if known else []))
        OmegaConf.save(OmegaConf.create(plain(config)), out / "config.yaml")
        return None, []
    _check(out, config)
    if not (out / "checkpoint.pt").is_file():
        return None, _rows(out, 0)
    state = checkpoint.load(out / "checkpoint.pt")
    return state, _rows(out, state["position"]["epoch"])


def keep(out: Path, record: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write the record of an epoch, then the state after it."""
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    checkpoint.save(state, out / "checkpoint.pt")


def _check(out: Path, config: TrainConfig) -> None:
    try:
        before = OmegaConf.to_container(OmegaConf.load(out / "config.yaml"))
    except Exception as error:  # of yaml, of omegaconf or of the system
        raise UserError(
            f"{out / 'config.yaml'} cannot be read ({type(error).__name__}); choose another --out"
        ) from None
    if not isinstance(before, dict):
        raise UserError(f"{out / 'config.yaml'} is not the configuration of a run; choose another --out")
    now = json.loads(json.dumps(plain(config)))
    if other := sorted(k for k in now.keys() | before.keys() if k not in MAY_DIFFER and now.get(k) != before.get(k)):
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
        except ValueError:  # cut off in the middle
            break
        if row["epoch"] > epochs:
            break
        rows.append(row)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)
    return rows
