"""A small training whose outcome is compared bit for bit; under torchrun: ``-m decoupled.benchmarks.peers.training``.

`train` runs it on any runtime. As a program, every rank runs it on its processes, and rank 0 writes what came out.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from decoupled import Trainer, models
from decoupled.data.sources import digits

METHODS = ("pipedream", "greedy_local")
_BATCH, _BATCHES, _EPOCHS = 64, 9, 2


def train(method: str, runtime: str) -> dict[str, Tensor] | None:
    """Train ResNet-8 in two blocks on digits for two epochs of 9 batches, the last of 31 samples.

    Returns:
        Every tensor and number of the final state of all blocks by its path (parameters, buffers, heads, optimizers,
        counters of updates); None on ranks other than 0.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = digits(limit=_BATCH * _BATCHES - 33)
    batches = list(zip(data.train.inputs.split(_BATCH), data.train.targets.split(_BATCH), strict=True))
    with Trainer(
        models.build("resnet8", tuple(data.train.inputs.shape[1:]), 10),
        method,
        blocks=[2],
        loss=F.cross_entropy,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        runtime=runtime,
    ) as trainer:
        trainer.fit(batches, epochs=_EPOCHS)
        if int(os.environ.get("RANK", "0")):
            return None
        return dict(leaves(trainer.state_dict()["blocks"]))


def leaves(tree: Any, path: str = "blocks") -> Iterator[tuple[str, Tensor]]:
    """The tensors and numbers of nested mappings and sequences, by their path."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for name, branch in tree.items():
            yield from leaves(branch, f"{path}.{name}")
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        for number, branch in enumerate(tree):
            yield from leaves(branch, f"{path}.{number}")
    elif isinstance(tree, int | float):
        yield path, torch.tensor(tree, dtype=torch.float64)


def main() -> None:
    """Train with every method; rank 0 writes ``METHOD.pt`` into the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("methods", nargs="+")
    given = parser.parse_args()
    for method in given.methods:
        state = train(method, "processes")
        if state is not None:
            torch.save(state, given.folder / f"{method}.pt")


if __name__ == "__main__":
    main()
