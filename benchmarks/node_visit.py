"""What one visit of a node costs beyond its computation: a chain of 2-unit Linear nodes on threads.

    python -m decoupled.benchmarks.node_visit

A visit is a message or an answer that a node handles. All time of the run (controller, queues, checks, joins and the
loss included) is charged to the visits of the Linear nodes; the same forward and backward in plain PyTorch, half of it
per visit, is taken off.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn
from torch.nn import functional as F

from decoupled.graph import PPT, Asynchrony, GraphTrainer, Instance, Loss, NodeGraph, Phi, Pumped

NODES, INSTANCES, REPEATS = 8, 400, 5
NEVER = 1 << 30


def chain(nodes: int) -> NodeGraph:
    """Linear nodes in a row."""
    graph = NodeGraph("chain")
    x, y = graph.input("x"), graph.input("y")
    h = Phi("start")(x)
    for k in range(nodes):
        h = PPT(nn.Linear(2, 2), f"layer{k}")(h)
    Loss(F.mse_loss)(h, y)
    return graph


def visit(workers: int) -> float:
    """Seconds per visit of a Linear node, the least of some runs."""
    graph = chain(NODES)
    places = {f"layer{k}": k * workers // NODES for k in range(NODES)} | {"loss": workers - 1}
    instance = Instance([Pumped("x", (0,), torch.randn(1, 2)), Pumped("y", (0,), torch.randn(1, 2))])
    how = Asynchrony(max_active_keys=8, min_update_frequency=NEVER)
    with GraphTrainer(graph, how, optimizer=lambda p: torch.optim.SGD(p, 0.1), workers=places) as trainer:
        seconds = [trainer.fit([instance] * INSTANCES)[0]["seconds"] for _ in range(REPEATS)]
    return min(seconds) / (2 * NODES * INSTANCES)


def alone() -> float:
    """Seconds of half a forward and backward of the same layer in plain PyTorch, the least of some runs."""
    layer, x, gradient, found = nn.Linear(2, 2), torch.randn(1, 2), torch.ones(1, 2), []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(INSTANCES):
            leaf = x.detach().requires_grad_()
            layer(leaf).backward(gradient)
        found.append(time.perf_counter() - start)
    return min(found) / (2 * INSTANCES)


def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # type: ignore[union-attr]
    torch.set_num_threads(1)
    base = alone()
    for workers in (1, 2):
        whole = visit(workers)
        print(
            f"{workers} worker{'s' * (workers > 1)}: {whole * 1e6:.1f} us per visit, {base * 1e6:.1f} us of it in "
            f"PyTorch, {(whole - base) * 1e6:.1f} us around it"
        )


if __name__ == "__main__":
    main()
