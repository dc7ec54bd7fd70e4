"""Every task: its graph has the gradients of its synchronous model, and that one those of plain autograd."""

from __future__ import annotations

import random
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decoupled import tasks
from decoupled.data.structured import Graph, Structured, Tree
from decoupled.errors import UserError
from decoupled.graph import execute
from decoupled.tasks.base import Grouped
from decoupled.tasks.gated_graph import Babi15, GatedPart, Graphs
from decoupled.tasks.perceptron import Digits
from decoupled.tasks.recurrent import ListReduction
from decoupled.tasks.tree import ListOps, Treebank, TreeLSTM, heap_numbers

SMALL = {"train": 7, "validation": 3, "test": 3}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def molecules() -> Graphs:
    """A task of values on three small graphs, one without edges."""
    water = Graph((1, 0, 0), ((0, 2, 1), (1, 2, 0), (0, 2, 2), (2, 2, 0)), 0.5)
    oxygen = Graph((1, 1), ((0, 1, 1), (1, 1, 0)), -1.0)
    data = Structured(
        "values", [water, oxygen, Graph((0,), (), 2.0)], [water], [oxygen], 0, ("H", "O"), ("a", "b", "c")
    )
    return Graphs(data, hidden=3, steps=3, chooses=False)


def sentences(tmp_path: Path) -> Grouped[Tree]:
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.txt").write_text("(3 (2 It) (4 (2 's) (4 good)))\n(1 (2 It) (0 fails))\n(4 Great)\n")
    return Treebank(hidden=3, data={"path": tmp_path})


@pytest.fixture(params=["list_reduction", "listops", "treebank", "babi15", "values", "digits"])
def task(request: pytest.FixtureRequest, tmp_path: Path) -> Grouped[Any]:
    match request.param:
        case "treebank":
            return sentences(tmp_path)
        case "values":
            return molecules()
        case "digits":
            return Digits(width=5, depth=3, rows=400)
        case "list_reduction":
            return ListReduction(hidden=5, rows=2, data={"train": 20, "validation": 3, "test": 3})
        case name:
            made = tasks.make({"name": name, "hidden": 4, "data": SMALL})
            assert isinstance(made, Grouped)
            return made


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


def test_the_graph_has_losses_scores_and_gradients_of_the_synchronous_model(task: Grouped[Any]) -> None:
    graph, model = task.graph(), task.synchronous()
    model.load_state_dict(graph.module.state_dict())
    instances = task.instances("train")
    results = execute(graph, instances).results
    rows = [sum(result.samples for result in results if int(result.state[0]) == i) for i in range(len(instances))]
    totals = {"loss": 0.0, "score": 0.0, "samples": 0}
    for batch, samples in zip(task.batches("train", 1), rows, strict=True):
        loss, score, count = model(batch)
        assert count == samples
        (loss * count).backward() if task.name == "treebank" else loss.backward()  # there every node has a loss
        totals = {"loss": totals["loss"] + loss.item() * count, "score": totals["score"] + score}
    same(gradients(graph.module), gradients(model))
    assert sum(result.loss * result.samples for result in results) == pytest.approx(totals["loss"])
    assert sum(result.score for result in results) == pytest.approx(totals["score"])
    assert [instance.losses for instance in instances] == [
        sum(int(result.state[0]) == i for result in results) for i in range(len(instances))
    ]
    assert sum(instance.size for instance in instances) == sum(map(len, task.batches("train", 1)))


def test_finite_differences_through_the_whole_graph(task: Grouped[Any]) -> None:
    """RNN, Tree-LSTM and gated graph network: what comes back along the messages is the slope of the loss."""
    graph, instances, draw = task.graph(), task.instances("train")[:3], random.Random(0)
    execute(graph, instances)
    found = gradients(graph.module)

    def loss() -> float:
        return sum(result.loss for result in execute(graph, instances, training=False).results)

    for name, weight in graph.module.named_parameters():
        flat, step = weight.detach().view(-1), 1e-6
        gradient = found.get(name, torch.zeros_like(weight)).reshape(-1)
        for i in draw.sample(range(len(flat)), min(4, len(flat))):
            flat[i] += step
            above = loss()
            flat[i] -= 2 * step
            below = loss()
            flat[i] += step
            assert float(gradient[i]) == pytest.approx((above - below) / (2 * step), abs=1e-7), f"{name}[{i}]"


def test_a_batch_of_the_synchronous_model_is_the_mean_over_its_groups(task: Grouped[Any]) -> None:
    """Padding, masks, heights and offsets mix nothing up: all groups at once give the weighted mean of each alone."""
    model = task.synchronous()
    alone = [model(batch) for batch in task.batches("train", 1)]
    (batch,) = task.batches("train", 1000)
    loss, score, samples = model(batch)
    assert samples == sum(count for _, _, count in alone)
    assert score == pytest.approx(sum(score for _, score, _ in alone))
    assert loss.item() == pytest.approx(sum(loss.item() * count for loss, _, count in alone) / samples)


def test_batches_follow_the_order(task: Grouped[Any]) -> None:
    groups = [list(batch) for batch in task.batches("train", 1)]
    order = list(reversed(range(len(groups))))
    batches = list(task.batches("train", 2, order))
    assert len(batches) == -(-len(groups) // 2)
    got = [example for batch in batches for example in batch]
    expected = [example for group in reversed(groups) for example in group]
    assert all(a is b for a, b in zip(got, expected, strict=True))
    assert task.instances("train") is task.instances("train")


def test_another_split_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown split 'training'. Did you mean 'train'\?"):
        tasks.make({"name": "babi15", "data": SMALL}).instances("training")


def test_sequences_of_an_instance_have_one_length_and_none_is_lost() -> None:
    task = ListReduction(rows=4, data={"train": 100, "validation": 3, "test": 3})
    groups = task.groups("train")
    sizes = [({len(s.tokens) for s in group}, len(group)) for group in groups]
    assert all(len(lengths) == 1 and 1 <= count <= 4 for lengths, count in sizes)
    assert sum(count for _, count in sizes) == 100


def test_one_node_after_the_other_is_the_same_tree_lstm(tmp_path: Path) -> None:
    for task in (sentences(tmp_path), ListOps(hidden=3, data=SMALL)):
        model = task.network()
        assert isinstance(model, TreeLSTM)
        for (tree,) in task.batches("train", 1):
            together, labels = model([tree])
            torch.testing.assert_close(model.one_by_one(tree)[0], together, rtol=0, atol=1e-12)
            assert torch.equal(model.one_by_one(tree)[1], labels)


def test_heap_numbers() -> None:
    tree = Tree((5, 6, -1, 7, -1), ((-1, -1), (-1, -1), (0, 1), (-1, -1), (2, 3)), (0,) * 5)
    assert heap_numbers(tree) == [4, 5, 2, 3, 1]


def test_a_gated_graph_against_the_equations() -> None:
    """Node by node and edge by edge, as written in the module's docstring."""
    task = molecules()
    model, (graph, *_) = task.network(), task.data.train
    h = [torch.eye(3)[kind] for kind in graph.kinds]
    first = list(h)
    for _ in range(3):
        m = [torch.zeros(3) for _ in h]
        for u, kind, v in graph.edges:
            linear = model.relations[kind].linear
            m[v] = m[v] + linear.weight @ h[u] + linear.bias
        h = [model.gru.gru(m_v[None], h_v[None])[0] for m_v, h_v in zip(m, h, strict=True)]
    value, out = torch.zeros(()), model.out
    assert isinstance(out, GatedPart)
    for h_v, h_0 in zip(h, first, strict=True):
        gate = torch.sigmoid(out.gate(torch.cat([h_v, h_0])))
        value = value + (gate * out.part(h_v))[0]
    outputs, targets = model([graph])
    torch.testing.assert_close(outputs, value[None])
    assert targets.tolist() == [graph.target]


def test_the_synchronous_model_solves_babi15_on_held_out_graphs() -> None:
    task = Babi15()
    model = task.synchronous()
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for epoch in range(8):
        order = torch.randperm(100, generator=torch.Generator().manual_seed(epoch)).tolist()
        for batch in task.batches("train", 5, order):
            optimizer.zero_grad()
            model(batch)[0].backward()
            optimizer.step()
    (held_out,) = task.batches("test", 1000)
    assert model(held_out)[1] == len(held_out) == 500


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("list_reductions", r"unknown task 'list_reductions'. Did you mean 'list_reduction'\?"),
        ({"name": "listops", "hiden": 3}, r"Did you mean 'hidden'\?"),
        ({"name": "listops", "hidden": 0}, "hidden must be an integer of at least 1, got 0"),
        ({"name": "list_reduction", "data": {"trian": 3}}, r"Did you mean 'train'\?"),
        ({"name": "babi15", "hidden": 1, "data": SMALL}, "hidden must be at least 2, got 1; make it larger"),
        ({"name": "babi15", "steps": 0, "data": SMALL}, "steps must be an integer of at least 1, got 0"),
        ({"name": "digits", "rows": 0}, "rows must be an integer of at least 1, got 0"),
        ("treebank", "dataset 'treebank' needs its folder"),
        ("qm9", "dataset 'qm9' needs its folder"),
    ],
)
def test_wrong_names_and_options_are_refused(spec: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tasks.make(spec)


def test_all_tasks_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ase", types.ModuleType("ase"))
    assert {"list_reduction", "listops", "babi15", "digits"} < set(tasks.tasks())
    with pytest.raises(UserError, match="comes with ase"):
        tasks.make("g2")
