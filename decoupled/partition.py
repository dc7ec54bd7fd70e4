"""Cutting a model into blocks: contiguous groups of units whose most expensive block is as cheap as possible.

::

    units   u0  u1  u2 | u3  u4 | u5  u6  u7        cuts = [3, 5]: the index of the first unit of every later block
    blocks      0      |   1    |     2

A pipeline runs at the pace of its slowest block, so `cuts` minimises the largest sum of costs, exactly, by dynamic
programming over prefixes. Of the partitions that reach this minimum it takes one with the smallest sum of squared block
costs, which is even among the cheaper blocks too; of those the latest cuts, so that an activation without cost stays
with the layer before it. A cost is a unit's measured forward + backward seconds (and the forward once more where a
block replays it), or its number of parameters. Not modelled: the bytes that a cut sends, and memory.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from decoupled.errors import UserError, WrongType
from decoupled.unit_costs import unit_parameters, unit_passes


def split(
    model: nn.Sequential | Sequence[nn.Module] | nn.ModuleList,
    blocks: int | Sequence[int],
    sample: Any = None,
    by: Literal["time", "parameters"] = "time",
    tie: Literal["copy"] | None = None,
    device: torch.device | str | None = None,
    replays: Callable[[int], bool] = lambda k: False,
) -> list[nn.Sequential]:
    """Cut `model` into blocks.

    Args:
        model: an ``nn.Sequential`` or a list of modules, the units; a cut lies between two of them.
        blocks: how many blocks, balanced; or the cut indices: cut i is the first unit of block i + 1, strictly
            increasing, between 1 and units - 1.
        sample: a batch to measure with: a tensor of inputs, or a tuple that begins with it (a training batch). Without
            it the parameter count decides.
        by: ``"time"`` balances measured seconds (if there is a sample), ``"parameters"`` parameter counts.
        tie: what to do with a parameter or buffer that two blocks would share. Blocks are trained independently, so
            it cannot stay tied: None refuses; ``"copy"`` gives each later block its own copy, equal at first and
            trained apart from then on.
        device: where to measure; None: where the model is.
        replays: whether block k will run every forward twice (`Method.replays`), when measured time is balanced.

    Returns:
        The blocks. They hold the model's own modules and parameters, except the units copied by ``tie="copy"``.

    Raises:
        TypeError: `model` is no list of modules, or `blocks` no integer or list of them.
        UserError: fewer than 1 or more blocks than units, a cut outside the model or out of order, a shared parameter.

    Example:
        >>> layers = [nn.Linear(4, 4) for _ in range(6)]
        >>> [len(block) for block in split(layers, blocks=3)]
        [2, 2, 2]
    """
    parts, names = _units(model)
    if by not in ("time", "parameters"):
        raise UserError(f"by={by!r} is unknown; use by='time' or by='parameters'")
    if tie not in (None, "copy"):
        raise UserError(f"tie={tie!r}: independent blocks cannot keep a parameter tied; use tie='copy' or None")
    if isinstance(blocks, int) and not isinstance(blocks, bool):
        _check_count(blocks, len(parts))
        timed = by == "time" and sample is not None and blocks > 1
        passes = unit_passes(parts, sample, device=device) if timed else [(0, n) for n in unit_parameters(parts)]
        at = cuts([both for _, both in passes], blocks, [fore for fore, _ in passes], replays)
    else:
        at = _check_cuts(blocks, len(parts))
    edges = [0, *at, len(parts)]
    groups = [parts[a:b] for a, b in itertools.pairwise(edges)]
    return [nn.Sequential(*group) for group in _separate(groups, names, tie)]


def cuts(
    costs: Sequence[float], blocks: int, again: Sequence[float] = (), replays: Callable[[int], bool] = lambda k: False
) -> list[int]:
    """Return the cut indices that minimise the largest block cost.

    With prefix sums P_k, ``best(k, j) = min over i < j of max(best(k-1, i), P_k[j] - P_k[i])`` is the smallest possible
    bottleneck of the first j units in blocks 0 to k; time O(blocks units^2).

    Args:
        costs: one finite number >= 0 per unit.
        blocks: how many blocks; each gets at least one unit.
        again: what every unit costs on top of that in a block k for which `replays(k)`.

    Returns:
        ``blocks - 1`` strictly increasing indices between 1 and units - 1.

    Raises:
        UserError: fewer than 1 or more blocks than units, or a cost that is negative or not finite.

    Example:
        >>> cuts([4, 1, 1, 1, 1], blocks=3)
        [1, 3]
        >>> cuts([3] * 7, blocks=2)  # 12 | 9
        [4]
        >>> cuts([3] * 7, blocks=2, again=[1] * 7, replays=lambda k: k == 0)  # 12 | 12, not 16 | 9
        [3]
    """
    _check_count(blocks, len(costs))
    values, more = np.asarray(costs, np.float64), np.asarray(again if len(again) else [0] * len(costs), np.float64)
    if not all(np.isfinite(given).all() and (given >= 0).all() for given in (values, more)):
        raise UserError(f"unit costs must be finite and not negative, got {list(costs)}; measure them again")
    values = values if values.any() else np.ones_like(values)
    twice = [replays(k) for k in range(blocks)]
    between = _between(values), _between(values + more)  # of a block that runs its forwards once, and twice
    bottleneck, _ = _cheapest([between[k] for k in twice], np.maximum)
    # Differences of prefix sums are rounded: without the tolerance, blocks of equal cost could exclude each other.
    even = [np.where(one <= bottleneck * (1 + 1e-9), (one / bottleneck) ** 2, np.inf) for one in between]
    _, at = _cheapest([even[k] for k in twice], np.add)
    return at


def _between(values: np.ndarray) -> np.ndarray:
    """At [i, j] the cost of units i ... j-1 as one block; an empty block is not allowed."""
    prefix = np.concatenate([[0.0], np.cumsum(values)])
    between = prefix[None, :] - prefix[:, None]
    between[np.tril_indices(len(prefix))] = np.inf
    return between


def _cheapest(each: Sequence[np.ndarray], combine: np.ufunc) -> tuple[float, list[int]]:
    """Return the smallest combined cost of a partition, and its cuts (the latest, if several); `each`: by block."""
    best, choices = each[0][0], []
    for between in each[1:]:
        through = combine(best[:, None], between)
        choice = len(best) - 1 - through[::-1].argmin(axis=0)
        best = through[choice, np.arange(len(choice))]
        choices.append(choice)
    at, end = [], len(best) - 1
    for choice in reversed(choices):
        end = int(choice[end])
        at.append(end)
    return float(best[-1]), at[::-1]


def _units(model: object) -> tuple[list[nn.Module], list[str]]:
    """Return the units of a model and what messages call them."""
    if isinstance(model, nn.Sequential):
        if type(model).forward is not nn.Sequential.forward:
            raise UserError(
                f"{type(model).__name__} is an nn.Sequential with its own forward, which cutting would ignore; "
                f"write it as a plain list of modules"
            )
        # _modules, unlike named_children, keeps a module that occurs twice.
        items: Iterable[tuple[str, object]] = model._modules.items()
    elif isinstance(model, (list, tuple, nn.ModuleList)):
        items = [("", unit) for unit in model]
    else:
        raise WrongType(f"cannot cut a {type(model).__name__}; give an nn.Sequential or a list of nn.Module")
    units, names = [], []
    for index, (name, unit) in enumerate(items):
        if not isinstance(unit, nn.Module):
            raise WrongType(f"unit {index} of the model is a {type(unit).__name__}; every unit must be an nn.Module")
        if any(isinstance(p, nn.UninitializedParameter) for p in unit.parameters()):
            raise UserError(f"unit {index} has lazy parameters; run one batch through the model before cutting it")
        units.append(unit)
        label = type(unit).__name__ if name in ("", str(index)) else f"{name!r}, {type(unit).__name__}"
        names.append(f"unit {index} ({label})")
    return units, names


def _check_count(blocks: int, units: int) -> None:
    if blocks < 1:
        raise UserError(f"blocks={blocks}: a model has at least one block; use blocks=1 or more")
    if blocks > units:
        raise UserError(
            f"blocks={blocks} but the model has only {units} units to cut between; "
            f"use at most {units} blocks, or a list of finer modules"
        )


def _check_cuts(blocks: object, units: int) -> list[int]:
    """Return explicit cut indices as a list after checking them."""
    if isinstance(blocks, (str, bytes)) or not isinstance(blocks, Iterable):
        raise WrongType(f"blocks must be an integer or a list of cut indices, got {blocks!r}")
    at = list(blocks)
    if not all(isinstance(cut, int) and not isinstance(cut, bool) for cut in at):
        raise WrongType(f"cut indices must be integers, got {at}")
    for cut in at:
        if not 0 < cut < units:
            raise UserError(f"cut {cut} lies outside the model of {units} units; cuts go from 1 to {units - 1}")
    if any(a >= b for a, b in itertools.pairwise(at)):
        raise UserError(f"cuts {at} are not strictly increasing; use {sorted(set(at))}")
    return at


def _separate(groups: list[list[nn.Module]], names: list[str], tie: str | None) -> list[list[nn.Module]]:
    """Refuse tensors that two blocks share, or give each later block its own copy of them."""
    owner: dict[object, tuple[int, str, str]] = {}
    result, first = [], 0
    for block, group in enumerate(groups):
        found: dict[object, tuple[int, str, str]] = {}
        # Seeding deepcopy's memo with what may stay keeps every tensor that is not shared the model's own.
        stays: dict[int, Any] = {}
        shared = set()
        for index, unit in enumerate(group):
            for name, tensor in itertools.chain(unit.named_parameters(), unit.named_buffers()):
                where = names[first + index]
                key = _identity(tensor)
                found.setdefault(key, (block, where, name))
                if key not in owner:
                    stays[id(tensor)] = tensor
                    continue
                if tie is None:
                    other, there, their = owner[key]
                    raise UserError(
                        f"{their!r} of {there} in block {other} is the same tensor as {name!r} of {where} in block "
                        f"{block}; blocks share nothing: cut so that both are in one block, or train copies: "
                        "decoupled.split(..., tie='copy') makes blocks that have them"
                    )
                shared.add(index)
        memo = dict(stays)
        result.append([copy.deepcopy(unit, memo) if i in shared else unit for i, unit in enumerate(group)])
        for key, place in found.items():
            owner.setdefault(key, place)
        first += len(group)
    return result


def _identity(tensor: Tensor) -> object:
    """Return what two tensors have in common exactly if they are the same memory."""
    # Two Parameters may wrap one memory (weight = nn.Parameter(other.data)); empty and meta tensors have none.
    pointer = tensor.data_ptr() if tensor.numel() else 0
    return (tensor.device, pointer) if pointer else id(tensor)
