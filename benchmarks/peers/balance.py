"""How well the cut balances two blocks: the seconds of the whole network and of every block alone, on one core.

    whole       forward, loss, backward, step of the uncut network
    gradient k  block k as a pipeline trains it: k = 0 follows a gradient from above; k = 1 has the loss and also
                computes the gradient for its input
    local k     block k as greedy local training does: k = 0 has an auxiliary head; k = 1 needs no input gradient

A pipeline without waiting runs at the pace of its slowest block, so whole / max over k is the limit of the speed-up.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled import heads
from decoupled.benchmarks.peers.setting import CLASSES, Run, Setting, sgd

NAMES = ("whole", "gradient 0", "gradient 1", "local 0", "local 1")


def build(setting: Setting, rank: int) -> dict[str, Run]:
    """One run per entry of `NAMES`."""
    torch.set_num_threads(1)
    x, y = next(setting.batches(1))
    with torch.no_grad():
        hidden = setting.halves()[0](x)
    gradient = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)) / hidden.numel()
    head = heads.build("linear", tuple(hidden.shape[1:]), (CLASSES,))
    lower, upper = setting.halves()
    return {
        "whole": _train(nn.Sequential(*setting.units()), x, y),
        "gradient 0": _train(lower, x, gradient),
        "gradient 1": _train(upper, hidden.requires_grad_(), y),
        "local 0": _train(nn.Sequential(setting.halves()[0], head), x, y),
        "local 1": _train(setting.halves()[1], hidden.detach(), y),
    }


def _train(block: nn.Module, x: Tensor, target: Tensor) -> Run:
    """Training of `block` on one batch: towards labels, or along the given gradient if `target` is one."""
    optimizer = sgd(block.train().parameters())

    def run(batches: int) -> None:
        for _ in range(batches):
            optimizer.zero_grad()
            output, leaf = block(x), x
            if target.is_floating_point():
                output.backward(target)
            else:
                F.cross_entropy(output, target).backward()
            leaf.grad = None
            optimizer.step()

    return run
