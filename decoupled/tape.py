"""Tape: one recorded pass of a block, and its backward, whole or in two halves that do no work twice.

    whole     y <- ... <- layer 2 <- layer 1 <- x        one walk: gradients for the weights and for x
    I         the same walk, for x only; at every node where weights come in, the gradient that arrives is noted
    W         from each of those nodes straight to its weights: the chain between them is not walked again

          x ---> [addmm] ---> tanh ---> [addmm] ---> y        joins in brackets: the lowest nodes above a weight from
                    ^                      ^                   which x can be reached
                 W1, b1                 W2, b2

A weight with several joins (used in two places), or none, is walked to from y in W. The idea is that of
torch.distributed.pipelining (stage_backward_input, stage_backward_weight) for Qi et al. 2024 (arXiv 2401.10241).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from decoupled.block import Weights

Grads = list[Tensor | None]


@dataclass
class Tape:
    """One recorded pass: `y` with its graph over leaf input `x` and leaf `weights`."""

    x: Tensor
    y: Tensor
    weights: Weights
    half: Half | None = None

    def vjp(self, cotangent: Tensor, *, to_input: bool, to_weights: bool, again: bool) -> tuple[Tensor | None, Grads]:
        """Vector-Jacobian products of the pass.

        Args:
            cotangent: same shape as `y`.
            to_input: return the gradient for `x` (zeros if `y` does not depend on it), else None.
            to_weights: return one gradient per weight (None where unused), else an empty list.
            again: the graph is needed once more.
        """
        if to_input and not self.x.requires_grad:  # integers have no gradient
            _, grads = self.vjp(cotangent, to_input=False, to_weights=to_weights, again=again)
            return torch.zeros_like(self.x), grads
        trained = [w for w in self.weights if w.requires_grad] if to_weights else []
        if not (to_input or trained) or not self.y.requires_grad:
            return (torch.zeros_like(self.x) if to_input else None), []
        if to_weights and not to_input and self.half is not None and self.half.cotangent is cotangent:
            return None, self.half.weights(trained)
        if to_input and not to_weights and again:
            self.half = Half(self.x, self.y, cotangent, [w for w in self.weights if w.requires_grad])
            return self.half.input, []
        sinks = [self.x] * to_input + trained
        grads: Grads = list(torch.autograd.grad(self.y, sinks, cotangent, retain_graph=again, allow_unused=True))
        to_x = grads.pop(0) if to_input else None
        return torch.zeros_like(self.x) if to_input and to_x is None else to_x, grads


class Half:
    """A backward to `x` that has noted at every join what the weights there need; `input` is the gradient for `x`."""

    def __init__(self, x: Tensor, y: Tensor, cotangent: Tensor, weights: Sequence[Tensor]) -> None:
        self.cotangent, self._y = cotangent, y
        self._joins = joins(x, y, weights)
        self._heard: dict[Any, Sequence[Tensor | None]] = {}
        nodes = {join for join in self._joins if join is not None}
        hooks = [node.register_prehook(partial(self._heard.__setitem__, node)) for node in nodes]
        (found,) = torch.autograd.grad(y, [x], cotangent, retain_graph=True, allow_unused=True)
        for hook in hooks:
            hook.remove()
        self.input = torch.zeros_like(x) if found is None else found

    def weights(self, weights: Sequence[Tensor]) -> Grads:
        """The gradient for every weight; None where it is unused."""
        found: dict[int, Tensor | None] = {}
        for join in dict.fromkeys(self._joins):
            mine = [i for i, other in enumerate(self._joins) if other is join]
            heard = self._heard.get(join, ()) if join is not None else (self.cotangent,)
            edges = [GradientEdge(join, i) for i, g in enumerate(heard) if g is not None] if join else [self._y]
            if not edges:  # no gradient has come here
                continue
            grads = torch.autograd.grad(
                edges, [weights[i] for i in mine], [g for g in heard if g is not None], retain_graph=True,
                allow_unused=True,
            )  # fmt: skip
            found.update(zip(mine, grads, strict=True))
        return [found.get(i) for i in range(len(weights))]


def joins(x: Tensor, y: Tensor, weights: Iterable[Tensor]) -> list[Any]:
    """For every weight the one node where it meets the paths from `y` to `x`, or None if there is not exactly one."""
    above: dict[Any, list[Any]] = {y.grad_fn: []}  # node -> those that come before it in a backward
    todo = [y.grad_fn]
    while todo:
        node = todo.pop()
        for below, _ in node.next_functions if node is not None else ():
            if below is not None and below not in above:
                todo.append(below)
            if below is not None:
                above.setdefault(below, []).append(node)
    reaches = _climb([get_gradient_edge(x).node], above)
    found = []
    for weight in weights:
        side = _climb([get_gradient_edge(weight).node], above, stop=reaches)
        met = side & reaches
        found.append(next(iter(met)) if len(met) == 1 else None)
    return found


def _climb(start: list[Any], above: dict[Any, list[Any]], stop: frozenset[Any] | set[Any] = frozenset()) -> set[Any]:
    """`start` and all nodes before it, up to the first ones of `stop`."""
    seen, todo = set(start), [node for node in start if node not in stop]
    while todo:
        for node in above.get(todo.pop(), ()):
            if node not in seen:
                seen.add(node)
                todo += [node] if node not in stop else []
    return seen
