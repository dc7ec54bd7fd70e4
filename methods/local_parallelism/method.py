"""Local parallelism: every block follows losses that are near it; no gradient travels further than `reach` blocks.

    name               coupling                   order             objectives J_j on blocks   reach block k
    greedy_local       LocalObjective             local             all                        j = k
    chunked_local      Gradient inside a chunk,   sync              last block of each chunk   j = end of k's chunk
                       LocalObjective at its end
    overlapping_local  Overlap(reach)             truncated(reach)  reach-1 .. K-1             k <= j < k+reach
    interlocking       Interlocked(n)             interlocked(n)    n-1 .. K-1                 j = min(k+n-1, K-1)
    dgl                LocalObjective             local             all                        j = k
    dgl_async          Replayed                   local, intakes    all (see replay.py)        j = k
    auglocal           Augmented                  local             all (see auxiliary.py)     j = k
    momentum_auxiliary Momentum                   answered          all (see momentum.py)      j = k
    predsim            PredSim                    local             all (see objectives.py)    j = k
    infopro            InfoPro                    local             all (see objectives.py)    j = k
    forward_forward    Goodness                   local             all (see goodness.py)      j = k
    sigprop            Signal                     local             all (see signal.py)        j = k
    frozen_below       Frozen(trained)            frozen(trained)   the last block             j = K-1 if k >= K-trained
    last_block_only    Frozen(1)                  frozen(1)         the last block             j = K-1 if k = K-1

    x_k = detach(y_{k-1}),  y_k = f_k(x_k),  J_k = loss(head_k(y_k), target),  g_k = dJ_k/dy_k
    greedy       dw_k = vjp(f_k, g_k)
    overlapping  delta_{j->k} = gradient of J_j at y_k, passed through f_{k+1} .. f_j at their own inputs
                 dw_k = vjp(f_k, g_k + sum of delta_{j->k} for k < j < k+reach);  delta_{j->k-1} is sent on only
                 while k-1 > j-reach, each one by itself, so that none travels further than its reach
    interlocking dw_k = vjp(f_k, delta_{j->k}) for j = min(k+n-1, K-1) alone (delta_{k->k} = g_k); the others are only
                 passed on

Sources: Laskin et al. 2020 (arXiv 2012.03837), figure 2; Gomez et al. 2022 (arXiv 2010.04116) for interlocking;
Belilovsky et al. 2020 for dgl, which is greedy with other heads; the others' files name theirs.
reach = 1 and n = 1 are greedy, reach = K and n = K are backpropagation. The last two are baselines: what the other
methods must beat.
"""

from __future__ import annotations

from decoupled.coupling import LocalObjective
from decoupled.errors import UserError, unknown
from decoupled.method import ALL_LOCKS, Facts, Method, own
from decoupled.methods.local_parallelism.auxiliary import Augmented
from decoupled.methods.local_parallelism.goodness import Goodness
from decoupled.methods.local_parallelism.momentum import Momentum, answered
from decoupled.methods.local_parallelism.objectives import InfoPro, PredSim
from decoupled.methods.local_parallelism.reach import (
    Chunked,
    Frozen,
    Interlocked,
    Overlap,
    chunk_end,
    frozen,
    interlocked,
)
from decoupled.methods.local_parallelism.replay import Replayed
from decoupled.methods.local_parallelism.signal import Signal
from decoupled.order import local, objectives, sync, truncated
from decoupled.registry import register
from decoupled.retention import KeepNothing

GREEDY = Facts(exact=False, reach=own, locks=ALL_LOCKS)


@register("greedy_local")
def greedy_local(head: str = "auto") -> Method:
    """Every block minimises the loss of its own auxiliary head."""
    return Method(LocalObjective(head), local, GREEDY, KeepNothing)


@register("chunked_local")
def chunked_local(chunks: int = 2, head: str = "auto") -> Method:
    """Consecutive blocks form `chunks` chunks; each is trained by backpropagation from a head at its end."""
    if chunks < 1:
        raise UserError(f"chunked_local needs at least 1 chunk, got {chunks}")
    locks = tuple(f"{lock} between chunks" for lock in ALL_LOCKS)
    facts = Facts(exact=False, reach=lambda k, K: (chunk_end(k, K, chunks),), locks=locks)
    return Method(Chunked(chunks, head), sync, facts, KeepNothing)


@register("overlapping_local")
def overlapping_local(reach: int = 2, head: str = "auto") -> Method:
    """Every loss reaches `reach` blocks down; a block adds up the gradients it hears."""
    if reach < 1:
        raise UserError(f"overlapping_local needs a reach of at least 1, got {reach}")
    locks = tuple(f"{lock} beyond the reach" for lock in ALL_LOCKS)
    facts = Facts(exact=False, reach=lambda k, K: objectives(k, K, reach), locks=locks)
    return Method(Overlap(reach, head), truncated(reach), facts, KeepNothing)


@register("interlocking")
def interlocking(n: int = 2, head: str = "auto") -> Method:
    """Every block follows the loss `n`-1 blocks ahead (or the network's) alone; its own loss trains its head."""
    if n < 1:
        raise UserError(f"interlocking needs an n of at least 1, got {n}")
    locks = tuple(f"{lock} beyond n blocks" for lock in ALL_LOCKS)
    facts = Facts(exact=False, reach=lambda k, K: (min(k + n - 1, K - 1),), locks=locks)
    return Method(Interlocked(n, head), interlocked(n), facts, KeepNothing)


@register("dgl")
def dgl(head: str = "mlp_sr") -> Method:
    """Greedy, with the heads of decoupled greedy learning."""
    return Method(LocalObjective(head), local, GREEDY, KeepNothing)


@register("dgl_async")
def dgl_async(slots: int = 4, uses: int = 4, head: str = "mlp_sr") -> Method:
    """`dgl` whose blocks wait for nobody: each draws from the latest `slots` outputs of the block below."""
    return Method(Replayed(head, slots, uses), local, GREEDY, KeepNothing)


@register("auglocal")
def auglocal(depth: int = 2, decline: float = 0.5) -> Method:
    """Greedy, with heads made like the layers to come: `depth` of them at the bottom, fewer towards the top."""
    if depth < 1 or not 0 <= decline <= 1:
        raise UserError(f"auglocal needs a depth of at least 1 and a decline from 0 to 1, got {depth} and {decline}")
    return Method(Augmented(depth, decline), local, GREEDY, KeepNothing)


@register("momentum_auxiliary")
def momentum_auxiliary(momentum: float = 0.995, head: str = "auto") -> Method:
    """Greedy, with a head that begins with a slowly following copy of the next block's first layer."""
    if not 0 <= momentum < 1:
        raise UserError(f"momentum_auxiliary needs a momentum of at least 0 and below 1, got {momentum}")
    facts = Facts(exact=False, reach=own, locks=("backward", "update"))
    return Method(Momentum(momentum, head), answered, facts, KeepNothing)


@register("predsim")
def predsim(mode: str = "both", beta: float = 0.99) -> Method:
    """Every block predicts the class and matches the similarities of classes, with weight `beta` on the latter."""
    betas = {"both": beta, "pred": 0.0, "sim": 1.0}
    if mode not in betas:
        raise unknown("mode", mode, betas)
    if not 0 <= beta <= 1:
        raise UserError(f"predsim needs a beta from 0 to 1, got {beta}")
    return Method(PredSim(betas[mode]), local, GREEDY, KeepNothing)


@register("infopro")
def infopro(lambda1: float = 1.0, lambda2: float = 0.5, contrast: bool = False, head: str = "mlp") -> Method:
    """Every block reconstructs the input, the less the higher it is, and tells classes apart, the more so."""
    if lambda1 < 0 or not 0 <= lambda2 <= 1:
        raise UserError(f"infopro needs lambda1 >= 0 and lambda2 from 0 to 1, got {lambda1} and {lambda2}")
    return Method(InfoPro(lambda1, lambda2, contrast, head), local, GREEDY, KeepNothing)


@register("forward_forward")
def forward_forward(threshold: float = 1.0) -> Method:
    """Every block but the last tells data with the right label from data with a wrong one by its output's length."""
    if threshold <= 0:
        raise UserError(f"forward_forward needs a positive threshold, got {threshold}")
    return Method(Goodness(threshold), local, GREEDY, KeepNothing)


@register("sigprop")
def sigprop() -> Method:
    """The label goes up through the blocks as the input does, and every block but the last brings the two together."""
    return Method(Signal(), local, GREEDY, KeepNothing)


@register("frozen_below")
def frozen_below(trained: int = 2) -> Method:
    """Baseline: the last `trained` blocks learn by backpropagation, all below stay as they were initialised."""
    if trained < 1:
        raise UserError(f"frozen_below trains at least 1 block, got {trained}")
    facts = Facts(exact=False, reach=lambda k, K: (K - 1,) if k >= K - trained else (), locks=_below(trained))
    return Method(Frozen(trained), frozen(trained), facts, KeepNothing)


@register("last_block_only")
def last_block_only() -> Method:
    """Baseline: the last block learns from the loss, all below stay as they were initialised."""
    return frozen_below(1)


def _below(trained: int) -> tuple[str, ...]:
    return tuple(f"{lock} below the last {trained}" for lock in ALL_LOCKS)
