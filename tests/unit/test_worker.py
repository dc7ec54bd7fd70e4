"""The Worker: what each operation waits for, what it does with messages, and what it says when something fails."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled.block import Block
from decoupled.correction import Correction, Shrink
from decoupled.coupling import Bottom, Coupling, Gradient, LocalHead, Lower, Place, Top, Upper
from decoupled.errors import NonFiniteError, OperationError, UserError
from decoupled.messages import Data, Down, End, Up
from decoupled.order import answered, explicit, free, local, lockstep, rounds, sync, truncated, two_buffered
from decoupled.passes import Pass
from decoupled.retention import KeepGraph, KeepInput, KeepNothing, Retention
from decoupled.steps import Steps
from decoupled.worker import Worker

X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
Y = torch.tensor([0, 1, 1])
ONES = torch.ones(3, 2, dtype=torch.float64)


def worker(
    k, K, order, lower=None, upper=None, *, retention: type[Retention] = KeepGraph, corrections=(), lr=0.5, **options
) -> Any:
    place = Place(k, K, F.cross_entropy, ((2,),) * K, (4,))
    torch.manual_seed(1)
    block = Block(nn.Sequential(nn.Linear(4, 2)).double(), f"block{k}")
    lower = lower or Gradient().lower(place)
    upper = upper or (Gradient().upper(place) if k else Bottom())
    heads, tails = ([] if h.module is None else list(h.module.double().parameters()) for h in (lower, upper))
    steps = Steps((block.parameters, heads, tails), lambda p: torch.optim.SGD(p, lr=lr))
    made = Worker(
        place, block, lower, upper, retention(block, steps_between=True), order, corrections, steps, **options
    )  # fmt: skip
    made.begin(0)
    return made


def data(n, **more):
    return Data(n, **{"batch": n, "inputs": X, "targets": Y, "indices": torch.arange(3), **more})


def up(n, x: Any = X, **more):
    return Up(n, **{"batch": n, "round": 0, "indices": None, "version": 0, "payload": (x,), **more})


def down(n, gradient: Any = ONES, **more):
    payload = () if gradient is None else (gradient,)
    return Down(n, **{"batch": n, "round": 0, "indices": None, "version": 0, "payload": payload, **more})


def do(made, *messages) -> Any:
    """One operation on these messages; they must be what it wants. Returns what it sends."""
    want = made.wants()[0]
    assert len(want.ports) == len(messages), f"{want.tag} wants {want.ports}"
    assert all(want.key in (None, message.key) for message in messages)
    return made.handle(want, messages)


def ports(made):
    return [(str(want.tag), want.ports, want.key) for want in made.wants()]


# --- what it waits for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda: worker(0, 3, sync), [("F0", ("data",)), ("B0", ("down",)), ("S", ())]),
        (lambda: worker(1, 3, sync), [("F0", ("up",)), ("B0", ("down",)), ("S", ())]),
        (lambda: worker(2, 3, sync), [("F0", ("data", "up")), ("B0", ()), ("S", ())]),
        (lambda: worker(0, 1, sync), [("F0", ("data",)), ("B0", ()), ("S", ())]),
    ],
    ids=["bottom", "middle", "top", "alone"],
)
def test_an_operation_waits_for_what_the_halves_declare(made, expected):
    one = made()
    messages = {"data": data(0), "up": up(0), "down": down(0)}
    for op, wanted in expected:
        assert ports(one) == [(op, wanted, None if op == "S" else 0)]
        do(one, *(messages[port] for port in wanted))


def test_data_is_taken_once_by_whichever_operation_comes_first():
    one = worker(1, 3, rounds(), LocalHead(Place(1, 3, F.cross_entropy, ((2,),) * 3), "linear"))
    assert ports(one) == [("E0", ("data",), 0)]
    do(one, data(0))
    assert ports(one) == [("F0", ("up",), 0)]


def test_an_upper_half_that_makes_its_own_input_does_not_wait_for_up():
    class FromData(Upper):
        needs_data, awaits, replies = True, "", False

        def receive(self, payload, data: Any):
            return data.inputs + 1

    one = worker(1, 2, sync, upper=FromData())
    assert ports(one) == [("F0", ("data",), 0)]
    do(one, data(0))
    assert torch.equal(one.retention.open(0).x.detach(), X + 1)


def test_an_upper_half_that_awaits_up_as_an_answer_runs_first_and_learns_from_it_at_once():
    layer = nn.Linear(4, 2)

    class Late(Upper):
        awaits, needs_data, learns_from_answers = "A", True, True

        def __init__(self):
            self.module, self.heard = layer, []

        def receive(self, payload, data: Any):
            assert payload == ()
            return data.inputs + 1

        def answer(self, payload):
            self.heard.append(payload)
            if payload is not None:
                layer(payload[0]).sum().backward()

    upper = Late()
    one = worker(1, 2, answered, upper=upper)
    before = [p.clone() for p in layer.parameters()]
    assert ports(one) == [("F0", ("data",), 0)]
    do(one, data(0))
    do(one)
    do(one)
    assert [torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True)] == [True, True]
    assert ports(one) == [("A0", ("up",), 0)]
    assert do(one, up(0)).sends == []
    assert [torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True)] == [False, False]
    assert all(p.grad is None for p in layer.parameters())
    for _ in range(3):
        do(one, *([data(1)] if ports(one)[0][0] == "F1" else []))
    do(one, replace(up(1), void=True, payload=()))
    assert [None if payload is None else len(payload) for payload in upper.heard] == [1, None]


def test_what_comes_along_with_an_answer_from_below_is_heard(monkeypatch):
    """News of corrections, and of gradients that were not finite, travel with every Up."""

    class Late(Upper):
        awaits, needs_data = "A", True

        def receive(self, payload, data: Any):
            return data.inputs

    one, heard = worker(1, 2, answered, upper=Late()), []
    monkeypatch.setattr(one.corrections, "hear", lambda port, news: heard.append((port, news)))
    monkeypatch.setattr(one.scaling, "hear", lambda news: heard.append(("overflow", news)))
    do(one, data(0))
    do(one)
    do(one)
    do(one, up(0, news=(1.5,), overflow=(3.0,)))
    assert heard == [("up", (1.5,)), ("overflow", (3.0,))]


def test_a_pass_stays_dropped_whatever_comes_next():
    state = Pass(replies=0)
    for void, expected in ((False, False), (True, True), (False, True)):
        state.enter(data(0, void=void))
        assert state.void == expected


def test_a_truncated_order_relays_its_own_gradient_then_those_from_above_and_sums_them_for_the_weights():
    """Block 2 of 4 with reach 3 hears J_2 and J_3 and hands both on, each by itself."""
    half = LocalHead(Place(2, 4, F.cross_entropy, ((2,),) * 4), "linear", replies=1)
    one = worker(2, 4, truncated(3), half, retention=KeepNothing)
    weight = one.block.parameters[0].detach().clone()
    do(one, data(0), up(0))
    assert ports(one) == [("I0", (), 0)]
    ((_, own),) = do(one).sends
    assert ports(one) == [("I0", ("down",), 0)]
    ((port, relayed),) = do(one, down(0)).sends
    assert ports(one) == [("W0", (), 0)]
    assert do(one).sends == []
    y = one.block.module(X).detach().requires_grad_()
    assert half.module is not None
    (gradient,) = torch.autograd.grad(F.cross_entropy(half.module(y), Y), y)
    torch.testing.assert_close(own.payload[0], gradient @ weight)
    torch.testing.assert_close(relayed.payload[0], ONES @ weight)
    torch.testing.assert_close(one.block.parameters[1].grad, (gradient + ONES).sum(0))
    assert (own.hops, relayed.hops) == (1, 2)
    assert port == "down1"  # each answer of a pass has its own channel


def test_a_free_order_prefers_answers_and_names_no_pass():
    one = worker(0, 2, free(2))
    assert ports(one) == [("F*", ("data",), None)]
    do(one, data(7))
    assert ports(one) == [("B*", ("down",), None), ("F*", ("data",), None)]
    do(one, down(7))
    assert ports(one) == [("S", (), None)]


def test_a_free_order_that_waits_for_nobody_closes_the_oldest_pass():
    one = worker(1, 2, free(2))
    do(one, data(5), up(5))
    assert ports(one)[0] == ("B*", (), 5)
    outcome = do(one)
    assert outcome.operation == "B5"


def test_keys_count_on_from_the_start_of_the_run():
    one = worker(0, 2, lockstep)
    one.begin(40)
    assert ports(one) == [("F0", ("data",), 40)]
    assert do(one, data(40)).operation == "F40"


# --- what it computes and sends -----------------------------------------------------------------------------------


def test_forward_sends_the_output_and_the_labels_of_the_message():
    one = worker(1, 3, sync)
    one.block.version = 4
    ((out, message),) = do(one, up(0, batch=9, round=2, indices=torch.arange(3))).sends
    assert out == "up"
    assert isinstance(message, Up)
    assert (message.key, message.batch, message.round, message.version) == (0, 9, 2, 4)
    assert message.indices is not None
    assert message.indices.tolist() == [0, 1, 2]
    assert torch.equal(message.payload[0], one.block.module(X).detach())
    assert one.counters.bytes_up == 3 * 2 * 8


def test_the_top_block_sends_nothing_up():
    one = worker(1, 2, sync)
    assert do(one, data(0), up(0)).sends == []
    assert one.counters.bytes_up == 0


def test_backward_sends_the_gradient_for_the_input_and_steps_on_the_one_for_the_weights():
    one = worker(1, 3, sync, lr=0.5)
    layer = one.block.module[0]
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    do(one, up(0))
    ((out, message),) = do(one, down(0, 2 * ONES, hops=3)).sends
    assert out == "down"
    torch.testing.assert_close(message.payload[0], 2 * ONES @ weight)
    assert message.hops == 4
    assert one.counters.bytes_down == 3 * 4 * 8
    assert torch.equal(layer.weight, weight)
    do(one)
    torch.testing.assert_close(layer.weight, weight - 0.5 * (2 * ONES).T @ X)
    torch.testing.assert_close(layer.bias, bias - 0.5 * (2 * ONES).sum(0))
    assert (one.block.version, one.counters.updates) == (1, 1)
    assert list(one.counters.versions) == [(0, 0, 0)]


def test_a_share_weighs_a_micro_batch():
    found = []
    for share in (1.0, 0.25):
        one = worker(0, 1, sync)
        do(one, data(0, share=share))
        do(one)
        found.append(one.block.parameters[0].grad.clone())
    torch.testing.assert_close(found[1], found[0] / 4)


def test_corrections_apply_to_every_gradient_from_above_in_their_order():
    class Add(Correction):
        def cotangent(self, gradient):
            return gradient + 1

    one = worker(0, 2, sync, corrections=(Shrink(0.5), Add()))
    do(one, data(0))
    do(one, down(0, 4 * ONES))
    torch.testing.assert_close(one.block.parameters[1].grad, (3 * ONES).sum(0))
    with pytest.raises(UserError, match=r"factor in \(0, 1\], got 0"):
        Shrink(0)


def test_an_order_of_older_weights_needs_a_retention_that_has_them():
    with pytest.raises(UserError, match=r"order two_buffered\(2\) runs with older weights, KeepInput with today's"):
        worker(0, 2, two_buffered(2), retention=KeepInput)


def test_gradients_of_several_passes_add_up_until_the_step():
    one = worker(0, 2, explicit(["F0 F1 B0 B1 S", "F0 B0 F1 B1 S"]))
    for message in (data(0), data(1), down(0), down(1)):
        do(one, message)
    torch.testing.assert_close(one.block.parameters[1].grad, (2 * ONES).sum(0))
    do(one)
    assert one.counters.updates == 1


def test_begin_forgets_a_broken_run():
    one = worker(0, 2, lockstep)
    do(one, data(0))
    do(one, data(1))
    do(one, down(0))
    assert one.block.parameters[0].grad is not None
    one.begin(2)
    assert one.block.parameters[0].grad is None
    assert not one.steps.owed
    assert one.retention.held_bytes == 0
    assert ports(one) == [("F0", ("data",), 2)]


# --- the end ------------------------------------------------------------------------------------------------------


def test_the_end_is_handed_on_and_what_is_open_is_finished():
    one = worker(0, 2, lockstep)
    do(one, data(0))
    outcome = do(one, End(1))
    assert (outcome.operation, outcome.sends) == (None, [("up", End(1))])
    do(one, down(0))
    do(one)
    assert one.wants() == []


def test_without_passes_there_is_nothing_to_do():
    one = worker(1, 2, sync)
    do(one, End(0), End(0))
    assert one.wants() == []


# --- passes that are dropped --------------------------------------------------------------------------------------


def test_a_void_pass_keeps_the_order_and_computes_nothing():
    one = worker(1, 3, sync)
    before = one.block.parameters[0].detach().clone()
    ((_, message),) = do(one, up(0, None, void=True, payload=())).sends
    assert message.void
    assert message.payload == ()
    ((_, message),) = do(one, down(0, None, void=True)).sends
    assert message.void
    do(one)
    assert torch.equal(one.block.parameters[0], before)
    assert (one.counters.updates, one.counters.samples) == (0, 0)
    assert (one.counters.bytes_up, one.counters.bytes_down) == (0, 0)


def test_a_void_answer_drops_the_pass_here_and_below():
    one = worker(1, 3, sync)
    do(one, up(0))
    ((_, message),) = do(one, down(0, None, void=True)).sends
    assert message.void
    assert one.block.parameters[0].grad is None
    assert one.retention.held_bytes == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_stops_or_is_skipped(bad):
    def top(**options):
        half = Top(Place(1, 2, lambda output, target: output.sum() * 0 + bad, ((2,),) * 2))
        one = worker(1, 2, sync, half, **options)
        do(one, data(0, batch=3), up(0, batch=3))
        return one

    with pytest.raises(
        OperationError, match=r"block1, operation B0 \(batch 3\).*NonFiniteError: the loss is"
    ) as caught:
        do(top())
    assert isinstance(caught.value.__cause__, NonFiniteError)
    one = top(on_nonfinite="skip")
    ((_, message),) = do(one).sends
    assert message.void
    do(one)
    assert (one.counters.skipped, one.counters.updates) == (1, 0)
    assert one.block.parameters[0].grad is None


# --- failures -----------------------------------------------------------------------------------------------------


def test_a_failure_names_block_operation_batch_and_method_and_keeps_its_cause():
    one = worker(1, 3, sync, method="mine")
    with pytest.raises(OperationError) as caught:
        do(one, up(0, torch.ones(3, 5, dtype=torch.float64), batch=12))
    error = caught.value
    assert (error.actor, error.operation) == ("block1", "F0 (batch 12)")
    assert str(error).startswith("block1, operation F0 (batch 12) (method 'mine'): RuntimeError: ")
    assert isinstance(error.__cause__, RuntimeError)
    assert error.__cause__.__traceback__ is not None


def test_a_payload_with_a_graph_is_refused_at_the_sender():
    class Leaky(Coupling):
        def lower(self, place):
            half = Lower()
            half.emit, half.has_objective = lambda y, data: (y * 2,), True
            return half

        def upper(self, place):
            return Upper()

    one = worker(0, 2, local, Leaky().lower(Place(0, 2, F.cross_entropy, ((2,),) * 2)))
    with pytest.raises(OperationError, match=r"still carries an autograd graph; send tensor\.detach\(\)"):
        do(one, data(0))


def test_interrupts_are_not_wrapped():
    def interrupt(output, target):
        raise KeyboardInterrupt

    one = worker(0, 1, sync, Top(Place(0, 1, interrupt, ((2,),))))
    do(one, data(0))
    with pytest.raises(KeyboardInterrupt):
        do(one)
