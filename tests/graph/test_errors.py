"""What cannot work is refused with one clear error that names the node, the state and the port."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled.errors import OperationError, ProtocolError, StallError, UserError
from decoupled.graph import (
    NPT,
    PPT,
    Asynchrony,
    Concat,
    Cond,
    Flatmap,
    GraphTrainer,
    Group,
    Instance,
    Isu,
    Loss,
    NodeGraph,
    Phi,
    Pumped,
    Split,
    Ungroup,
    execute,
)
from decoupled.graph.testing import rnn, sequences
from decoupled.runtime.threads import Threads


def one(*messages: tuple[str, tuple, Tensor], losses: int = 1) -> Instance:
    return Instance([Pumped(*message) for message in messages], losses=losses)


def loop(step: Isu, more: Cond) -> NodeGraph:
    graph = NodeGraph("loop")
    x, target = graph.input("x"), graph.input("target")
    h = Phi("h")
    again, last = more(step(PPT(nn.Linear(2, 2), "cell")(h(x))))
    h.join(again)
    Loss(F.mse_loss)(last, target)
    return graph


def trained(graph: NodeGraph, *instances: Instance, **more: object) -> None:
    options: dict = {"optimizer": lambda p: torch.optim.SGD(p, 0.1), "runtime": "simulated", "workers": {}} | more
    with GraphTrainer(graph, options.pop("how", None), **options) as trainer:
        trainer.fit(instances)


def walk(T: int = 3) -> Instance:
    return one(("x", (0,), torch.randn(1, 2)), ("target", (T,), torch.randn(1, 2)))


def step() -> Isu:
    return Isu(lambda i, t: (i, t + 1), lambda i, t: (i, t - 1), "step")


def test_a_dangling_port() -> None:
    graph = NodeGraph("open")
    PPT(nn.Linear(2, 2), "lonely")(graph.input("x"))
    with pytest.raises(UserError, match="graph 'open': output 0 of node 'lonely' leads nowhere"):
        graph.check()
    graph = rnn(5, 4, 3)
    graph.add(NPT(torch.tanh, "extra"))
    with pytest.raises(UserError, match="output 0 of node 'extra' leads nowhere"):
        execute(graph, [])


@pytest.mark.parametrize("whole", [True, False])
def test_weights_of_two_nodes(whole: bool) -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    graph = NodeGraph("tied")
    y = PPT(first if whole else second, "b")(PPT(first, "a")(graph.input("x")))
    Loss(F.mse_loss)(y, graph.input("target"))
    with pytest.raises(UserError, match=r"graph 'tied': nodes 'a' and 'b' share weights.*; give each its own, or join"):
        graph.check()


def test_a_loop_without_an_inverse_or_without_a_change_of_state() -> None:
    with pytest.raises(UserError, match=r"node 'step' changes the state in a loop and has no inverse.*Isu\(f, inv"):
        loop(Isu(lambda i, t: (i, t + 1), name="step"), Cond(lambda i, t: t < 3)).check()
    graph = NodeGraph("still")
    h = Phi("h")
    again, last = Cond(lambda i: False)(h(graph.input("x")))
    h.join(again)
    Loss(F.mse_loss)(last, graph.input("target"))
    with pytest.raises(UserError, match="the loop through node 'h' does not change the state"):
        graph.check()


def test_an_inverse_that_is_none() -> None:
    graph = loop(Isu(lambda i, t: (i, t + 1), lambda i, t: (i, t), "step"), Cond(lambda i, t: t < 3))
    with pytest.raises(OperationError, match=r"node 'step': f takes state \(0, 0\) to \(0, 1\).*correct `inverse`"):
        trained(graph, walk())


def test_two_messages_with_one_key() -> None:
    x, y = torch.randn(1, 2), torch.randn(1, 2)
    graph = loop(step(), Cond(lambda i, t: t < 3))
    with pytest.raises(OperationError, match=r"node 'x', output 0: a second message with state \(0, 0\)"):
        trained(graph, one(("x", (0,), x), ("x", (0,), x), ("target", (3,), y)))
    two = NodeGraph("two")
    Loss(F.mse_loss)(Phi("h")(two.input("a"), two.input("b")), two.input("target"))
    with pytest.raises(OperationError, match=r"node 'h', input 1: a second message with state \(0, 0\)"):
        trained(two, one(("a", (0,), x), ("b", (0,), x), ("target", (1,), y)))


@pytest.mark.parametrize("choice", [2, -1, "left", None])
def test_a_cond_without_a_branch_for_a_state(choice: object) -> None:
    graph = loop(step(), Cond(lambda i, t: choice, name="turn"))
    with pytest.raises(OperationError, match=rf"node 'turn' has no branch {choice!r} for state \(0, 1\)"):
        trained(graph, walk())


@pytest.mark.parametrize("runtime", ["simulated", Threads(patience=0.2)], ids=["simulated", "threads"])
def test_an_instance_that_never_retires(runtime: object) -> None:
    graph = loop(step(), Cond(lambda i, t: t < 2))  # the target waits for a prediction with t = 3
    with pytest.raises(StallError, match=r"never retire: 0; .*node 'loss', input 1: \(0, 3\) waits for the rest"):
        trained(graph, walk(3), runtime=runtime)


@pytest.mark.parametrize("runtime", ["simulated", "threads"])
def test_a_loop_that_never_ends(runtime: str) -> None:
    graph, how = loop(step(), Cond(lambda i, t: True, name="more")), Asynchrony(messages_per_instance=50)
    with pytest.raises(OperationError, match=r"201 messages are unanswered.*a loop does not end"):
        trained(graph, walk(), runtime=runtime, how=how)


@pytest.mark.parametrize("losses", [0, 2])
def test_an_instance_whose_losses_are_counted_wrong(losses: int) -> None:
    messages = [("x", (0,), torch.ones(1, 2)), ("target", (3,), torch.ones(1, 2))]
    with pytest.raises(StallError, match=r"never retire: 0; .*or the instances' `losses`, if that is not how many"):
        trained(loop(step(), Cond(lambda i, t: t < 3)), one(*messages, losses=losses))


@pytest.mark.parametrize("workers", [1, {"cell": 0}])
@pytest.mark.parametrize(
    ("name", "wide", "twice", "error", "text"),
    [
        ("x", 5, False, OperationError, r"operation F cell \(0, 0\).*: RuntimeError: mat1 and mat2"),
        ("x", 2, True, OperationError, r"node 'h', input 0: a second message|node 'x', output 0: a second message"),
        ("y", 2, False, UserError, r"message for 'y', which is no input of the graph"),
    ],
)
def test_the_first_failure_is_the_same_while_costs_are_measured(
    workers: object, name: str, wide: int, twice: bool, error: type[Exception], text: str
) -> None:
    x = (name, (0,), torch.ones(1, wide))
    instance = one(x, *([x] if twice else []), ("target", (3,), torch.ones(1, 2)))
    with pytest.raises(error, match=text):
        trained(loop(step(), Cond(lambda i, t: t < 3)), instance, workers=workers)


@pytest.mark.parametrize("work", [True, False])
def test_a_loop_that_never_ends_ends_while_costs_are_measured(work: bool) -> None:
    """Nodes are placed by what a few instances cost, before anything else runs: it hung there."""
    graph, how = loop(step(), Cond(lambda i, t: True, name="more")), Asynchrony(messages_per_instance=50)
    if not work:
        graph = NodeGraph("spin")
        h = Phi("h")
        again, last = Cond(lambda i, t: True, name="more")(step()(h(graph.input("x"))))
        h.join(again)
        Loss(F.mse_loss)(PPT(nn.Linear(2, 2))(last), graph.input("target"))
    with pytest.raises(StallError, match=r"messages are unanswered.*a loop does not end"):
        trained(graph, walk(), workers=2, how=how)


def test_an_answer_that_nobody_waits_for() -> None:
    graph = rnn(5, 4, 3).check()
    node = graph.nodes["recurrent"]
    node.begin(True)
    with pytest.raises(ProtocolError, match=r"node 'recurrent', output 0: an answer with state \(0, 1, 2\) came back"):
        node.take_backward(0, (0, 1, 2), torch.ones(1, 4))


def test_what_is_built_wrongly() -> None:
    graph, other = NodeGraph("a"), NodeGraph("b")
    x, y = graph.input("x"), other.input("y")
    with pytest.raises(UserError, match="different graphs"):
        Concat()(x, y)
    with pytest.raises(UserError, match="must be called on wires"):
        NPT(torch.tanh)(torch.ones(1))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="has 2 inputs, it was called on 1"):
        Loss(F.mse_loss)(x)
    node = NPT(torch.tanh)
    node(x)
    with pytest.raises(UserError, match="part of a graph already; join several streams into it with Phi"):
        node(x)
    with pytest.raises(UserError, match="no loss"):
        NodeGraph("empty").check()
    with pytest.raises(UserError, match="cannot be named 'a node'"):
        graph.input("a node")
    with pytest.raises(UserError, match="muf is a number of gradients, at least 1"):
        PPT(nn.Linear(1, 1), muf=0)


def test_payloads_that_do_not_fit() -> None:
    graph = NodeGraph("pieces")
    a, b = Split([1, 2], name="cut")(graph.input("x"))
    Loss(F.mse_loss)(a, graph.input("target"))
    Loss(F.mse_loss)(b, graph.input("target2"))
    with pytest.raises(UserError, match=r"node 'cut' splits 3 = 1 \+ 2 .* shape \(1, 4\) with state \(0, 0\)"):
        execute(graph, [one(("x", (0,), torch.ones(1, 4)))])
    graph = NodeGraph("rows")
    Loss(F.mse_loss)(
        Ungroup(lambda i, t: [(i, t, v) for v in range(3)], name="rows")(graph.input("x")), graph.input("y")
    )
    with pytest.raises(UserError, match=r"node 'rows': a payload of shape \(4, 1\) .* into 3 equal pieces"):
        execute(graph, [one(("x", (0,), torch.ones(4, 1)))])
    with pytest.raises(UserError, match=r"message for 'tokn', which is no input.*Did you mean 'token'"):
        trained(rnn(5, 4, 3), one(("tokn", (0, 1), torch.ones(1))))


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"max_active_keys": 0}, "max_active_keys must be an integer of at least 1"),
        ({"min_update_frequency": 0}, "min_update_frequency must be"),
        ({"combine": "max"}, "combine must be 'mean' or 'sum'"),
        ({"backward": "stash"}, "unknown backward mode 'stash'"),
        ({"replicas": {"tanh": 2}}, "unknown node in replicas: 'tanh'"),
        ({"frequencies": {"recurent": 2}}, "Did you mean 'recurrent'"),
        ({"frequencies": {"out": 0}}, "out must be an integer of at least 1"),
        ({"batches": {"recurent": 2}}, "unknown node in batches: 'recurent'. Did you mean 'recurrent'"),
        ({"batches": {"out": 0}}, "out must be an integer of at least 1"),
    ],
)
def test_impossible_options(option: dict, match: str) -> None:
    with pytest.raises(UserError, match=match):
        trained(rnn(5, 4, 3), *sequences([1], 5, 4, 3), how=Asynchrony(**option))


def test_a_module_that_does_not_treat_rows_alone_cannot_handle_messages_together() -> None:
    graph = NodeGraph("mean")
    Loss(F.mse_loss)(PPT(nn.Sequential(nn.Linear(2, 2), Mean()), "mean")(graph.input("x")), graph.input("target"))
    x = torch.ones(3, 2)
    instances = [one(("x", (0,), x), ("target", (0,), x[:1])) for _ in range(4)]
    trained(graph, *instances)
    with pytest.raises(OperationError, match=r"node 'mean': \d messages of \d+ rows were handled together and 1 rows"):
        trained(graph, *instances, how=Asynchrony(batches={"mean": 4}))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(0, keepdim=True)


def test_costs_of_nodes_that_are_not_there_or_only_steer() -> None:
    for name in ("recurent", "more"):
        with pytest.raises(UserError, match=f"unknown node in costs: '{name}'"):
            trained(rnn(5, 4, 3), *sequences([1], 5, 4, 3), costs={name: 1.0})


def test_no_instances() -> None:
    with pytest.raises(UserError, match="epoch 1 has no instances: "):
        trained(rnn(5, 4, 3))


def test_flatmap_without_states_and_group_are_answered() -> None:
    graph = NodeGraph("fan")
    sent = Flatmap(lambda i, n: [(i, n, e) for e in range(n)])(PPT(nn.Linear(2, 2), "w")(graph.input("x")))
    Loss(F.mse_loss)(Group(lambda i, n, e: (i, n), lambda i, n: n)(sent), graph.input("target"))
    x = torch.randn(1, 2)
    execute(graph, [one(("x", (3,), x), ("target", (3,), torch.ones(3, 2)), ("x", (0,), x))])
    layer = graph.module["w"]
    assert isinstance(layer, nn.Linear) and layer.weight.grad is not None
    found, layer.weight.grad = layer.weight.grad, None
    F.mse_loss(layer(x).expand(3, 2), torch.ones(3, 2)).backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(found, layer.weight.grad)
