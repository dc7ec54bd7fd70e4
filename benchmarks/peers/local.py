"""Local updates at their own work, without the library: one loop, one thread, every block by turns in plain PyTorch.

    x_k = detach(y_{k-1}),  y_k = f_k(x_k);  for every loss j:  g_j = dJ_j/dy_j,  delta_j = vjp(f_j, g_j) at its input
    weights of block k follow g_k + delta_{k+1} (the second only where losses reach two blocks)

It does all the work of the method, heads included, and nothing else: what two workers have to be measured against.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from decoupled import Trainer, heads
from decoupled.benchmarks.peers.setting import CLASSES, Run, Setting, sgd
from decoupled.runtime.threads import Threads


def build(setting: Setting, rank: int, cuts: list[int], reach: int) -> dict[str, Run]:
    """The loop of greedy (`reach` 1) or overlapping (2) updates on blocks cut before the units `cuts`."""
    torch.set_num_threads(1)
    units, (x, _) = setting.units(), next(setting.batches(1))
    blocks = [nn.Sequential(*units[a:b]).train() for a, b in itertools.pairwise([0, *cuts, None])]
    last, tops = len(blocks) - 1, []
    with torch.no_grad():
        for k, block in enumerate(blocks):
            x = block(x)
            head = heads.build("linear", tuple(x.shape[1:]), (CLASSES,)) if reach - 1 <= k < last else nn.Identity()
            tops.append(head if reach - 1 <= k else None)
    trained = nn.ModuleList([*blocks, *(top for top in tops if top is not None)])
    optimizer = sgd(trained.parameters())

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        below = None  # output of the block below, its cotangent so far
        for k, (block, top) in enumerate(zip(blocks, tops, strict=True)):
            x = x.detach().requires_grad_(k > 0 and reach > 1)
            out = block(x)
            given = torch.zeros_like(out)
            if top is not None:
                leaf = out.detach().requires_grad_()
                loss = F.cross_entropy(top(leaf), y)
                loss.backward()
                loss.item()
                assert leaf.grad is not None
                given = leaf.grad
            if below is not None:
                lower, cotangent = below
                passed = torch.autograd.grad(out, x, given, retain_graph=True)[0] if k and reach > 1 else None
                lower.backward(cotangent if passed is None else cotangent + passed)
            below = (out, given)
            x = out
        assert below is not None
        below[0].backward(below[1])
        optimizer.step()

    def run(batches: int) -> None:
        for x, y in setting.batches(batches):
            step(x, y)

    return {"run": run}


def on_threads(setting: Setting, rank: int, method: str | dict, cuts: list[int]) -> dict[str, Run]:
    """The same by the library, one thread with one intra-op thread per block."""
    trainer = Trainer(
        nn.Sequential(*setting.units()),
        method,
        blocks=cuts,
        loss=F.cross_entropy,
        optimizer=sgd,
        runtime=Threads(intra_op=1),
    )

    def run(batches: int) -> None:
        trainer.fit(setting.batches(batches))

    return {"run": run}
