"""Evaluation: the held-out metric of the forward network, the only thing all methods are compared by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from decoupled.coupling import Loss
from decoupled.errors import UserError
from decoupled.source import unpack


def evaluate(units: Sequence[nn.Module], batches: Iterable[Any], loss: Loss) -> dict[str, float]:
    """Run the network in evaluation mode without gradients; its training mode is put back afterwards.

    Args:
        units: the network in order; each may live on its own device.
        batches: (inputs, targets) or (inputs, targets, indices).
        loss: (output, target) -> scalar batch mean.

    Returns:
        loss: mean over samples. accuracy: share of correct classes; NaN where targets are not class numbers.
    """
    modes = [(module, module.training) for unit in units for module in unit.modules()]
    for unit in units:
        unit.eval()
    total, correct, decisions, samples = 0.0, 0, 0, 0
    try:
        with torch.no_grad():
            for item in batches:
                inputs, targets, _ = unpack(item)
                output = _forward(units, inputs)
                targets = targets.to(output.device)
                total += float(loss(output, targets)) * len(inputs)
                samples += len(inputs)
                if not targets.is_floating_point() and output.dim() == targets.dim() + 1:
                    correct += int((output.argmax(1) == targets).sum())
                    decisions += targets.numel()
    finally:
        for module, mode in modes:
            module.training = mode
    if not samples:
        raise UserError("there is nothing to evaluate: the loader is empty")
    return {"loss": total / samples, "accuracy": correct / decisions if decisions else float("nan")}


def _forward(units: Sequence[nn.Module], x: Tensor) -> Tensor:
    for unit in units:
        reference = next(unit.parameters(), None)
        x = unit(x if reference is None else x.to(reference.device))
    return x
