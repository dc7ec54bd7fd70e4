"""Whole graphs on the runtimes: gradients are those of the unrolled computation, in any interleaving."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from decoupled.graph import Asynchrony, GraphTrainer, Instance, NodeGraph, execute
from decoupled.graph.testing import rnn, sapling, sequences, spread, tree, unrolled, unrolled_tree, unrolled_web, web
from decoupled.runtime.simulated import Simulated

Unrolled = Callable[[nn.ModuleDict, Instance], Tensor]
Case = tuple[NodeGraph, list[Instance], Unrolled]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def case(name: str, draw: random.Random) -> Case:
    if name == "rnn":
        return rnn(5, 4, 3), sequences([draw.randint(1, 5) for _ in range(4)], 5, 4, 3), unrolled
    if name == "tree":
        return tree(4, 3), [sapling(_leaves(draw), 3) for _ in range(3)], unrolled_tree
    webs = [_web(draw) for _ in range(3)]
    return spread(3, 2), webs, lambda module, instance: unrolled_web(module, instance, 2)


def _leaves(draw: random.Random) -> list[int]:
    leaves = [1]
    for _ in range(draw.randint(0, 4)):
        split = draw.choice(leaves)
        leaves.remove(split)
        leaves += [2 * split, 2 * split + 1]
    return leaves


def _web(draw: random.Random) -> Instance:
    nodes = draw.randint(1, 4)
    edges = [(draw.randrange(nodes), draw.randrange(nodes)) for _ in range(draw.randint(1, 5))]
    return web(nodes, edges, 3, 2)


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def minibatch_gradients(graph: NodeGraph, instances: list[Instance], loss: Unrolled) -> dict[str, Tensor]:
    graph.module.zero_grad(set_to_none=True)
    sum((loss(graph.module, instance) for instance in instances), torch.zeros(())).backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in graph.module.named_parameters()}
    graph.module.zero_grad(set_to_none=True)
    return found


def sgd(rate: float) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda weights: torch.optim.SGD(weights, rate)


@settings(max_examples=25)
@given(name=st.sampled_from(["rnn", "tree", "web"]), seed=st.integers(0, 10_000), keys=st.integers(1, 4),
       workers=st.integers(1, 4), jitter=st.floats(0, 3), first=st.booleans())  # fmt: skip
def test_a_late_update_has_the_gradient_of_the_minibatch_in_any_interleaving(
    name: str, seed: int, keys: int, workers: int, jitter: float, first: bool
) -> None:
    draw = random.Random(seed)
    graph, instances, loss = case(name, draw)
    expected, before = minibatch_gradients(graph, instances, loss), parameters(graph.module)
    graph.check()
    computing = [n for n, node in graph.nodes.items() if node.kind != "input"]
    places = {n: draw.randrange(workers) for n in computing} | dict(zip(computing, range(workers), strict=False))
    runtime = Simulated(
        cost=lambda actor, operation: draw.random(), latency=lambda edge, m: jitter * draw.random(), fifo=False
    )
    how = Asynchrony(max_active_keys=keys, min_update_frequency=10**6, combine="sum", backward_first=first)
    with GraphTrainer(graph, how, optimizer=sgd(1.0), workers=places, runtime=runtime) as trainer:
        trainer.fit(instances)
        assert {late for node in trainer.nodes() for late in node.staleness} <= {0}
    for n, weight in graph.module.named_parameters():
        torch.testing.assert_close(before[n] - weight.detach(), expected[n], rtol=0, atol=1e-12)
    assert all(not node.open() for node in graph.nodes.values())


@pytest.mark.parametrize("name", ["rnn", "tree", "web"])
def test_finite_differences_through_a_whole_graph(name: str) -> None:
    graph, instances, _ = case(name, random.Random(3))
    execute(graph, instances)
    module, step = graph.module, 1e-6

    def loss() -> float:
        return sum(result.loss for result in execute(graph, instances, training=False).results)

    for weight in module.parameters():
        if weight.grad is None:
            continue
        flat, gradient = weight.detach().view(-1), weight.grad.view(-1)
        for i in range(0, len(flat), 3):
            flat[i] += step
            above = loss()
            flat[i] -= 2 * step
            below = loss()
            flat[i] += step
            assert float(gradient[i]) == pytest.approx((above - below) / (2 * step), abs=1e-7)


@pytest.mark.parametrize("runtime", ["simulated", "threads"])
def test_one_key_and_an_update_per_instance_is_sgd_bit_for_bit(runtime: str) -> None:
    T = 4
    graph = rnn(5, 4, 3)
    instances = sequences([T] * 6, 5, 4, 3, rows=2)
    twin = rnn(5, 4, 3)
    twin.module.load_state_dict(graph.module.state_dict())
    for name in ("embed", "recurrent"):
        graph.nodes[name].own_muf = T  # pyright: ignore[reportAttributeAccessIssue]
    how = Asynchrony(max_active_keys=1, min_update_frequency=1, combine="sum")
    with GraphTrainer(graph, how, optimizer=sgd(0.1), workers=2, runtime=runtime) as trainer:
        trainer.fit(instances, epochs=2)
        assert [node.updates for node in trainer.nodes() if node.parameters] == [12] * 3
    optimizer = torch.optim.SGD(twin.module.parameters(), 0.1)
    for instance in instances * 2:
        optimizer.zero_grad()
        unrolled(twin.module, instance).backward()
        optimizer.step()
    for name, weight in twin.module.named_parameters():
        assert torch.equal(weight, dict(graph.module.named_parameters())[name]), name
