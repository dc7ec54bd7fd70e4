"""What a unit of a model costs: its measured forward + backward seconds, or its number of parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from decoupled.errors import UserError, WrongType, first_line
from decoupled.evaluation import train_unless_mixed
from decoupled.runtime import memory
from decoupled.runtime.contract import intra_op_threads


def unit_parameters(units: Iterable[nn.Module]) -> list[int]:
    """Return the number of parameters of every unit."""
    return [sum(p.numel() for p in unit.parameters()) for unit in units]


def unit_passes(
    units: Sequence[nn.Module], sample: Any, repeats: int = 7, warmup: int = 2, device: torch.device | str | None = None
) -> list[tuple[float, float]]:
    """Measure the seconds of every unit on a sample batch: of a forward, and of a forward with its backward.

    Works on copies in training mode, so the model's buffers, gradients and mode and the random state stay as they are,
    and on one intra-op thread: blocks share the cores, and a busy machine disturbs one thread least. Freed memory stays
    with the process from then on, as in training: with fresh pages for every pass, units of large activations would
    look dearer than they are.

    Args:
        units: applied one after the other; each takes and returns a tensor or a tuple of tensors.
        sample: inputs of the first unit, or a tuple that begins with them.
        repeats: measured passes; the fastest of each unit counts, which ignores interruptions.
        warmup: passes before, which pay for memory and kernel selection.
        device: where to measure, one unit at a time, so that a model fits that does not as a whole; None: where it is.

    Returns:
        Both per unit.

    Raises:
        TypeError: the sample has no tensor, or a unit returns none.
        UserError: a unit cannot be copied.
    """
    x = sample[0] if isinstance(sample, (tuple, list)) and sample else sample
    if not isinstance(x, Tensor):
        raise WrongType(f"the sample must be a tensor of inputs or (inputs, ...), got {type(sample).__name__}")
    copies = []
    for index, unit in enumerate(units):
        try:
            twin = copy.deepcopy(unit)
        except Exception as error:
            where = f"unit {index} ({type(unit).__name__}) cannot be copied to measure it"
            raise UserError(f"{where} ({error}); use by='parameters' or give the cuts") from error
        twin.zero_grad(set_to_none=True)
        copies.append(twin)
    train_unless_mixed(copies)
    home = next((p.device for unit in copies for p in unit.parameters()), x.device)
    try:
        x = x.to(home if device is None else device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={device!r} cannot be used ({first_line(error)}); name one that is there") from None
    memory.keep()
    cuda = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.enable_grad(), intra_op_threads(1):
        passes = [_one_pass(copies, x, home) for _ in range(warmup + repeats)][warmup:]
    return [(min(fore for fore, _ in times), min(both for _, both in times)) for times in zip(*passes, strict=True)]


def _one_pass(units: Sequence[nn.Module], x: Tensor, home: torch.device) -> list[tuple[float, float]]:
    """Run every unit forward and backward once, each on a detached input where `x` is; seconds of F, and of both."""
    seconds = []
    # Never a leaf itself: a unit that begins with an in-place operation may not change one, nor the caller's sample.
    inputs: Any = x.detach().clone()
    for index, unit in enumerate(units):
        try:
            unit.to(x.device)
            _wait(x.device)
            start = perf_counter()
            output = unit(inputs)
            _wait(x.device)
            fore = perf_counter() - start
        except torch.OutOfMemoryError as error:
            where = f"unit {index} ({type(unit).__name__}) and a batch of {len(x)} do not fit on {x.device}"
            raise UserError(f"{where} ({first_line(error)}); give smaller units or batches, or the cuts") from error
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            where = f"unit {index} ({type(unit).__name__}) does not take an input of shape {tuple(x.shape)}"
            raise UserError(f"{where} or what became of it ({first_line(error)}); check model and batches") from error
        tensors = _tensors(output)
        if not tensors:
            raise WrongType(f"unit {index} ({type(unit).__name__}) returned {type(output).__name__}, expected a tensor")
        roots = [t for t in tensors if t.requires_grad]
        if roots:
            torch.autograd.backward(roots, [torch.ones_like(t) for t in roots])
        _wait(x.device)
        seconds.append((fore, perf_counter() - start))
        # Only the first unit computes no gradient of its input.
        received = [t.detach().requires_grad_(t.is_floating_point()).clone() for t in tensors]
        inputs = received[0] if isinstance(output, Tensor) else tuple(received)
        unit.to(home)
    return seconds


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors of a unit's output: itself, or those of a tuple or list."""
    if isinstance(output, Tensor):
        return [output]
    return [t for t in output if isinstance(t, Tensor)] if isinstance(output, (tuple, list)) else []


def _wait(device: torch.device) -> None:
    """Wait until an asynchronous device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
