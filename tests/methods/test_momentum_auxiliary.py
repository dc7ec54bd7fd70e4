"""Momentum auxiliary networks: the step by hand, who hears whom, and that nothing but weights comes down."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled import Trainer
from decoupled.errors import UserError
from decoupled.messages import Down
from decoupled.methods.local_parallelism.momentum import flat as weights_of
from decoupled.simulate import simulate
from decoupled.testing import OPTIMIZERS, Case, Tap, compare, flat, train

CASE = Case(widths=(4, 5, 3, 4, 5, 3), cuts=(1, 2, 4), sizes=(6, 6, 6, 5))
K = CASE.K
SPEC = {"name": "momentum_auxiliary", "momentum": 0.75}


def halves(spec=SPEC, **options) -> list[Any]:
    case = Case(CASE.widths, CASE.cuts, CASE.sizes[:1], CASE.seed)
    run = train(case, spec, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), **options)
    return [worker.lower for worker in run.trainer.workers]


def test_the_step_by_hand():
    """The trained copy and the head are the library's at the start; followers, messages and steps are written here."""
    run = train(CASE, SPEC, optimizer=OPTIMIZERS["momentum"], epochs=2)
    blocks, made_by_library = CASE.blocks(), halves()
    biases = [copy.deepcopy(half._bias) for half in made_by_library[: K - 2]]
    followers = [copy.deepcopy(half._follower) for half in fresh_followers()]
    heads = [*(copy.deepcopy(half._head) for half in made_by_library[: K - 2]), made_by_library[K - 2].module]
    groups = [list(block.parameters()) for block in blocks]
    groups += [[*bias.parameters(), *head.parameters()] for bias, head in zip(biases, heads[: K - 2], strict=True)]
    made = [OPTIMIZERS["momentum"](group) for group in [*groups, list(heads[K - 2].parameters())]]
    weights, first = [[flat(block)] for block in blocks], True
    for x, target, _ in CASE.batches() * 2:
        h = x
        for k, block in enumerate(blocks):
            h = block(h.detach())
            out = h
            if k < K - 2:
                out = heads[k](biases[k](h) + followers[k](h))
            elif k == K - 2:
                out = heads[k](h)  # the last block is the output unit alone
            F.cross_entropy(out, target).backward()
        with torch.no_grad():
            for k, follower in enumerate(followers):
                for p, news in zip(follower.parameters(), blocks[k + 1].parameters(), strict=True):
                    p.copy_(news if first else 0.75 * p + 0.25 * news)
                    p.grad = None
        first = False
        for optimizer in made:
            optimizer.step()
            optimizer.zero_grad()
        for versions, block in zip(weights, blocks, strict=True):
            versions.append(flat(block))
    compare(run.weights, weights)


def fresh_followers() -> list[Any]:
    """Halves whose followers have heard nothing: the network is built, and its only batch is not finite."""
    nan = torch.full((6, 4), float("nan"), dtype=torch.float64)
    target = torch.zeros(6, dtype=torch.int64)
    return halves(batches=[(nan, target, torch.arange(6))], on_nonfinite="skip")[: K - 2]


def test_the_first_message_is_taken_whole():
    blocks = CASE.blocks()
    for k, half in enumerate(halves(blocks=blocks)[: K - 2]):
        assert torch.equal(weights_of(half._follower), flat(blocks[k + 1]))
    for half, block in zip(fresh_followers(), CASE.blocks()[1:], strict=False):
        assert not torch.equal(weights_of(half._follower), flat(block))


def test_weights_come_down_and_no_gradient():
    tap, blocks = Tap(), CASE.blocks()
    run = train(CASE, SPEC, blocks=blocks, observers=[tap])
    sent = [[m for edge, m in tap.messages if isinstance(m, Down) and edge.source == f"block{k}"] for k in range(K)]
    assert [len(messages) for messages in sent] == [0, *[len(CASE.sizes)] * (K - 2), 0]
    for k in range(1, K - 1):
        for n, message in enumerate(sent[k]):
            assert torch.equal(message.payload[0], run.weights[k][n])  # as they were before the step on batch n
    inputs = [w.upper.replies and w.upper.differentiates for w in run.trainer.workers]
    assert inputs == [False] * K


def test_the_follower_is_not_trained_and_the_bias_is():
    first, later = halves()[0], train(CASE, {**SPEC, "momentum": 0.0}).trainer.workers[0]
    assert not any(p.requires_grad for p in first._follower.parameters())
    follower, bias = (id(p) for p in (next(first._follower.parameters()), next(first._bias.parameters())))
    assert follower != bias
    assert {id(p) for p in later.steps.lower_parameters}.isdisjoint(
        id(p)
        for p in later.lower._follower.parameters()  # type: ignore[attr-defined]
    )


def test_a_block_without_a_layer_to_follow_has_a_plain_head():
    """Nothing is sent by a block that begins with an activation, nor by a last block that is the output alone."""
    body = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3)]
    model = nn.Sequential(*(unit.double() for unit in body))
    with Trainer(model, SPEC, blocks=[1, 3], loss=F.cross_entropy, optimizer=OPTIMIZERS["sgd"]) as trainer:
        trainer.fit(CASE.batches())
        assert [block.bytes_down for block in trainer.statistics()] == [0, 0, 0]
        assert [block.auxiliary_parameters for block in trainer.statistics()] == [5 * 3 + 3, 5 * 3 + 3, 0]


def test_the_simulator_knows_that_blocks_wait_for_weights():
    """One forward of the block above and its backward lie between two passes; a greedy block never waits."""
    waiting, greedy = (simulate(method, blocks=4, batches=64).utilisation[0] for method in (SPEC, "greedy_local"))
    assert waiting < 0.8 < greedy


def test_wrong_momentum_is_one_line():
    with pytest.raises(UserError, match=r"needs a momentum of at least 0 and below 1, got 1\.0"):
        train(CASE, {"name": "momentum_auxiliary", "momentum": 1.0})
