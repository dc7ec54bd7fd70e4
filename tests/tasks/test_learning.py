"""Graphs of nodes learn the tasks: asynchronously, on the virtual clock, so with the same result every time."""

from __future__ import annotations

import pytest
import torch

from decoupled import tasks
from decoupled.graph.asynchrony import Asynchrony
from decoupled.graph.trainer import GraphTrainer


@pytest.mark.parametrize("keys", [1, 4])
def test_babi15_is_solved_on_held_out_graphs(keys: int) -> None:
    torch.manual_seed(0)
    task = tasks.make({"name": "babi15", "data": {"test": 100}})
    how = Asynchrony(max_active_keys=keys, min_update_frequency=4)
    with GraphTrainer(
        task.graph(), how, optimizer=lambda p: torch.optim.Adam(p, 0.02), workers=2, runtime="simulated"
    ) as trainer:
        trainer.fit(task.instances("train"), epochs=2, shuffle=0)
        assert trainer.evaluate(task.instances("test"))["score"] == 1.0
        late = [late for node in trainer.nodes() for late in node.staleness]
    assert (max(late) > 0) == (keys > 1)
