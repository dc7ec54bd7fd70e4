"""Models as block lists: a model is a list of units, the finest pieces that are sensible to cut between.

A unit takes one tensor and returns one tensor, and changes neither in place; `Carry` makes one of a module that needs
something else as well. `decoupled.partition.split` groups units into blocks. A config names a model, `build` makes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from decoupled.errors import UserError, unknown
from decoupled.models.carry import Carry
from decoupled.models.mlp import mlp
from decoupled.models.resnet import resnet
from decoupled.models.revnet import revnet
from decoupled.models.transformer import transformer
from decoupled.models.wide_resnet import wide_resnet
from decoupled.randomness import seeded
from decoupled.specs import check_options, parse

__all__ = ["Carry", "build", "mlp", "names", "resnet", "revnet", "transformer", "wide_resnet"]

_BUILDERS: dict[str, Callable[..., list[nn.Module]]] = {
    "mlp": mlp,
    "resnet": resnet,
    "revnet": revnet,
    "transformer": transformer,
    "wide_resnet": wide_resnet,
}


def names() -> list[str]:
    """Return the names `build` knows; ``resnetN`` works for every N = 6n + 2, the usual ones are listed."""
    depths = (8, 14, 20, 32, 44, 56, 110)
    return [*_BUILDERS, *(f"resnet{depth}" for depth in depths)]


def build(spec: str | Mapping[str, Any], inputs: Sequence[int], classes: int, seed: int = 0) -> list[nn.Module]:
    """Build the model a config asks for, on the CPU, in float32 or torch's default type.

    Args:
        spec: a name (``"mlp"``, ``"resnet20"``) or a mapping ``{"name": "mlp", "width": 64}`` with options of the
            builder function.
        inputs: shape of one sample.
        classes: number of outputs.
        seed: of the initialisation; the same seed gives the same bits, and no global random state changes.

    Returns:
        The list of units.

    Raises:
        UserError: unknown name or option (with the nearest known one), or a value the builder refuses.
    """
    name, options = parse("model", spec)
    match = re.fullmatch(r"resnet(\d+)", name)
    base = "resnet" if match else name
    if base not in _BUILDERS:
        raise unknown("model", name, names())
    if match:
        if "depth" in options:
            raise UserError(
                f"the name {name!r} already says the depth; write {{name: resnet, depth: {options['depth']}}}"
            )
        options["depth"] = int(match.group(1))
    builder = _BUILDERS[base]
    check_options("model", name, builder, options)
    # The CPU generator is seeded directly: torch.manual_seed would also reseed the accelerators.
    with seeded(seed), torch.device("cpu"):
        return builder(tuple(inputs), classes, **options)
