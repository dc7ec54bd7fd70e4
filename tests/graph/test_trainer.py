"""Asynchrony: staleness and its bounds, priority, modes, replicas, placement, evaluation; and all runtimes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from decoupled.errors import UserError
from decoupled.graph import PPT, Asynchrony, GraphTrainer, NodeGraph
from decoupled.graph.node import Backward, Forward
from decoupled.graph.placement import Measured, balance, measure
from decoupled.graph.replicas import replicate
from decoupled.graph.testing import rnn, sequences


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def sgd(rate: float) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda weights: torch.optim.SGD(weights, rate)


PLACES = {"embed": 1, "out": 1, "loss": 1}


def train(graph: NodeGraph, how: Asynchrony, lengths: list[int], **more: object) -> GraphTrainer:
    options: dict = {"optimizer": sgd(0.01), "workers": PLACES, "runtime": "simulated"} | more
    epochs = options.pop("epochs", 1)
    with GraphTrainer(graph, how, **options) as trainer:
        trainer.fit(sequences(lengths, 5, 4, 3), epochs=epochs)
    return trainer


@pytest.mark.parametrize("keys", [1, 3, 8])
@pytest.mark.parametrize("muf", [1, 4, 20])
def test_staleness_stays_within_its_bound(keys: int, muf: int) -> None:
    T = 5
    trainer = train(rnn(5, 4, 3), Asynchrony(keys, muf), [T] * 40)
    for node in trainer.nodes():
        if node.parameters:
            visits = 1 if node.node == "out" else T
            assert max(node.staleness) <= -(-(keys * visits - 1) // muf)  # all other gradients of the active keys
            assert sum(node.staleness.values()) == 40 * visits
            assert node.updates == -(-40 * visits // muf)
    late = {node.node: max(node.staleness) for node in trainer.nodes() if node.staleness}
    assert keys == 1 or late["recurrent"] > 0


def test_one_key_and_one_update_per_instance_has_no_staleness() -> None:
    trainer = train(rnn(5, 4, 3), Asynchrony(1, 5), [5] * 10)
    assert all(set(node.staleness) <= {0} for node in trainer.nodes() if node.node != "out")


def test_more_keys_use_the_workers_better() -> None:
    times = []
    for keys in (1, 4):
        trainer = train(rnn(5, 4, 3), Asynchrony(keys), [4] * 30, costs={"recurrent": 1.0, "out": 4.0})
        times.append(sum(w.busy_seconds + w.wait_seconds for w in trainer.statistics()))
    assert times[1] < 0.8 * times[0]


def test_backward_first_keeps_less() -> None:
    peaks = []
    for first in (True, False):
        how = Asynchrony(max_active_keys=12, backward_first=first)
        trainer = train(rnn(5, 4, 3), how, [6] * 40, costs={"embed": 0.2, "recurrent": 1.0, "out": 1.0})
        peaks.append(sum(node.peak_kept for node in trainer.nodes()))
    assert peaks[0] < peaks[1]


def test_backward_uses_the_activations_or_the_weights_of_today() -> None:
    """One linear node, updated by one message while another is on its way: the modes differ as they say."""
    x, one, found = torch.ones(1, 2), torch.ones(1, 1), {}
    for mode in ("activation", "recompute"):
        torch.manual_seed(0)
        layer = nn.Linear(2, 1)
        node = PPT(nn.Sequential(layer, nn.Tanh()))
        node.prepare(sgd(1.0), 1, False, mode)
        node.begin(True)
        (sent,) = node.take_forward(0, (0,), x)
        node.take_forward(0, (1,), x)
        node.take_backward(0, (1,), one)
        weight, today = layer.weight.detach().clone(), node.module(x).detach()
        (answer,) = node.take_backward(0, (0,), one)
        assert isinstance(sent, Forward) and isinstance(answer, Backward) and answer.gradient is not None
        slope = 1 - (sent.payload if mode == "activation" else today) ** 2
        torch.testing.assert_close(answer.gradient, slope * weight)
        found[mode] = answer.gradient
    assert not torch.equal(found["activation"], found["recompute"])


def test_mean_divides_by_the_gradients_that_were_added_up() -> None:
    moved = {}
    for combine in ("sum", "mean"):
        torch.manual_seed(0)
        graph = rnn(5, 4, 3)
        weight = dict(graph.module.named_parameters())["out.weight"]
        before = weight.detach().clone()
        train(graph, Asynchrony(1, 1000, combine), [2] * 8)
        moved[combine] = weight.detach() - before
    torch.testing.assert_close(moved["sum"], 8 * moved["mean"])


def test_replicas_share_the_work_and_end_an_epoch_with_equal_weights() -> None:
    graph = rnn(5, 4, 3)
    names = list(graph.module)
    how = Asynchrony(4, replicas={"recurrent": 3}, frequencies={"recurrent": 6})
    trainer = train(graph, how, [3] * 12)
    copies = [node for node in graph.of(PPT) if node.name in graph.replicas["recurrent"]]
    assert [(node.visits, node.updates) for node in copies] == [(24, 2)] * 3
    first, *others = [dict(node.module.named_parameters()) for node in copies]
    assert all(torch.equal(first[n], other[n]) for other in others for n in first)
    assert list(graph.module) == names
    assert {w.worker for w in trainer.statistics()} == {"worker0", "worker1"}


def test_waiting_messages_are_handled_in_one_call() -> None:
    calls: list[int] = []

    class Counted(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            calls.append(len(input))
            return super().forward(input)

    updates = {}
    for batches in ({}, {"out": 8, "recurrent": 8}):
        torch.manual_seed(0)
        graph = rnn(5, 4, 3)
        graph.nodes["out"].module = graph.nodes["out"].function = Counted(4, 3)  # pyright: ignore[reportAttributeAccessIssue]
        calls.clear()
        how = Asynchrony(8, 4, backward_first=False, batches=batches, replicas={"recurrent": 2})
        trainer = train(graph, how, [3] * 24, costs={"recurrent": 0.1, "recurrent_2": 0.1, "out": 1.0})
        assert sum(calls) == 24 * (2 if batches else 1)  # the way back runs it again
        assert max(calls) > 1 if batches else set(calls) == {1}
        out = next(node for node in trainer.nodes() if node.node == "out")
        assert out.visits == 48 and sum(out.staleness.values()) == 24
        updates[bool(batches)] = out.updates
    assert updates[False] == 6 and 2 <= updates[True] <= 6  # after 4 gradients, or as many more as came together
    assert [graph.nodes[name].batch for name in graph.replicas["recurrent"]] == [8, 8]


def test_learning_rates_follow_their_schedule_from_epoch_to_epoch_of_training() -> None:
    torch.manual_seed(0)
    graph, instances = rnn(5, 4, 3), sequences([3, 1, 4], 5, 4, 3)
    weight = dict(graph.module.named_parameters())["out.bias"]
    two = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: float(epoch < 2))  # noqa: E731
    moved = []
    with GraphTrainer(graph, Asynchrony(1, 100), optimizer=sgd(0.1), scheduler=two, runtime="simulated") as trainer:
        for _ in range(3):
            before = weight.detach().clone()
            trainer.fit(instances)
            trainer.evaluate(instances)  # is no epoch
            moved.append(float((weight.detach() - before).abs().sum()))
    assert moved[0] > 0 and moved[1] > 0 and moved[2] == 0


def test_evaluation_changes_nothing_and_needs_no_way_back() -> None:
    graph, instances = rnn(5, 4, 3), sequences([3, 1, 2], 5, 4, 3, rows=2)
    before = {n: p.clone() for n, p in graph.module.named_parameters()}
    with GraphTrainer(graph, optimizer=sgd(0.1), runtime="threads") as trainer:
        found = trainer.evaluate(instances)
        assert found == trainer.evaluate(instances)
        assert all(node.visits == 0 for node in trainer.nodes())
    assert all(torch.equal(before[n], p) for n, p in graph.module.named_parameters())


def test_instances_of_a_generator_are_all_used_and_none_is_an_error() -> None:
    """Costs are measured on the first instances, which are not lost by that."""
    for count in (3, 12):
        given, found = sequences([2] * count, 5, 4, 3), []
        for some in (given, iter(given)):
            torch.manual_seed(0)
            with GraphTrainer(rnn(5, 4, 3), optimizer=sgd(0.1), workers=1, runtime="simulated") as trainer:
                found.append((trainer.evaluate(some), trainer.fit(given)[0]["instances"]))
        assert found[0] == found[1]
        assert found[0][1] == count
    with GraphTrainer(rnn(5, 4, 3), optimizer=sgd(0.1), workers=1, runtime="simulated") as trainer:
        with pytest.raises(UserError, match=r"epoch 2 has no instances: .* used up; pass a list"):
            trainer.fit(iter(sequences([2] * 12, 5, 4, 3)), epochs=2, shuffle=1)
        assert trainer.epoch == 1
        with pytest.raises(UserError, match="evaluate has no instances"):
            trainer.evaluate([])
        with pytest.raises(UserError, match="epochs must be an integer of at least 0, got -1"):
            trainer.fit(sequences([2], 5, 4, 3), epochs=-1)


def test_the_simulator_repeats_itself_and_threads_agree_where_the_order_is_fixed() -> None:
    ends = []
    for runtime in ("simulated", "simulated", "threads"):
        torch.manual_seed(0)
        graph = rnn(5, 4, 3)
        train(graph, Asynchrony(1, 2), [3, 1, 4] * 3, runtime=runtime)
        ends.append(graph.module.state_dict())
    assert all(torch.equal(ends[0][n], other[n]) for other in ends[1:] for n in ends[0])


@pytest.mark.world_size(2)
def test_processes_agree_with_the_simulator_where_the_order_is_fixed() -> None:
    ends, updates = [], []
    for runtime in ("simulated", "processes"):
        torch.manual_seed(0)
        graph = rnn(5, 4, 3)
        how = Asynchrony(1, 2, replicas={"recurrent": 2})
        halving = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)  # noqa: E731
        trainer = train(graph, how, [3, 1, 4] * 3, runtime=runtime, scheduler=halving, epochs=2)
        ends.append(graph.module.state_dict())
        updates.append([(node.node, node.updates, node.visits, node.staleness) for node in trainer.nodes()])
    assert updates[0] == updates[1]
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_placement_is_balanced_by_cost_and_keeps_light_nodes_with_their_neighbours() -> None:
    graph = rnn(5, 4, 3).check()
    costs = {name: 0.0 for name, node in graph.nodes.items() if node.kind != "input"}
    costs |= {"recurrent": 5.0, "out": 3.0, "embed": 2.0}
    places = balance(graph, Measured(costs), 2)
    assert places["recurrent"] != places["out"] == places["embed"]
    assert places["tanh"] == places["step"] == places["state"] == places["recurrent"]
    alone = balance(graph, Measured(costs | {"loss": 1000.0}), 2)  # who has too much already gets nothing more
    assert [name for name, worker in alone.items() if worker == alone["loss"]] == ["loss"]
    found = measure(graph, sequences([3], 5, 4, 3), rounds=1)
    assert set(found.seconds) == set(costs)
    assert found.traffic["recurrent", "tanh"] == 6 and found.traffic["out", "loss"] == 2  # with the answers
    assert not any("token" in pair for pair in found.traffic)
    replicate(graph, {"recurrent": 2})
    shared = measure(
        graph, sequences([3, 1], 5, 4, 3), rounds=1
    ).seconds  # one copy has the long one, the other the short
    assert shared["recurrent"] == shared["recurrent_2"] > 0
    graph = rnn(5, 4, 3).check()
    dear = {("recurrent", "tanh"): 1e6, ("tanh", "step"): 1e6, ("step", "more"): 1e6, ("more", "out"): 1e6}
    assert len({balance(graph, Measured(costs, dear), 2)[n] for n in ("recurrent", "tanh", "step", "more", "out")}) == 1
    assert all(p.grad is None for p in graph.module.parameters())
    with pytest.raises(UserError, match=r"places node 'recurent'.*Did you mean 'recurrent'"):
        GraphTrainer(graph, optimizer=sgd(0.1), workers={"recurent": 0})
    with pytest.raises(UserError, match="without gaps"):
        GraphTrainer(graph, optimizer=sgd(0.1), workers={"recurrent": 2})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"latencies": 3}, "unknown option of runtime 'simulated': 'latencies'"),
        ({"fifo": "maybe"}, "'fifo' must be bool"),
    ],
)
def test_options_of_the_simulated_runtime_are_checked(options: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        GraphTrainer(rnn(5, 4, 3).check(), optimizer=sgd(0.1), runtime={"name": "simulated", **options})
