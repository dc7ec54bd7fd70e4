"""FLOPs of a method on a network: what one example costs, and how long the longest chain of work is.

    cost(blocks, (3072,), "greedy_local")     .total        FLOPs per example, all blocks together: the price
                                              .sequential   FLOPs per example on the critical path: the time

Nothing is run: blocks and heads are traced on torch's meta device and counted by torch.utils.flop_counter, which knows
matrix products, convolutions and attention (a multiplication and an addition are 2 FLOPs). Elementwise work is not
counted. Of every block are counted, per example:

    forward   f      one forward
    weights   w      a backward that ends in the weight gradients
    inputs    i      a backward that ends in the input gradient (as an operation I does)
    rest      r      what W has left to do behind such a backward of the same gradient
    both      b      one backward that gives both; b = i + r, and w = r for one linear layer, more for deeper blocks
    head      h      the objective: forward, and backward to the output of the block and the head's weights; and making
                     the input, where a block does so itself. What halves learn from answers is not counted
    update    u      per step, not per example: weights, with the head's, times FLOPs per weight

The operations of one pass (`Method.order`) say which of them a block does: F f + h, B b (or w, if nobody below wants
the input gradient), I i (or nothing, likewise), W w (or r, if nothing new has come since I); a retention that
recomputes adds f. What a correction does around the run whose graph is used (random feedback) is added as well.

The critical path is that of Laskin et al. 2020 as we recall it: all examples run in parallel, and so do all blocks that
are not locked together. Neighbours are locked when they follow the same objectives with no delay: then they take turns,
and their work adds up. Where the lock moves on with the block (`overlapping_local`) blocks count as parallel, although
each waits for an answer. The first filling of the pipeline, messages, elementwise work and waiting are not modelled;
`decoupled.simulate` models waiting.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from decoupled import registry
from decoupled.build import halves
from decoupled.correction import Acting, Site
from decoupled.coupling import Loss, Lower, Place, Upper
from decoupled.errors import UserError, first_line
from decoupled.messages import Data
from decoupled.method import Method
from decoupled.plan import walk
from decoupled.tracing import EXAMPLES, Traced, backward, counted, recorded, traced

# What a message may hold that nobody computes with on its way; for anything else there is work that is not counted.
COUNTED = {"activation", "gradient", "target", "weights", "neutral", "positive", "negative"}


@dataclass(frozen=True)
class Flops:
    """FLOPs of one block; see the module's docstring. Per example, but `update`, which is per step.

    Attributes:
        forward, weights, inputs, both, rest: of the block itself.
        head: of its objective, and of making its input where it does so itself.
        update: of its optimizer step.
        work: of all that the method lets it do with one example.
        head_parameters: weights of its coupling halves.
    """

    forward: float
    weights: float
    inputs: float
    both: float
    rest: float = 0.0
    head: float = 0.0
    update: float = 0.0
    work: float = 0.0
    head_parameters: int = 0


@dataclass(frozen=True)
class Cost:
    """What a method costs on a network.

    Attributes:
        blocks: every block by itself.
        locked: runs of blocks that take turns, as ranges of block numbers.
        passes: how often an example comes (inner rounds); `work` is for all of them.
        total: FLOPs per example.
        sequential: FLOPs per example on the critical path.
    """

    blocks: tuple[Flops, ...]
    locked: tuple[range, ...]
    passes: int = 1

    @property
    def total(self) -> float:
        return sum(block.work for block in self.blocks)

    @property
    def sequential(self) -> float:
        return max(sum(self.blocks[k].work for k in run) for run in self.locked)

    def spent(self, examples: Sequence[int], updates: Sequence[int], batch: float) -> tuple[float, float]:
        """FLOPs of a whole run, from what its blocks have counted: in all, and on the critical path.

        Args:
            examples: that went through each block, again and again where a block takes them several times.
            updates: steps of each block. batch: examples per minibatch, on average.
        """
        work = [n * block.work / self.passes for n, block in zip(examples, self.blocks, strict=True)]
        steps = [n * block.update for n, block in zip(updates, self.blocks, strict=True)]
        longest = max(sum(work[k] for k in run) for run in self.locked) / batch
        return sum(work) + sum(steps), longest + max(steps)

    def price(self, examples: int) -> float:
        """FLOPs of one step on a batch: every example and every update is paid for."""
        return examples * self.total + sum(block.update for block in self.blocks)

    def time(self) -> float:
        """Sequential FLOPs of one step on a batch of any size: examples in parallel, updates of blocks too."""
        return self.sequential + max(block.update for block in self.blocks)


def count(module: nn.Module, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Flops:
    """Count one module.

    Args:
        module: maps (batch, *shape) to (batch, ...); it is not run, and may live on the meta device.
        shape: of one example. dtype: of the input; integers have no gradient.

    Returns:
        FLOPs per example of forward and backward; `head`, `update` and `work` are 0.
    """
    return _flops(traced(module, shape, dtype))


def cost(
    blocks: Sequence[nn.Module],
    inputs: Sequence[int],
    method: str | Mapping[str, Any] | Method,
    *,
    loss: Loss = nn.functional.cross_entropy,
    dtype: torch.dtype = torch.float32,
    skip: bool = True,
    update: float = 2.0,
) -> Cost:
    """Count a method on a network.

    Args:
        blocks: one module per block, nn.Sequential of its units.
        inputs: shape of one example.
        method: as for `Trainer`.
        loss: (output, target) -> scalar; targets are taken to be class numbers.
        dtype: of the inputs.
        skip: leave out input gradients that nobody needs; False charges every backward in full, as twice a forward.
        update: FLOPs per weight and step: 2 for SGD, 4 with momentum, 13 for Adam (counted off their equations).

    Raises:
        UserError: no blocks, a block that does not take its input, or a method whose messages take work of their own.

    Source: Laskin et al. 2020 (arXiv 2012.03837), whose axes these are; the formulas are derived here.
    """
    point, K = method if isinstance(method, Method) else registry.make(method), len(blocks)
    if more := {*point.coupling.up, *point.coupling.down} - COUNTED:
        raise UserError(
            f"method {point.name!r} cannot be counted: it sends {', '.join(sorted(more))}, and what it takes to make "
            "and use that is not known here; measure it instead"
        )
    if not K:
        raise UserError("the network has no blocks: give a list with one module per block")
    single, shapes, types = [], [], [dtype]
    shape: tuple[int, ...] = tuple(inputs)
    for k, block in enumerate(blocks):
        try:
            found = traced(block, shape, types[-1])
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"block{k} does not take an input of shape {shape} per sample; check the blocks") from error
        single.append(_flops(found))
        shapes.append(shape := found.shape)
        types.append(found.dtype)
    results = []
    with torch.device("meta"):
        for k, flops in enumerate(single):
            place = Place(k, K, loss, tuple(shapes), tuple(inputs), tuple(blocks))
            lower, upper = halves(point, place)
            if lower.module is not None:
                lower.module.to("meta")  # what was copied from a block lives where the block does
            n = upper.streams  # rows per example
            head = _objective(lower, n, shapes[k], types[k + 1], shapes[-1][1:], tuple(inputs))
            head += _own_input(upper, tuple(inputs), dtype)
            own = sum(_weights(half.module) for half in (lower, upper) if half.module is not None)
            step = update * (_weights(blocks[k]) + own)
            whole = replace(_times(n, flops), head=head, update=step, head_parameters=own)
            more = n * _around(point, place, upper, types[k])
            results.append(_with_work(whole, point, k, K, (lower, upper), skip, more))
    return Cost(tuple(results), tuple(_locked(point, K)), _rounds(point))


def _flops(one: Traced) -> Flops:
    return Flops(one.forward, one.weights, one.inputs, one.both, one.rest)


def _times(n: int, one: Flops) -> Flops:
    return Flops(n * one.forward, n * one.weights, n * one.inputs, n * one.both, n * one.rest)


def _with_work(
    flops: Flops, method: Method, k: int, K: int, halves: tuple[Lower, Upper], skip: bool, more: float
) -> Flops:
    """Add up the operations of one pass (times the passes of an example); `more`: by corrections, if it is trained."""
    plan, (lower, upper) = method.order.plan(k, K), halves
    plan.end(1)
    kinds = [op.kind for op in walk(plan) if op.kind == "F" or method.facts.reach(k, K)]
    to_input = (upper.replies and upper.differentiates) or not skip
    work = flops.forward + flops.head + (flops.forward if method.replays(k, K) else 0.0)
    work += more if len(kinds) > 1 else 0.0
    # gradients for the output: how many are still to come, the own one among them, and how many I's have taken
    left, taken = lower.has_objective + (lower.replies if lower.awaits == "B" else 0), 0
    for kind in kinds:
        if kind == "I":
            work, left, taken = work + flops.inputs * to_input, left - 1, taken + 1
        elif kind == "B" or (kind == "W" and not taken and not skip):
            work += flops.both if to_input else flops.weights
        elif kind == "W":
            again = to_input and taken == 1 and not left  # the very gradient that I has walked back
            work += flops.rest if again else flops.weights
    return replace(flops, work=work * _rounds(method))


def _around(method: Method, place: Place, upper: Upper, dtype: torch.dtype) -> float:
    """What corrections add to a run whose graph is used, per row."""
    k, those = place.k, [correction for correction in method.corrections if correction.records]
    if not those:
        return 0.0

    def around(weights: list[Tensor]) -> AbstractContextManager[Any]:
        return Acting(those, Site(k, place.K, 0.0, weights, None, method.order.period)).recording(weights)

    block, shape = place.modules[k], place.shapes[k - 1] if k else place.inputs
    to_input = upper.replies and upper.differentiates
    return recorded(block, shape, dtype, to_input, around) - traced(block, shape, dtype).forward


def _rounds(method: Method) -> int:
    """How often an example comes; micro-batches are parts of a minibatch and bring every example once."""
    return method.feed.count if method.feed.share == 1 else 1


def _locked(method: Method, K: int) -> list[range]:
    """Runs of neighbours that follow the same objectives without delay; what follows none (frozen) waits for none."""
    facts = method.facts
    reach = [sorted(facts.reach(k, K)) for k in range(K)]
    starts = [0, *(k for k in range(1, K) if reach[k] != reach[k - 1] or not reach[k] or facts.delay(k - 1, K) > 0), K]
    return [range(a, b) for a, b in itertools.pairwise(starts)]


def _own_input(upper: Upper, inputs: tuple[int, ...], dtype: torch.dtype) -> float:
    """Making the block's input from that of the network, where Up comes as an answer."""
    if upper.module is None or upper.awaits != "A":
        return 0.0
    return traced(upper.module, inputs, dtype).forward


def _objective(
    lower: Lower,
    streams: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    positions: tuple[int, ...],
    inputs: tuple[int, ...],
) -> float:
    if not lower.has_objective:
        return 0.0
    y = torch.empty(streams * EXAMPLES, *shape, dtype=dtype).requires_grad_()
    targets = torch.zeros(EXAMPLES, *positions, dtype=torch.int64)
    indices = torch.arange(EXAMPLES, device="cpu")
    data = Data(0, batch=0, inputs=torch.empty(EXAMPLES, *inputs), targets=targets, indices=indices)
    leaves = [] if lower.module is None else [p for p in lower.module.parameters() if p.requires_grad]
    try:
        forward, value = counted(lambda: lower.objective(y, data))
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"the objective on an output of shape {shape} cannot be traced without data ({first_line(error)}); give a "
            "loss made of tensor operations that takes class numbers"
        ) from error
    return forward + (0.0 if value is None else backward(value, [y, *leaves]))


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
