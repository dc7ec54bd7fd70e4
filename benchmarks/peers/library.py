"""This library's contestants: a method on the runtime with one thread, or one process, per block."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from decoupled import Trainer
from decoupled.benchmarks.peers.setting import Run, Setting, sgd
from decoupled.runtime.processes import Processes
from decoupled.runtime.threads import Threads


def build(setting: Setting, rank: int, method: str, blocks: int, processes: bool = False) -> dict[str, Run]:
    """One trainer, open for the whole benchmark; a run is one call of `fit`, filling and draining included."""
    trainer = Trainer(
        nn.Sequential(*setting.units()),
        method,
        blocks=[setting.cut] if blocks == 2 else blocks,
        loss=F.cross_entropy,
        optimizer=sgd,
        runtime=Processes(processes=blocks, intra_op=1) if processes else Threads(intra_op=1),
    )

    def run(batches: int) -> None:
        trainer.fit(setting.batches(batches))

    return {"run": run}
