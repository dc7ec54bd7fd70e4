"""A multilayer perceptron as a list of units: unit i is one linear layer with its activation.

::

    x (N, *inputs) -> [flatten, linear, ReLU] -> [linear, ReLU] -> ... -> [linear] -> (N, classes)
                       unit 0                     unit 1                  unit depth-1
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from decoupled.specs import positive


def mlp(
    inputs: Sequence[int], classes: int, *, width: int = 256, depth: int = 4, batch_norm: bool = False
) -> list[nn.Module]:
    """Build a multilayer perceptron of `depth` linear layers.

    Args:
        inputs: shape of one sample, e.g. ``(1, 28, 28)``; flattened by the first unit.
        classes: number of outputs.
        width: features of every hidden layer.
        depth: number of linear layers, the output layer included; also the number of units. Eight hidden layers of
            4096 are ``{name: mlp, depth: 9, width: 4096}``.
        batch_norm: put a BatchNorm1d between every hidden linear layer and its ReLU (training batches then need at
            least two samples).

    Returns:
        `depth` units; applied one after the other they map ``(N, *inputs)`` to logits ``(N, classes)``.

    Raises:
        UserError: a size below 1.

    Example:
        >>> len(mlp((1, 8, 8), 10, width=32, depth=3))
        3
    """
    positive("mlp", classes=classes, width=width, depth=depth, **{f"inputs[{i}]": n for i, n in enumerate(inputs)})
    units: list[nn.Module] = []
    features = math.prod(inputs)
    for index in range(depth):
        last = index == depth - 1
        outputs = classes if last else width
        layers: list[nn.Module] = [] if index else [nn.Flatten()]
        layers.append(nn.Linear(features, outputs))
        if not last:
            # Not in place: a unit's first and last tensors may be messages between blocks.
            layers += [nn.BatchNorm1d(outputs), nn.ReLU()] if batch_norm else [nn.ReLU()]
        units.append(nn.Sequential(*layers))
        features = outputs
    return units
