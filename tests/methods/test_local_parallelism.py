"""Local parallelism: the extremes of each variant, an oracle in the naive form, and the number of losses."""

import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F

from decoupled.errors import UserError
from decoupled.messages import Down
from decoupled.methods.local_parallelism.reach import chunk_end
from decoupled.runtime.simulated import Simulated
from decoupled.testing import OPTIMIZERS, Case, cases, compare, flat, train

CASE = Case(widths=(4, 5, 3, 4, 5, 6, 3), cuts=(1, 2, 4, 5), sizes=(6, 6, 6, 6, 5))
K = CASE.K


def overlapping(reach):
    return {"name": "overlapping_local", "reach": reach}


def interlocking(n):
    return {"name": "interlocking", "n": n}


def chunked(chunks):
    return {"name": "chunked_local", "chunks": chunks}


def same(first, second, case, **options):
    one, other = (train(case, spec, optimizer=OPTIMIZERS["momentum"], epochs=2, **options) for spec in (first, second))
    compare(one.weights, other.weights, tolerance=0.0)


@settings(max_examples=10)
@given(case=cases())
def test_overlapping_with_reach_1_is_greedy(case):
    same(overlapping(1), "greedy_local", case)


@settings(max_examples=10)
@given(case=cases())
def test_overlapping_with_the_reach_of_the_network_is_backpropagation(case):
    """A6: one loss, at the top, that reaches everybody; more reach than blocks changes nothing."""
    same(overlapping(case.K), "backprop", case)
    same(overlapping(case.K + 3), "backprop", case)


@settings(max_examples=10)
@given(case=cases())
def test_one_chunk_is_backpropagation_and_a_chunk_per_block_is_greedy(case):
    same(chunked(1), "backprop", case)
    same(chunked(case.K), "greedy_local", case)
    same(chunked(case.K + 2), "greedy_local", case)


def test_overlapping_two_blocks_is_backpropagation():
    case = Case(widths=(4, 5, 6, 3), cuts=(2,), sizes=(6, 6, 4))
    same("overlapping_local", "backprop", case)


@pytest.mark.parametrize("reach", [2, 3, 4])
def test_overlapping_equals_the_naive_form_with_one_graph_per_loss(reach):
    """For every loss: cut the input of its lowest block, run `reach` blocks and a head, and sum all losses (oracle).

    Inner blocks run once per loss that hears them, which costs more but cannot be wrong.
    """
    run = train(CASE, overlapping(reach), epochs=2)
    blocks, heads = CASE.blocks(), fresh_heads(overlapping(reach))
    parameters = [list(m.parameters()) for m in [*blocks, *(head for head in heads if head is not None)]]
    optimizers = [OPTIMIZERS["sgd"](group) for group in parameters]
    weights = [[flat(block)] for block in blocks]
    for x, y, _ in CASE.batches() * 2:
        total = torch.zeros((), dtype=torch.float64)
        for lowest in range(K - reach + 1):
            h = x
            for k in range(lowest + reach):
                h = blocks[k](h.detach() if k == lowest else h)
            head = heads[lowest + reach - 1]
            total = total + F.cross_entropy(h if head is None else head(h), y)
        total.backward()
        for made in optimizers:
            made.step()
            made.zero_grad()
        for versions, block in zip(weights, blocks, strict=True):
            versions.append(flat(block))
    compare(run.weights, weights)


@settings(max_examples=10)
@given(case=cases())
def test_interlocking_with_n_1_is_greedy_and_with_all_blocks_backpropagation(case):
    same(interlocking(1), "greedy_local", case)
    same(interlocking(case.K), "backprop", case)
    same(interlocking(case.K + 2), "backprop", case)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_interlocking_follows_the_loss_ahead_and_no_other(n):
    """Oracle: one gradient by autograd for every block, of the one loss it follows; heads follow their own losses."""
    run = train(CASE, interlocking(n), epochs=2)
    blocks, heads = CASE.blocks(), fresh_heads(interlocking(n))
    parameters = [list(m.parameters()) for m in [*blocks, *(head for head in heads if head is not None)]]
    optimizers = [OPTIMIZERS["sgd"](group) for group in parameters]
    weights = [[flat(block)] for block in blocks]
    for x, y, _ in CASE.batches() * 2:
        outputs = [x]
        for block in blocks:
            outputs.append(block(outputs[-1].detach()))
        for k, block in enumerate(blocks):
            j = min(k + n - 1, K - 1)
            h = outputs[k].detach()
            for i in range(k, j + 1):
                h = blocks[i](h)
            head = heads[j]
            own = list(block.parameters())
            loss = F.cross_entropy(h if head is None else head(h), y)
            for p, gradient in zip(own, torch.autograd.grad(loss, own), strict=True):
                p.grad = gradient
        for j, head in enumerate(heads):
            if head is not None:
                F.cross_entropy(head(outputs[j + 1].detach()), y).backward()
        for made in optimizers:
            made.step()
            made.zero_grad()
        for versions, block in zip(weights, blocks, strict=True):
            versions.append(flat(block))
    compare(run.weights, weights)


@pytest.mark.parametrize(("spec", "ends"), [("greedy_local", [0, 1, 2, 3, 4]), (chunked(2), [1, 1, 4, 4, 4])], ids=str)
def test_chunks_by_hand(spec, ends):
    """Plain torch: detach at the entrance of a chunk, a head at its end, one backward per chunk."""
    run, blocks, heads = train(CASE, spec, optimizer=OPTIMIZERS["momentum"], epochs=2), CASE.blocks(), fresh_heads(spec)
    made = [OPTIMIZERS["momentum"](list(m.parameters())) for m in [*blocks, *(h for h in heads if h is not None)]]
    weights = [[flat(block)] for block in blocks]
    for x, y, _ in CASE.batches() * 2:
        h = x
        for k, block in enumerate(blocks):
            h = block(h)
            if ends[k] == k:
                head = heads[k]
                F.cross_entropy(h if head is None else head(h), y).backward()
                h = h.detach()
        for optimizer in made:
            optimizer.step()
            optimizer.zero_grad()
        for versions, block in zip(weights, blocks, strict=True):
            versions.append(flat(block))
    compare(run.weights, weights)


def test_interlocking_is_not_overlapping():
    """Both send the same messages; the inner blocks follow different sums of them."""
    mine, theirs = (train(CASE, spec) for spec in (interlocking(2), overlapping(2)))
    assert [s.bytes_down for s in mine.trainer.statistics()] == [s.bytes_down for s in theirs.trainer.statistics()]
    differ = [not torch.equal(a[1], b[1]) for a, b in zip(mine.weights, theirs.weights, strict=True)]
    assert differ == [False, True, True, True, False]


@settings(max_examples=10)
@given(case=cases())
def test_frozen_below_with_all_blocks_trained_is_backpropagation(case):
    same({"name": "frozen_below", "trained": case.K}, "backprop", case)
    same({"name": "frozen_below", "trained": case.K + 2}, "backprop", case)
    same({"name": "frozen_below", "trained": 1}, "last_block_only", case)


def test_the_last_block_learns_as_if_there_were_nothing_below():
    """By hand: plain training of the last block on what the others, as initialised, make of the data."""
    run, blocks = train(CASE, "last_block_only", optimizer=OPTIMIZERS["momentum"], epochs=2), CASE.blocks()
    made = OPTIMIZERS["momentum"](list(blocks[-1].parameters()))
    weights = [[flat(block)] for block in blocks]
    for x, y, _ in CASE.batches() * 2:
        with torch.no_grad():
            for block in blocks[:-1]:
                x = block(x)
        made.zero_grad()
        F.cross_entropy(blocks[-1](x), y).backward()
        made.step()
        weights[-1].append(flat(blocks[-1]))
    compare(run.weights, weights, tolerance=0.0)


def test_blocks_that_are_not_trained_keep_no_graph():
    held = [block.peak_held_bytes for block in train(CASE, {"name": "frozen_below", "trained": 2}).trainer.statistics()]
    inputs = [8 * max(CASE.sizes) * CASE.widths[first] for first in (0, *CASE.cuts)]
    outputs = [8 * max(CASE.sizes) * CASE.widths[last] for last in (*CASE.cuts, len(CASE.widths) - 1)]
    assert held[:-2] == [a + b for a, b in zip(inputs, outputs, strict=True)][:-2]


@pytest.mark.parametrize("spec", [overlapping(2), overlapping(4), interlocking(3), chunked(2)], ids=str)
def test_no_block_runs_twice(spec):
    """However many losses reach a block, it has one forward per batch, and BatchNorm sees every batch once."""
    blocks, calls = CASE.blocks(), [0] * K

    def hook(k):
        def count(module, *_):
            calls[k] += module.training  # the shapes are found out in evaluation mode

        return count

    for k, block in enumerate(blocks):
        block.register_forward_hook(hook(k))
    train(CASE, spec, blocks=blocks, epochs=2)
    assert calls == [2 * len(CASE.sizes)] * K


def fresh_heads(spec):
    one = Case(CASE.widths, CASE.cuts, CASE.sizes[:1], CASE.seed)
    run = train(one, spec, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    return [worker.lower.module for worker in run.trainer.workers]


@pytest.mark.parametrize(
    ("spec", "where"),
    [
        ("greedy_local", [0, 1, 2, 3, 4]),
        (overlapping(1), [0, 1, 2, 3, 4]),
        (overlapping(2), [1, 2, 3, 4]),
        (overlapping(4), [3, 4]),
        (overlapping(9), [4]),
        (interlocking(2), [1, 2, 3, 4]),
        (interlocking(9), [4]),
        (chunked(1), [4]),
        (chunked(2), [1, 4]),
        (chunked(3), [0, 2, 4]),
        (chunked(5), [0, 1, 2, 3, 4]),
    ],
    ids=str,
)
def test_where_the_losses_are(spec, where):
    """Greedy L losses, overlapping L - reach + 1, chunked one per chunk; below the top each has a head."""
    run = train(CASE, spec)
    assert [w.k for w in run.trainer.workers if w.lower.has_objective] == where
    assert [w.k for w in run.trainer.workers if w.lower.module is not None] == [k for k in where if k < K - 1]
    heads = [s.auxiliary_parameters for s in run.trainer.statistics()]
    widths = [CASE.widths[cut] for cut in (*CASE.cuts, len(CASE.widths) - 1)]
    assert heads == [widths[k] * 3 + 3 if k in where and k < K - 1 else 0 for k in range(K)]


@pytest.mark.parametrize("blocks", range(1, 9))
@pytest.mark.parametrize("chunks", range(1, 10))
def test_chunks_are_runs_of_nearly_equal_length(blocks, chunks):
    ends = [chunk_end(k, blocks, chunks) for k in range(blocks)]
    assert all(k <= end for k, end in enumerate(ends))
    assert ends == sorted(ends)
    assert ends[-1] == blocks - 1
    lengths = [ends.count(end) for end in sorted(set(ends))]
    assert len(lengths) == min(chunks, blocks)
    assert max(lengths) - min(lengths) <= 1
    assert all(ends[k] == end for end in set(ends) for k in [end])


@pytest.mark.parametrize("spec", ["greedy_local", overlapping(2), overlapping(3), chunked(2)], ids=str)
def test_the_last_block_gets_the_gradient_of_backpropagation(spec):
    """In all variants (for the same input, hence the first update)."""
    mine, theirs = (train(CASE, name).weights[K - 1][1] for name in (spec, "backprop"))
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("late", ["block1", "block2"])
def test_gradients_that_overtake_each_other_are_told_apart(late):
    """Which gradient travels on is decided by where it comes from, never by which one came first."""

    def latency(edge, message):
        return 100.0 if isinstance(message, Down) and message.hops == 1 and edge.target == late else 0.1

    shuffled = train(CASE, overlapping(3), runtime=Simulated(latency=latency, fifo=False))
    compare(shuffled.weights, train(CASE, overlapping(3)).weights)


def test_heads_are_chosen_by_name():
    small, large = (train(CASE, {"name": "greedy_local", "head": head}) for head in ("linear", "mlp"))
    counts = [[s.auxiliary_parameters for s in run.trainer.statistics()] for run in (small, large)]
    assert all(a < b for a, b in zip(*(row[:-1] for row in counts), strict=True))
    with pytest.raises(UserError, match=r"unknown head 'linaer'\. Did you mean 'linear'\?"):
        train(CASE, {"name": "greedy_local", "head": "linaer"})


def test_heads_are_drawn_from_the_seed_of_the_trainer():
    first, again, other = (fresh(seed, noise) for seed, noise in ((0, 5), (0, 6), (1, 5)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def fresh(seed, noise):
    torch.manual_seed(noise)  # the user's own generator plays no part
    run = train(CASE, "greedy_local", seed=seed, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    heads = [worker.lower.module for worker in run.trainer.workers]
    return [flat(head) for head in heads if head is not None]
