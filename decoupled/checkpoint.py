"""State of a run at a drained point: what to save, how to put it back, and files that are whole or not there.

Everything is tensors and plain values, so `torch.load(weights_only=True)` reads it: nothing is unpickled.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from decoupled.config import Recipe
from decoupled.errors import UserError, first_line
from decoupled.files import writing
from decoupled.worker import Worker


def save(state: Mapping[str, Any], path: str | Path) -> None:
    """Write `state` to `path`: to a temporary file first, then moved, so that no half-written file is ever there.

    Raises:
        UserError: the system refuses, e.g. because the disk is full; an older file stays.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    with writing(path, partial):
        with partial.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def load(path: str | Path) -> dict[str, Any]:
    """Read a state written by `save`.

    Raises:
        UserError: the file is missing or not such a state; says which file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the path of a checkpoint written by `decoupled train --out DIR`")
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is damaged or not a checkpoint ({type(error).__name__}); use another one") from error
    if not isinstance(state, dict) or state.get("format") != 1:
        raise UserError(f"{path} is not a checkpoint of this library; give one written by `decoupled train --out DIR`")
    return state


def worker_state(worker: Worker) -> dict[str, Any]:
    """State of one worker."""
    return {
        "block": worker.block.state_dict(),
        "steps": worker.steps.state_dict(),
        "scaling": worker.scaling.state_dict(),
        "lower": worker.lower.state_dict(),
        "lower_module": {} if worker.lower.module is None else worker.lower.module.state_dict(),
        "upper_module": {} if worker.upper.module is None else worker.upper.module.state_dict(),
        "losses": {} if worker.losses is None else worker.losses.state_dict(),
    }


def load_worker_state(worker: Worker, state: Mapping[str, Any], block_only: bool = False) -> None:
    """Put the state of one worker back; `block_only`: not that of its corrections and its halves."""
    worker.block.load_state_dict(state["block"])
    worker.steps.load_state_dict(state["steps"], block_only)
    if block_only:
        return
    worker.scaling.load_state_dict(state.get("scaling", {}))
    worker.lower.load_state_dict(state["lower"])
    if worker.losses is not None:
        worker.losses.load_state_dict(state["losses"])
    for half, name in ((worker.lower, "lower_module"), (worker.upper, "upper_module")):
        if half.module is not None:
            half.module.load_state_dict(state[name])


def check(state: Mapping[str, Any], method: str | None, cuts: Sequence[int], measured: bool) -> None:
    """Check that `state` is one of a trainer with this method (None: any) and these cuts (`measured`: as many).

    Raises:
        UserError: it is not.
    """
    if not {"method", "blocks", "cuts", "sample", "position", "rng"} <= set(state):
        raise UserError("this is not the state of a trainer: give what `state_dict` returned")
    if method is not None and state["method"] != method:
        raise UserError(
            f"the state is of method {state['method']!r}, this trainer runs {method!r}; other_method=True takes over "
            "what does not belong to the method"
        )
    if len(state["blocks"]) != len(cuts) + 1:
        raise UserError(f"the state has {len(state['blocks'])} blocks, this trainer {len(cuts) + 1}")
    if not measured and list(state["cuts"]) != list(cuts):
        raise UserError(
            f"the state was cut at {list(state['cuts'])}, this trainer at {list(cuts)}; cut it where the state was"
        )


def _reason(error: BaseException) -> str:
    """Of torch's lists of what does not fit, behind a headline, the first."""
    first, *more = str(error).splitlines() or [type(error).__name__]
    return more[0].strip() if more and first.endswith(":") else first_line(error)


def load_worker_states(
    workers: Sequence[Worker], states: Sequence[Mapping[str, Any]], block_only: bool = False
) -> None:
    """Put the states of all workers back.

    Raises:
        UserError: one does not fit; names the block.
    """
    for worker, saved in zip(workers, states, strict=True):
        try:
            load_worker_state(worker, saved, block_only)
        except (RuntimeError, KeyError, ValueError) as error:
            raise UserError(
                f"the state does not fit {worker.name} ({_reason(error)}); build model, method and optimizer as "
                "they were"
            ) from error


def rng_state() -> dict[str, Any]:
    """State of the global generators of torch (CPU), numpy and Python: a DataLoader shuffles with them."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "python": random.getstate(),
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the global generators back."""
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


def to_resume(path: str, recipe: Recipe) -> dict[str, Any]:
    """Read the state to go on from, whose optimizers go on as they were.

    Raises:
        UserError: as in `load`, or the recipe asks for another learning rate, momentum or weight decay.
    """
    state = load(path)
    groups = list(_groups(state))
    for name in ("lr", "weight_decay", *(["momentum"] if recipe.optimizer == "sgd" else [])):
        asked, known = getattr(recipe, name), [g.get(f"initial_{name}", g[name]) for g in groups if name in g]
        if known and all(float(one) != float(asked) for one in known):
            raise UserError(
                f"{path} goes on with {name}={float(known[0]):g}, as its optimizers were, not with {asked:g}; ask for "
                "the same, or train anew"
            )
    return state


def _groups(state: Any) -> Iterator[Mapping[str, Any]]:
    """All parameter groups of optimizers, wherever they are."""
    if isinstance(state, Mapping):
        yield from state.get("param_groups", ())
    for part in state.values() if isinstance(state, Mapping) else state if isinstance(state, list | tuple) else ():
        yield from _groups(part)
