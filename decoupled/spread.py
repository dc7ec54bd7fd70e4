"""A trainer's blocks may live in several processes: what is asked of all of them, and how it comes together.

rank 0     gather("module", ...)  <---- {k: answer}    every process answers for the blocks that it owns
           news(...)              ----> take(...)      weights that the user has changed in rank 0's copies of blocks
           described(...)         ----> described(...) every process must have built the same
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from decoupled.build import Recipe
from decoupled.checkpoint import load_worker_state, worker_state
from decoupled.errors import PeerLost, UserError
from decoupled.runtime.contract import Runtime
from decoupled.statistics import BlockStatistics
from decoupled.worker import Worker


def statistics(worker: Worker) -> BlockStatistics:
    """What one worker has counted so far."""
    halves = [half.module for half in (worker.lower, worker.upper) if half.module is not None]
    intake = worker.upper.intake
    return worker.counters.record(
        block=worker.k, device=str(worker.block.device),
        peak_held_bytes=worker.retention.peak_held_bytes + worker.lower.held_bytes,
        peak_in_flight=worker.retention.peak_passes, parameters=sum(p.numel() for p in worker.block.parameters),
        auxiliary_parameters=sum(p.numel() for module in halves for p in module.parameters()),
        edge=dict(worker.lower.figures()), overflows=worker.scaling.overflows,
        loss_scale=worker.scaling.scale if worker.lower.has_objective else 1.0,
        reused=intake.reused if intake else 0, dropped=intake.dropped if intake else 0,
        correction_bytes=worker.corrections.held_bytes,
    )  # fmt: skip


_ANSWERS: dict[str, Callable[[Worker], Any]] = {
    "module": lambda worker: worker.block.module.state_dict(),
    "state": worker_state,
    "statistics": statistics,
}


def follower(
    trainer: Callable[..., Any], recipe: Recipe, model: nn.Sequential, cuts: list[int]
) -> Callable[[Runtime], Any]:
    """How another process makes its own trainer for the same model and recipe, on its end of the runtime."""

    def make(runtime: Runtime) -> Any:
        return trainer(
            model, recipe.method, cuts, loss=recipe.loss, optimizer=recipe.optimizer, scheduler=recipe.scheduler,
            runtime=runtime, devices=recipe.devices, seed=recipe.seed, on_nonfinite=recipe.on_nonfinite,
            precision=recipe.precision,
        )  # fmt: skip

    return make


def answer(workers: Iterable[Worker], what: str) -> dict[int, Any]:
    """What is asked ("module", "state" or "statistics") of these workers, by number of the block."""
    return {worker.k: _ANSWERS[what](worker) for worker in workers}


def join(answers: Iterable[Mapping[int, Any]], blocks: int) -> list[Any]:
    """Answers of several processes in the order of the blocks."""
    found = {k: value for one in answers for k, value in one.items()}
    if len(found) < blocks:
        missing = ", ".join(f"block{k}" for k in range(blocks) if k not in found)
        raise PeerLost(f"nobody has an answer for {missing}: its process did not get so far")
    return [found[k] for k in range(blocks)]


def owned(workers: Iterable[Worker], runtime: Runtime) -> list[Worker]:
    """The workers that live in this process."""
    return [worker for worker in workers if runtime.owns(worker.name)]


def bring_home(workers: Sequence[Worker], runtime: Runtime, states: Sequence[Mapping[str, Any]]) -> None:
    """Put the states of blocks that live elsewhere into this process's own copies of them."""
    for worker, state in zip(workers, states, strict=True):
        if not runtime.owns(worker.name):
            load_worker_state(worker, state)


Print = tuple[int, int]  # how often torch has seen a tensor written (not through .data), and what is in it
Prints = dict[int, dict[str, Print]]  # of every tensor of a block's module


def fingerprints(workers: Iterable[Worker], runtime: Runtime) -> Prints:
    """Of this process's copies of blocks that live elsewhere."""
    return {
        worker.k: {name: _print(t) for name, t in worker.block.module.state_dict().items() if isinstance(t, Tensor)}
        for worker in workers
        if not runtime.owns(worker.name)
    }


def news(workers: Sequence[Worker], known: Prints, now: Prints) -> dict[int, dict[str, Tensor]]:
    """The tensors that have been written to, by block."""
    found = {}
    for k, prints in now.items():
        state = workers[k].block.module.state_dict()
        if changed := {name: state[name] for name, one in prints.items() if one != known[k][name]}:
            found[k] = changed
    return found


def take(workers: Iterable[Worker], changed: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Put changed tensors into these blocks."""
    for worker in workers:
        worker.block.module.load_state_dict(changed.get(worker.k, {}), strict=False)


def _print(tensor: Tensor) -> Print:
    return tensor._version, zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def described(workers: Sequence[Worker], recipe: Recipe) -> dict[str, Any]:
    """What every process must have built alike, as plain values."""
    optimizers, method = [made for worker in workers for made in worker.steps.optimizers], recipe.method
    parts = (method.coupling, method.order, method.feed, *method.corrections)
    return {
        "model": [[(tuple(p.shape), str(p.dtype)) for p in worker.block.parameters] for worker in workers],
        "method": [method.name, *((type(part).__name__, _plain(getattr(part, "__dict__", {}))) for part in parts)],
        "optimizer": [(type(made).__name__, _plain(made.defaults)) for made in optimizers],
        "seed": recipe.seed,
        "precision": [str(one) for one in recipe.precisions(len(workers))],
        "on_nonfinite": recipe.on_nonfinite,
    }


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers and words among them; not which kernel an optimizer takes, as that may depend on a block's device."""
    found = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in options.items()}
    return {
        name: value
        for name, value in found.items()
        if name not in ("fused", "foreach", "capturable")
        and all(isinstance(one, int | float | str) for one in (value if isinstance(value, tuple | list) else [value]))
    }


def agree(mine: Mapping[str, Any], runtime: Runtime) -> None:
    """Compare with what rank 0 has.

    Raises:
        UserError: it is something else here; says what.
    """
    leader = runtime.agree(mine)
    if other := [name for name, value in mine.items() if value != leader[name]]:
        raise UserError(
            f"rank {runtime.rank} has another {' and another '.join(other)} than rank 0; every rank must be started "
            "with the same settings"
        )
