"""Matrix products of a module, counted without running it: it is traced on torch's meta device.

    traced(module, (3, 32, 32), torch.float32)     .forward, .weights, .inputs, .rest, .both   FLOPs per example
                                                   .shape, .dtype                              of what comes out

torch.utils.flop_counter knows matrix products, convolutions and attention; elementwise work is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from decoupled.tape import Half

Weights = list[Tensor]
Around = AbstractContextManager[Any]
EXAMPLES = 2  # in the batch that is traced: BatchNorm wants more than one


@dataclass(frozen=True)
class Traced:
    """FLOPs of a module per example, see `decoupled.flops`; `shape` and `dtype` of an output without the batch."""

    forward: float
    weights: float
    inputs: float
    rest: float
    both: float
    shape: tuple[int, ...]
    dtype: torch.dtype


def traced(module: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> Traced:
    """Trace a module. Args: shape: of one example. dtype: of the input; integers have no gradient."""
    state, every = _state(module)
    leaves = [w for w in every if w.requires_grad]
    x = torch.empty(EXAMPLES, *shape, dtype=dtype, device="meta").requires_grad_(dtype.is_floating_point)
    forward, y = counted(lambda: functional_call(module, state, (x,)))
    sinks = [x] if x.requires_grad else []
    weights, inputs, both = (backward(y, some) for some in (leaves, sinks, sinks + leaves))
    return Traced(forward, weights, inputs, _rest(x, y, leaves), both, tuple(y.shape[1:]), y.dtype)


def recorded(
    module: nn.Module, shape: Sequence[int], dtype: torch.dtype, to_input: bool, around: Callable[[Weights], Around]
) -> float:
    """FLOPs per example of a forward inside of `around(weights)`, whose graph may lead to the input, too."""
    state, weights = _state(module)
    x = torch.empty(EXAMPLES, *shape, dtype=dtype, device="meta").requires_grad_(to_input and dtype.is_floating_point)
    with around(weights):
        return counted(lambda: functional_call(module, state, (x,)))[0]


def counted(run: Callable[[], Any]) -> tuple[float, Any]:
    """FLOPs per example of a call, and what it returns."""
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops() / EXAMPLES, result


def backward(y: Tensor, sinks: Sequence[Tensor]) -> float:
    """FLOPs per example of a backward from `y` to `sinks`."""
    if not sinks or not y.requires_grad:
        return 0.0
    ones = torch.ones_like(y)
    return counted(lambda: torch.autograd.grad(y, sinks, ones, retain_graph=True, allow_unused=True))[0]


def _rest(x: Tensor, y: Tensor, leaves: Weights) -> float:
    """FLOPs per example of the weight gradients, when a backward to `x` has noted what they need."""
    if not leaves or not (x.requires_grad and y.requires_grad):
        return 0.0
    half = Half(x, y, torch.ones_like(y), leaves)
    return counted(lambda: half.weights(leaves))[0]


def _state(module: nn.Module) -> tuple[dict[str, Tensor], Weights]:
    """Parameters and buffers by name, on the meta device, and the parameters in the order of the module's."""
    weights = {name: _meta(p).requires_grad_(p.requires_grad) for name, p in module.named_parameters()}
    return weights | {name: _meta(buffer) for name, buffer in module.named_buffers()}, list(weights.values())


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")
