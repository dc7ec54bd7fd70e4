"""torch.distributed.pipelining: GPipe and 1F1B with one rank per block; gloo on one host."""

from __future__ import annotations

import torch
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional as F

from decoupled.benchmarks.peers.setting import Run, Setting, sgd

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
MICROBATCHES = (2, 4, 8)


def names() -> list[str]:
    """The runs that `build` returns, e.g. ``"gpipe 4"``: schedule and microbatches."""
    return [f"{kind} {parts}" for kind in SCHEDULES for parts in MICROBATCHES]


def build(setting: Setting, rank: int) -> dict[str, Run]:
    """One stage per schedule and number of microbatches (a stage belongs to one schedule)."""
    return {name: _build(setting, rank, *name.split()) for name in names()}


def _build(setting: Setting, rank: int, kind: str, parts: str) -> Run:
    block = setting.halves()[rank].train()
    optimizer = sgd(block.parameters())
    stage = PipelineStage(block, rank, 2, torch.device("cpu"))
    schedule = SCHEDULES[kind](stage, int(parts), loss_fn=F.cross_entropy)

    def run(batches: int) -> None:
        total = 0.0
        for x, y in setting.batches(batches):
            optimizer.zero_grad()
            if rank == 0:
                schedule.step(x, return_outputs=False)
            else:
                losses: list[torch.Tensor] = []
                schedule.step(target=y, losses=losses, return_outputs=False)
                total += torch.stack(losses).mean().item()
            optimizer.step()

    return run
