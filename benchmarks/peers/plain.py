"""The plain PyTorch training loop: one process, no library."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from decoupled.benchmarks.peers.setting import Run, Setting, sgd


def build(setting: Setting, rank: int, threads: int = 1) -> dict[str, Run]:
    """The loop of the PyTorch tutorials with `threads` intra-op threads."""
    torch.set_num_threads(threads)
    network = nn.Sequential(*setting.units()).train()
    optimizer = sgd(network.parameters())

    def run(batches: int) -> None:
        total = 0.0
        for x, y in setting.batches(batches):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()

    return {"run": run}
