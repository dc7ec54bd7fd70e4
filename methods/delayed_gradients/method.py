"""Delayed gradients: the gradient of the one loss at the top arrives some updates late. A grid, not a pile:

    name                  order                            retention               corrections
    ddg                   lockstep                         KeepGraph *             -
    pipedream             one_f_one_b, pinned, admitting,  KeepGraph *             -
                          or accumulate(one_f_one_b, M)
    pipedream_2bw         two_buffered(M)                  KeepGraph *             -
    fdg                   tick_backward_first              KeepGraph *             Shrink(beta) per hop
    adl                   accumulate(tick, M)              KeepGraph *             -
    features_replay       lockstep                         KeepInput               -
    dsp                   queues(length)                   KeepInput               -
    pipemare              accumulate(tick, M)              KeepInput               Rescale, Discrepancy
    pipelined_backprop    tick                             KeepInput               LinearPrediction, SpikeCompensation
    spectrain             one_f_one_b                      KeepInput, KeepGraph    FromEntry
    xpipe                 accumulate(one_f_one_b, M)       KeepInput               FromEntry, M micro
    pipeoptim             one_f_one_b                      KeepInput               LinearPrediction
    async_nesterov        one_f_one_b                      KeepGraph, KeepInput    Lookahead(gamma)
    petra                 accumulate(tick, M)              Reconstruct             -

    * or KeepInputAndWeights (recompute=True). KeepGraph: exact gradient, at the weights of the forward; KeepInput,
    Reconstruct: at today's weights. ddg and fdg with mutated=True: KeepLiveGraph, what their published code does.

All: coupling Gradient, activation up, gradient down (petra: ReturnOutput, the activation comes back down as well). With
M the minibatch comes as M micro-batches, one step for all. At block k of K, lockstep and one_f_one_b are K-1-k passes
late, tick 2(K-1-k), queues length(K-1-k). With frozen weights the gradient is exact for those its batch met going up:

    g_k = d loss(f_{K-1}(..f_0(x; w_0[v_0])..; w_{K-1}[v_{K-1}])) / d w_k,   v_j = weight version of block j at F

Sources: Huo et al. 2018 (arXiv 1804.10574; Features Replay), Narayanan et al. 2019 (arXiv 1806.03377) and 2021 (arXiv
2006.09503), Zhuang et al. 2021 (FDG) and 2020 (arXiv 2012.03747), Xu et al. 2020 (arXiv 1909.02625), Yang et al. 2021
(arXiv 1910.05124), Kosson et al. 2021 (arXiv 2003.11666), Chen et al. 2018 (arXiv 1809.02839), Guan et al. 2019 (XPipe)
and 2023 (arXiv 2312.00839), Ajanthan et al. 2025, Rivaud et al. 2025 (arXiv 2406.02052).
"""

from __future__ import annotations

from dataclasses import replace

from decoupled.compensation import Rescale, SpikeCompensation
from decoupled.correction import Correction, Shrink
from decoupled.coupling import Gradient
from decoupled.errors import UserError
from decoupled.method import Facts, Method, late
from decoupled.methods.delayed_gradients.horizon import FromEntry
from decoupled.methods.delayed_gradients.returned import ReturnOutput
from decoupled.order import (
    accumulate,
    admitting,
    lockstep,
    one_f_one_b,
    pinned,
    queues,
    tick,
    tick_backward_first,
    two_buffered,
)
from decoupled.prediction import Discrepancy, LinearPrediction, Lookahead
from decoupled.registry import register
from decoupled.retention import KeepGraph, KeepInput, KeepInputAndWeights, KeepLiveGraph, Retention
from decoupled.reversible import Reconstruct
from decoupled.source import Split


def _at_one_moment(M: int = 1) -> Facts:
    """1F1B whose forwards see, in all blocks, the weights of the moment their batch came in; M passes per update."""
    return replace(late(1), delay=lambda k, K: -((K - 1) // -M), least_delay=None)


def _admitted(n: int) -> Facts:
    """1F1B with n passes in the pipeline (never more than K), at even distances."""
    room = lambda k, K: -(-min(n, K) * (K - k) // K)  # noqa: E731
    return replace(late(1), delay=lambda k, K: room(k, K) - 1, least_delay=None, in_flight=room)


def _graph(recompute: bool, mutated: bool = False) -> type[Retention]:
    if recompute and mutated:
        raise UserError("mutated=True keeps the graph of the forward, recompute=True makes another; choose one of them")
    return KeepLiveGraph if mutated else KeepInputAndWeights if recompute else KeepGraph


@register("ddg")
def ddg(recompute: bool = False, mutated: bool = False) -> Method:
    """Decoupled parallel backpropagation: exact gradients, K-1-k updates late; `mutated`: as its published code."""
    return Method(Gradient(), lockstep, late(1, weights="mixed" if mutated else "forward"), _graph(recompute, mutated))


@register("pipedream")
def pipedream(
    recompute: bool = False, vertical_sync: bool = False, admission: int | None = None, microbatches: int = 1
) -> Method:
    """1F1B with stashed weights; or with those of one moment, with `admission` passes at most, over `microbatches`."""
    if [vertical_sync, admission is not None, microbatches != 1].count(True) > 1:
        raise UserError("take one of vertical_sync, admission and microbatches, and leave out the others")
    if admission is not None and admission < 2:
        raise UserError(f"admission takes 2 or more (1 is backprop), got {admission}")
    if admission is not None:
        order, facts = admitting(admission), _admitted(admission)
    elif vertical_sync:
        order, facts = pinned(one_f_one_b, lambda K: K - 1), _at_one_moment()
    else:
        order, facts = accumulate(one_f_one_b, microbatches), late(1, microbatches)
    return Method(Gradient(), order, facts, _graph(recompute), feed=Split(microbatches))


@register("pipedream_2bw")
def pipedream_2bw(microbatches: int = 4, recompute: bool = False) -> Method:
    """Two weight versions per block and every gradient one update late, given at least K-1 `microbatches`."""
    order, facts = two_buffered(microbatches), _at_one_moment(microbatches)
    return Method(Gradient(), order, facts, _graph(recompute), feed=Split(microbatches))


@register("fdg")
def fdg(beta: float = 0.5, recompute: bool = False, mutated: bool = False) -> Method:
    """Fully decoupled: all blocks on different batches at once; `beta` per hop; `mutated`: as its published code."""
    facts = replace(
        late(2, weights="mixed" if mutated else "forward"),
        delay=lambda k, K: max(0, 2 * (K - 1 - k) - 1),
        least_delay=None,
        in_flight=lambda k, K: max(1, 2 * (K - 1 - k)),
    )
    return Method(Gradient(), tick_backward_first, facts, _graph(recompute, mutated), (Shrink(beta),))


@register("adl")
def adl(microbatches: int = 4, recompute: bool = False) -> Method:
    """Fully decoupled with accumulation: `microbatches` backwards per step make staleness as many times smaller."""
    order = accumulate(tick, microbatches)
    return Method(Gradient(), order, late(2, microbatches), _graph(recompute), feed=Split(microbatches))


@register("features_replay")
def features_replay() -> Method:
    """Keeps only the input; replays it with today's weights when the gradient arrives."""
    return Method(Gradient(), lockstep, late(1, weights="current"), KeepInput)


@register("dsp")
def dsp(queue: int | list = 2) -> Method:
    """Diversely stale: replay with today's weights; a pass spends `queue` ticks in the queues of an edge, or a list."""
    lengths = queue if isinstance(queue, list) else [queue]

    def ticks(k: int, K: int) -> int:
        return sum(lengths[min(edge, len(lengths) - 1)] for edge in range(k, K - 1))

    order, facts = queues(*lengths), late(1, weights="current")
    facts = replace(facts, delay=ticks, least_delay=None, in_flight=lambda k, K: ticks(k, K) + 1)
    return Method(Gradient(), order, facts, KeepInput)


@register("pipemare")
def pipemare(microbatches: int = 4, anneal: int = 1000, decay: float = 0.135) -> Method:
    """One copy of the weights: smaller steps where gradients are late (T1), old weights are estimated (T2)."""
    order, facts = accumulate(tick, microbatches), late(2, microbatches, "current")
    corrections = (Rescale(anneal), Discrepancy(decay))
    return Method(Gradient(), order, facts, KeepInput, corrections, feed=Split(microbatches))


@register("pipelined_backprop")
def pipelined_backprop(prediction: str = "velocity", spike_compensation: bool = True) -> Method:
    """No stashing: forwards with predicted weights ("velocity", "weight", "none"), and compensated momentum."""
    corrections: tuple[Correction, ...] = () if prediction == "none" else (LinearPrediction(prediction),)
    corrections += (SpikeCompensation(),) if spike_compensation else ()
    return Method(Gradient(), tick, late(2, weights="current"), KeepInput, corrections)


@register("spectrain")
def spectrain(stash: bool = False) -> Method:
    """Predicts the weights of one moment for forward and backward; `stash`: the backward reuses the forward's."""
    weights, retention = ("forward", KeepGraph) if stash else ("current", KeepInput)
    return Method(Gradient(), one_f_one_b, late(1, weights=weights), retention, (FromEntry(stash=stash),))


@register("xpipe")
def xpipe(microbatches: int = 4) -> Method:
    """Predicts one moment for forward and backward as `spectrain`, over micro-batches that all look equally far."""
    order, facts = accumulate(one_f_one_b, microbatches), late(1, microbatches, "current")
    return Method(Gradient(), order, facts, KeepInput, (FromEntry(micro=microbatches),), feed=Split(microbatches))


@register("pipeoptim")
def pipeoptim() -> Method:
    """Forwards with the weights that the optimizer is expected to have reached by the backward; nothing is stashed."""
    return Method(Gradient(), one_f_one_b, late(1, weights="current"), KeepInput, (LinearPrediction(),))


@register("async_nesterov")
def async_nesterov(gamma: float = 0.9, stash: bool = True, adaptive: bool = False) -> Method:
    """Asynchronous 1F1B at Nesterov's look-ahead point; `adaptive`: more of it where gradients are later."""
    weights, retention = ("forward", KeepGraph) if stash else ("current", KeepInput)
    return Method(Gradient(), one_f_one_b, late(1, weights=weights), retention, (Lookahead(gamma, adaptive),))


@register("petra")
def petra(microbatches: int = 1) -> Method:
    """Reversible blocks keep nothing: output and gradient come down, the input is made again with today's weights."""
    if microbatches < 1:
        raise UserError(f"microbatches must be at least 1, got {microbatches}")
    order, facts = accumulate(tick, microbatches), late(2, microbatches, "current")
    return Method(ReturnOutput(), order, facts, Reconstruct, feed=Split(microbatches))
