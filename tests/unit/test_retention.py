"""Retention: which weights and activations a backward uses, what is held meanwhile, and what is refused."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from decoupled.block import Block
from decoupled.errors import ProtocolError
from decoupled.retention import KeepGraph, KeepInput, KeepInputAndWeights, KeepNothing, Tape

EVERY = [KeepGraph, KeepInput, KeepInputAndWeights, KeepNothing]
LASTING = EVERY[:3]
every = pytest.mark.parametrize("policy", EVERY)
lasting = pytest.mark.parametrize("policy", LASTING)
ROWS, IN, OUT = 5, 6, 4


def make(policy, *more, steps_between=True) -> Any:
    torch.manual_seed(0)
    block = Block(nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), *more).double(), "block0")
    return block, policy(block, steps_between=steps_between)


def batch(seed, rows=ROWS):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, IN, generator=draw, dtype=torch.float64).requires_grad_()


def step(block):
    """What an optimizer does: the live weights move."""
    with torch.no_grad():
        for p in block.parameters:
            p.add_(0.3 * p.sin() + 0.01)
    block.version += 1


def vjp(tape, *, to_input=True, to_weights=True, again=False) -> Any:
    return tape.vjp(torch.ones_like(tape.y), to_input=to_input, to_weights=to_weights, again=again)


def expected(block, x, weights=None):
    """The gradients that the weights given (default: today's) give, by plain autograd."""
    weights = block.weights if weights is None else weights
    x = x.detach().requires_grad_()
    y = torch.func.functional_call(block.module, dict(zip(("0.weight", "0.bias"), weights, strict=True)), (x,))
    to_x, *grads = torch.autograd.grad(y.sum(), [x, *weights])
    return to_x, grads


def same(found, wanted):
    assert torch.equal(found[0], wanted[0])
    assert len(found[1]) == len(wanted[1])
    assert all(torch.equal(a, b) for a, b in zip(found[1], wanted[1], strict=True))


# --- which weights ------------------------------------------------------------------------------------------------


@every
def test_without_a_step_between_every_policy_gives_the_gradient(policy):
    block, kept = make(policy, steps_between=False)
    x = batch(1)
    y = kept.keep(0, x)
    assert torch.equal(y.detach(), block.module(x).detach())
    same(vjp(kept.open(0)), expected(block, x))


@pytest.mark.parametrize("policy", [KeepGraph, KeepInputAndWeights])
def test_the_weights_of_the_forward_are_used_however_late(policy):
    block, kept = make(policy)
    passes = []
    for n in range(4):
        x = batch(n)
        passes.append((x, block.freeze()))
        kept.keep(n, x)
        step(block)
    for n in (2, 0, 3, 1):
        x, weights = passes[n]
        same(vjp(kept.open(n)), expected(block, x, weights))
        kept.close(n)
        step(block)


def test_keep_input_uses_todays_weights_on_the_input_of_then():
    block, kept = make(KeepInput)
    first, second = batch(0), batch(1)
    kept.keep(0, first)
    kept.keep(1, second)
    step(block)
    same(vjp(kept.open(0)), expected(block, first))
    step(block)
    same(vjp(kept.open(1)), expected(block, second))


def test_the_naive_graph_over_live_weights_raises():
    """B5: weights changed under a live graph are an error, never a wrong gradient."""
    torch.manual_seed(0)
    block = Block(nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, OUT)).double(), "block0")
    kept = KeepGraph(block, steps_between=False)
    kept.keep(0, batch(0))
    step(block)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        vjp(kept.open(0))


def test_keep_nothing_refuses_what_it_cannot_do():
    block, kept = make(KeepNothing)
    kept.keep(0, batch(0))
    with pytest.raises(ProtocolError, match=r"block0: KeepNothing holds one pass at a time, \[0\] is open"):
        kept.keep(1, batch(1))
    step(block)
    with pytest.raises(ProtocolError, match=r"block0: the weights moved between F0 and B0"):
        kept.open(0)


@lasting
def test_a_pass_is_kept_once(policy):
    _, kept = make(policy)
    kept.keep(0, batch(0))
    with pytest.raises(ProtocolError, match="block0: pass 0 is kept already"):
        kept.keep(0, batch(0))


# --- the tape -----------------------------------------------------------------------------------------------------


@every
def test_a_pass_can_be_asked_several_times(policy):
    """Truncated orders pull one gradient after another through the same pass."""
    block, kept = make(policy, nn.Dropout(0.5), steps_between=False)
    kept.keep(0, batch(0))
    first = vjp(kept.open(0), to_weights=False, again=True)
    assert first[1] == []
    second = vjp(kept.open(0), again=True)
    third = vjp(kept.open(0), to_input=False)
    assert torch.equal(first[0], second[0])
    assert third[0] is None
    assert all(torch.equal(a, b) for a, b in zip(second[1], third[1], strict=True))
    assert block.version == 0


def test_what_an_output_does_not_depend_on_has_gradient_zero_or_none():
    x, unused = torch.ones(2, 3, requires_grad=True), torch.ones(4, requires_grad=True)
    weights = [torch.ones(3, requires_grad=True), unused]
    tape = Tape(x, (weights[0] * 2).expand(2, 3), weights)
    to_x, grads = vjp(tape)
    assert torch.equal(to_x, torch.zeros(2, 3))
    assert torch.equal(grads[0], torch.full((3,), 4.0))
    assert grads[1] is None


def test_a_block_without_parameters_passes_gradients_on():
    block = Block(nn.Tanh(), "block0")
    for policy in EVERY:
        kept = policy(block, steps_between=False)
        x = batch(0)
        kept.keep(0, x)
        to_x, grads = vjp(kept.open(0))
        torch.testing.assert_close(to_x, 1 - x.detach().tanh() ** 2)
        assert grads == []


# --- randomness and statistics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [KeepInput, KeepInputAndWeights])
def test_a_recompute_repeats_masks_and_leaves_statistics_alone(policy):
    layers = (nn.BatchNorm1d(OUT).double(), nn.Dropout(0.5))
    block, kept = make(policy, *layers)
    graph_block, graph = make(KeepGraph, *(nn.BatchNorm1d(OUT).double(), nn.Dropout(0.5)))
    for n in range(3):
        assert torch.equal(kept.keep(n, batch(n)), graph.keep(n, batch(n)))
    buffers = [b.clone() for b in block.module.buffers()]
    state = block.random_state()
    for n in (1, 0, 2):
        same(vjp(kept.open(n)), vjp(graph.open(n)))
    assert block.module[2].num_batches_tracked == 3
    assert all(torch.equal(a, b) for a, b in zip(buffers, block.module.buffers(), strict=True))
    assert torch.equal(state, block.random_state())
    assert torch.equal(block.run(batch(9)), graph_block.run(batch(9)))  # nobody has lost a random number


# --- what is held -------------------------------------------------------------------------------------------------

INPUT, WEIGHTS = 8 * ROWS * IN, 8 * (IN * OUT + OUT)
GRAPH = INPUT + 8 * ROWS * OUT  # input of the linear layer, output of tanh


@pytest.mark.parametrize(
    ("policy", "per_pass", "per_version"),
    [(KeepGraph, GRAPH, WEIGHTS), (KeepInputAndWeights, INPUT, WEIGHTS), (KeepInput, INPUT, 0)],
)
def test_bytes_held_are_passes_and_one_weight_copy_per_version(policy, per_pass, per_version):
    block, kept = make(policy)
    for n, versions in enumerate([1, 1, 2, 3]):  # two passes share the first version
        if n >= 2:
            step(block)
        kept.keep(n, batch(n))
        assert kept.held_bytes == (n + 1) * per_pass + versions * per_version
    for n, versions in enumerate([3, 2, 1, 0]):  # oldest first: a version goes with its last pass
        kept.close(n)
        assert kept.held_bytes == (3 - n) * per_pass + versions * per_version
    assert kept.peak_held_bytes == 4 * per_pass + 3 * per_version
    assert kept.peak_passes == 4


@every
def test_without_steps_between_no_weights_are_copied(policy):
    _, kept = make(policy, steps_between=False)
    kept.keep(0, batch(0))
    assert kept.held_bytes == (INPUT if policy in (KeepInput, KeepInputAndWeights) else GRAPH)


def test_saved_activations_are_measured_for_every_batch_size():
    _, kept = make(KeepGraph, steps_between=False)
    sizes = []
    for n, rows in enumerate((5, 2, 5)):
        before = kept.held_bytes
        kept.keep(n, batch(n, rows))
        sizes.append(kept.held_bytes - before)
    assert sizes == [GRAPH, GRAPH * 2 // 5, GRAPH]


@every
def test_clear_forgets_everything_but_the_peaks(policy):
    _, kept = make(policy)
    kept.keep(0, batch(0))
    peak = kept.peak_held_bytes
    kept.clear()
    assert kept.held_bytes == 0
    assert kept.peak_held_bytes == peak > 0
    kept.keep(0, batch(0))


@pytest.mark.parametrize("policy", [KeepGraph, KeepInputAndWeights])
def test_closing_the_last_pass_of_a_version_lets_go_of_its_weights(policy):
    block, kept = make(policy)
    for n in range(2):
        kept.keep(n, batch(n))
    gone = [weakref.ref(w) for w in kept.open(0).weights]
    step(block)
    kept.keep(2, batch(2))
    kept.close(0)
    assert all(ref() is not None for ref in gone)  # pass 1 still needs them
    kept.close(1)
    assert all(ref() is None for ref in gone)


@lasting
def test_closing_lets_go_of_the_tensors(policy):
    """Nothing else keeps a closed pass alive: no reference cycle through hooks."""
    _, kept = make(policy)
    gc.disable()
    try:
        x = batch(0)
        gone = weakref.ref(x)
        kept.keep(0, x)
        vjp(kept.open(0))
        kept.close(0)
        del x
        assert gone() is None
    finally:
        gc.enable()


# --- at once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [KeepInput, KeepInputAndWeights])
def test_what_recomputes_keeps_the_graph_of_a_pass_that_comes_back_at_once(policy):
    """The forward runs once and the gradient is the same; a correction that moves the weights asks for the second."""
    for change, runs in ((None, 1), (lambda weights: [w + 1 for w in weights], 2)):
        block, _ = make(policy)
        kept, seen = policy(block, False, at_once=True), []
        kept.backward_weights = kept.forward_weights = change
        block.module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        x = batch(1)
        kept.keep(0, x)
        found = vjp(kept.open(0))
        assert len(seen) == runs
        if change is None:
            assert kept.held_bytes == GRAPH
            same(found, expected(block, x))
