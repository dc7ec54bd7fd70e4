"""Going on with a comparison: what results.json has, whether it belongs to what is asked for now, and who may write.

read     its records by run: seed, point of the sweep, and what was trained
check    every one of them is asked for again, and the data are the same
alone    nobody else writes to the directory
save     results.json, in one piece
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from decoupled.config import CompareConfig, plain
from decoupled.errors import UserError
from decoupled.files import write_whole
from decoupled.observe.points import describe

try:
    import fcntl
except ImportError:  # pragma: no cover - there are systems without
    fcntl = None

Run = tuple[int, str, str]  # seed, point and what was trained
MORE = {"methods", "seeds", "sweep", "controls", "claims", "cutoffs", "baseline", "suite"}  # change no single run
NEEDED = {
    "seed", "point", "kind", "label", "method", "status", "cuts", "samples_per_second", "environment", "timeline",
}  # fmt: skip


def read(out: Path, config: CompareConfig, controls: Collection[str]) -> dict[Run, dict[str, Any]]:
    """The records in `out`.

    Raises:
        UserError: there are none, or they were made with other options than those of `config`.
    """
    path = out / "results.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before, records = dict(found["config"]), {run_of(record, controls): record for record in found["records"]}
        for record in records.values():
            if missing := NEEDED - record.keys():
                raise ValueError(f"a record lacks {', '.join(sorted(missing))}")
            record["dataset"] = found["dataset"]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist, so there is nothing to resume; leave out --resume") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a result of `decoupled compare` ({error}); choose another --out") from None
    now = json.loads(json.dumps(plain(config)))
    if other := sorted(k for k in now.keys() | before.keys() if k not in MORE and now.get(k) != before.get(k)):
        was = ", ".join(f"{key}={json.dumps(before.get(key))}" for key in other)
        raise UserError(f"{out} was made with {was}; ask for the same, or choose another --out without --resume")
    return records


def run_of(record: Mapping[str, Any], controls: Collection[str] = ()) -> Run:
    """Which run a record is of; `controls`: names that are not labels."""
    name = record["method"] if record["method"] in controls else record["label"]
    return record["seed"], describe(record["point"]), name


def check(out: Path, before: Mapping[Run, dict[str, Any]], asked: Collection[Run], data: str) -> None:
    """See that no run would be lost, and that the data are what they were.

    Args:
        data: the summary of the data now.

    Raises:
        UserError: a run is not asked for, or the data have changed.
    """
    if left_out := [run for run in before if run not in asked]:
        seed, point, name = left_out[0]
        first = ", ".join(filter(None, (name, point, f"seed {seed}")))
        raise UserError(
            f"{out} has {len(left_out)} runs that are not asked for, the first is {first}; ask for them, too, or "
            "choose another --out without --resume"
        )
    for record in before.values():
        if record.pop("dataset") != data:
            raise UserError(f"{out} was made with other data than {data}; choose another --out without --resume")


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep other comparisons from writing to the directory `out`, where the system can.

    Raises:
        UserError: one does, or there is no such directory.
    """
    try:
        handle = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{out} cannot be opened ({error.strerror}), so there is nothing to resume") from None
    try:
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process writes to {out}; wait until it ends, or choose another --out") from None
        (out / "results.json.new").unlink(missing_ok=True)  # of one that was killed
        yield
    finally:
        os.close(handle)


def save(out: Path, results: Mapping[str, Any]) -> None:
    """Write results.json, in one piece."""
    write_whole(out / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
