"""The nodes by themselves, run by the simplest executor: gradients are those of the unrolled computation."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from decoupled.graph import NodeGraph, execute
from decoupled.graph.testing import rnn, sequences, unrolled


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def gradients(graph: NodeGraph) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in graph.module.named_parameters() if p.grad is not None}
    graph.module.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_an_rnn_over_variable_lengths_has_the_gradients_of_autograd_in_any_interleaving(seed: int) -> None:
    graph, draw = rnn(5, 4, 3), random.Random(seed)
    instances = sequences([3, 1, 4, 2], 5, 4, 3, rows=2)
    found = execute(graph, instances, choose=draw.randrange)
    ours = gradients(graph)
    losses = [unrolled(graph.module, instance) for instance in instances]
    sum(losses, torch.zeros(())).backward()
    theirs = gradients(graph)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-12)
    by_instance = {int(result.state[0]): result.loss for result in found.results}
    assert by_instance == pytest.approx({i: loss.item() for i, loss in enumerate(losses)})


def test_without_training_nothing_is_remembered_and_nothing_comes_back() -> None:
    graph = rnn(5, 4, 3)
    found = execute(graph, sequences([3, 2], 5, 4, 3), training=False)
    assert len(found.results) == 2
    assert gradients(graph) == {}
    assert all(node.remembered() == [] or not node.remembered() for node in graph.nodes.values())
