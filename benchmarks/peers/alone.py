"""A method's own work on one core: all blocks in turn in one thread, or one block without the others.

    serial     the simulated runtime: every operation of every block, one after the other, nobody waits
    block k    the operations of block k alone, on the messages that it was given in such a run, over and over
    at once    both blocks' operations, each block in a thread of its own

A pipeline without waiting runs at the pace of its slowest block, so `block k` bounds what the blocks can do side by
side, whatever the method makes them do (a replay, an inverse, smaller batches). Two threads that share a memory, and an
interpreter, cannot reach that; `at once` says how near they come where nobody waits for anybody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from decoupled import Trainer
from decoupled.benchmarks.peers.setting import Run, Setting, sgd
from decoupled.messages import Message
from decoupled.runtime.contract import Outcome, Want
from decoupled.runtime.simulated import Simulated
from decoupled.worker import Worker

PARTS = ("serial", "block 0", "block 1", "at once")
CHUNK = 2  # batches of the run whose messages are kept; what is measured is a multiple of it


def build(setting: Setting, rank: int, specs: Mapping[str, Any]) -> dict[str, Run]:
    """For every label and method of `specs`: runs "label serial" and so on, one of each of `PARTS`."""
    runs: dict[str, Run] = {}
    for label, spec in specs.items():
        trainer = Trainer(
            nn.Sequential(*setting.units()), spec, [setting.cut], loss=F.cross_entropy, optimizer=sgd,
            runtime=Simulated(),
        )  # fmt: skip
        trainer.fit(setting.batches(1))
        kept = {worker.name: _kept(worker) for worker in trainer.workers}
        start = trainer.state_dict()["position"]["key"]
        trainer.fit(setting.batches(CHUNK))
        for worker in trainer.workers:
            del worker.handle  # type: ignore[method-assign]
        blocks = [_replay(worker, kept[worker.name], start) for worker in trainer.workers]
        for name, run in zip(PARTS, [_serial(trainer, setting), *blocks, _together(blocks)], strict=True):
            runs[f"{label} {name}"] = run
    return runs


def _serial(trainer: Trainer, setting: Setting) -> Run:
    def run(batches: int) -> None:
        trainer.fit(setting.batches(batches))

    return run


def _kept(worker: Worker) -> list[tuple[Want, tuple[Message, ...]]]:
    """What the worker is told to handle from now on."""
    kept, handle = [], worker.handle

    def handled(want: Want, messages: tuple[Message, ...]) -> Outcome:
        kept.append((want, messages))
        return handle(want, messages)

    worker.handle = handled  # type: ignore[method-assign]
    return kept


def _replay(worker: Worker, kept: list[tuple[Want, tuple[Message, ...]]], start: int) -> Run:
    def run(batches: int) -> None:
        for _ in range(max(1, batches // CHUNK)):
            worker.begin(start)
            for want, messages in kept:
                worker.wants()
                worker.handle(want, messages)

    return run


def _together(runs: Sequence[Run]) -> Run:
    def run(batches: int) -> None:
        with ThreadPoolExecutor(len(runs), initializer=torch.set_num_threads, initargs=(1,)) as threads:
            list(threads.map(lambda one: one(batches), runs))

    return run
