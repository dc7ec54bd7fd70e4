"""DistributedDataParallel: every rank holds the whole network and takes its share of the batch; gloo on one host."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from decoupled.benchmarks.peers.setting import Run, Setting, sgd


def build(setting: Setting, rank: int) -> dict[str, Run]:
    """PyTorch's defaults; the batch of all ranks together is the batch of everybody else."""
    network = DistributedDataParallel(nn.Sequential(*setting.units()).train())
    optimizer = sgd(network.parameters())
    ranks = dist.get_world_size()

    def run(batches: int) -> None:
        total = 0.0
        for x, y in setting.batches(batches):
            x, y = x.tensor_split(ranks)[rank], y.tensor_split(ranks)[rank]
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()

    return {"run": run}
