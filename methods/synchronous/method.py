"""Synchronous controls: exact gradients, every lock kept; what every other method is measured against.

    name          coupling   order                  feed        retention
    backprop      Gradient   sync                   Whole       KeepGraph
    gpipe         Gradient   gpipe(M)               Split(M)    KeepGraph, or KeepInput with recompute
    one_f_one_b   Gradient   one_f_one_b_flush(M)   Split(M)    KeepGraph, or KeepInput with recompute
    zero_bubble   Gradient   zero_bubble(M)         Split(M)    KeepGraph, or KeepInput with recompute

Sources: Rumelhart et al. 1986; GPipe, Huang et al. 2019 (arXiv 1811.06965); 1F1B with flush, Narayanan et al. 2021
(arXiv 2006.09503); Zero Bubble, Qi et al. 2024 (arXiv 2401.10241).
"""

from __future__ import annotations

from collections.abc import Callable

from decoupled.coupling import Gradient
from decoupled.method import Facts, Method, top
from decoupled.order import gpipe as gpipe_order
from decoupled.order import one_f_one_b_flush, sync
from decoupled.order import zero_bubble as zero_bubble_order
from decoupled.registry import register
from decoupled.retention import KeepGraph, KeepInput
from decoupled.source import Split


@register("backprop")
def backprop() -> Method:
    """One batch at a time through all blocks and back."""
    return Method(Gradient(), sync, Facts(exact=True, reach=top, bubble=lambda K, f, b: (K - 1) / K))


@register("gpipe")
def gpipe(microbatches: int = 4, recompute: bool = False) -> Method:
    """All forwards of a minibatch's micro-batches, then all backwards, then one step."""
    facts = Facts(exact=True, reach=top, in_flight=lambda k, K: microbatches, bubble=_flush(microbatches))
    retention = KeepInput if recompute else KeepGraph
    return Method(Gradient(), gpipe_order(microbatches), facts, retention, feed=Split(microbatches))


@register("one_f_one_b")
def one_f_one_b(microbatches: int = 4, recompute: bool = False) -> Method:
    """One forward, one backward in turn within a minibatch, then one step."""
    facts = Facts(exact=True, reach=top, in_flight=lambda k, K: min(microbatches, K - k), bubble=_flush(microbatches))
    retention = KeepInput if recompute else KeepGraph
    return Method(Gradient(), one_f_one_b_flush(microbatches), facts, retention, feed=Split(microbatches))


@register("zero_bubble")
def zero_bubble(microbatches: int = 4, recompute: bool = False) -> Method:
    """1F1B whose backward is split: input gradients travel first, weight gradients fill the gaps before the step."""

    def bubble(K: int, f: float, b: float) -> float:
        """(K-1)(f + i - w) beside M (f + i + w), with i = w = b / 2 <= f; claimed for M >= K."""
        idle = (K - 1) * f
        return idle / (microbatches * (f + b) + idle) if microbatches >= K and b <= 2 * f else float("nan")

    facts = Facts(exact=True, reach=top, in_flight=lambda k, K: min(microbatches, K), bubble=bubble)
    retention = KeepInput if recompute else KeepGraph
    return Method(Gradient(), zero_bubble_order(microbatches), facts, retention, feed=Split(microbatches))


def _flush(M: int) -> Callable[[int, float, float], float]:
    """(K-1) / (M+K-1), whatever forward and backward take."""
    return lambda K, f, b: (K - 1) / (M + K - 1)
