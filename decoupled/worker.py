"""The Worker: one block, its two coupling halves, its retention and its order. It moves the data of every chain method.

        Up from below ----> F: upper.receive -> retention.keep -> lower.emit ----> Up to above
        Down to below <---- B: retention.open <- lower.objective / lower.pull <--- Down from above
                            S: optimizer step of the block and of its halves
                            A: upper.answer, lower.answer: what no pass waits for

What an operation waits for follows from its kind and from what the halves declare; nothing here asks for a method.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from decoupled.block import Block
from decoupled.correction import Acting, Correction, Site
from decoupled.coupling import Lower, Place, Upper
from decoupled.errors import NonFiniteError, OperationError, UserError
from decoupled.messages import Data, Down, End, Message, Up
from decoupled.order import Order
from decoupled.passes import Pass, on
from decoupled.plan import ANY, Op
from decoupled.retention import Retention
from decoupled.runtime.contract import Actor, Outcome, Want
from decoupled.sample_losses import SampleLosses, asked
from decoupled.scaling import Scaled, Scaling, number
from decoupled.statistics import Counters
from decoupled.steps import Steps
from decoupled.waits import down_port, needed

Sends = list[tuple[str, Message]]


class Worker(Actor):
    """Trains one block.

    Args:
        place: the block's number, how many there are, and the shapes around it.
        block: the block.
        lower: coupling half above it.
        upper: coupling half below it.
        retention: what it keeps between F and B.
        order: the order of its operations.
        corrections: as configured; what acts here is made of them.
        steps: optimizers of the block and the halves.
        on_nonfinite: "stop" (NonFiniteError) or "skip" (the pass is dropped here and in all blocks below).
        method: its name, for error messages only.
        scaling: of its objective and of the gradients from above; default: none.
        losses: the loss that the halves call, where a selection of samples asks for more than its value.
    """

    def __init__(
        self, place: Place, block: Block, lower: Lower, upper: Upper, retention: Retention, order: Order,
        corrections: Sequence[Correction], steps: Steps, on_nonfinite: str = "stop", method: str = "",
        scaling: Scaling | None = None, losses: SampleLosses | None = None,
    ) -> None:  # fmt: skip
        self.name, self.place, self.k, self.K, self.block = block.name, place, place.k, place.K, block
        self.lower, self.upper, self.retention, self.order = lower, upper, retention, order
        self.device, self.steps, self.counters, self.scaling = block.device, steps, Counters(), scaling or Scaling()
        self._on_nonfinite, self._method, self.losses = on_nonfinite, method, losses
        if order.sees is not None and retention.today:
            kept = type(retention).__name__
            raise UserError(f"order {order} runs with older weights, {kept} with today's; keep graphs")
        late = order.delays(place.k, place.K)
        site = Site(place.k, place.K, sum(late) / len(late), block.parameters, steps.block_optimizer, order.period)
        self.corrections = steps.corrections = Acting(corrections, site)
        retention.records = lower.has_objective or lower.awaits == "B"
        retention.forward_weights, retention.backward_weights = self.corrections.forward, self.corrections.backward
        retention.recording = self.corrections.recording
        self.needs_data = lower.needs_data or upper.needs_data
        self._start, self._plan = 0, order.plan(place.k, place.K)
        self._passes: dict[int, Pass] = {}
        self._unknown = Pass(lower.replies)
        self._versions = [block.version]  # after each S of this run
        self._begun = self._end = 0  # forwards of this run; key of its End
        self._dropped = False  # a pass since the last step was dropped: a loss or a gradient was not finite

    def begin(self, start: int, epoch: int = 0) -> None:
        """Get ready for the run of an epoch whose first pass has key `start`; passes of a broken run are forgotten."""
        self._start, self._plan = start, self.order.at(epoch).plan(self.k, self.K)
        for half in (self.lower, self.upper):
            half.begin(epoch)
            half.clear()
        self._passes.clear()
        self._versions, self._begun, self._dropped = [self.block.version], 0, False
        self.retention.clear()
        self.steps.clear()
        if self.losses is not None:
            self.losses.clear()
        self.counters.take_loss()

    def wants(self) -> Sequence[Want]:
        return [self._want(op) for op in self._plan.options()]

    def handle(self, want: Want, messages: tuple[Message, ...]) -> Outcome:
        op: Op = want.tag
        if messages and isinstance(messages[0], End):  # what an operation takes together ends together
            end = messages[0].key
            assert isinstance(end, int)
            self._plan.end(end - self._start)
            return Outcome(None, [("up", End(end)), *self._last(end)])
        key = want.key if not messages else messages[0].key
        assert key is None or isinstance(key, int)
        label = op.kind if key is None else f"{op.kind}{key}"
        try:
            sends = self._operate(op.kind, key, messages)
        except Exception as error:
            state = self._passes.get(key) if key is not None else None
            where = f"{label} (batch {state.batch})" if state else label
            raise OperationError(self.name, where, error, self._method) from error
        self._plan.done(op)
        return Outcome(label, [*sends, *self._last()])

    def _last(self, end: int | None = None) -> Sends:
        """What is said once everything has been done."""
        self._end = end or self._end
        return [] if self.losses is None or self._plan.options() else [("losses", End(self._end))]

    def _want(self, op: Op) -> Want:
        key = None if op.batch == ANY else op.batch + self._start
        if op.kind == "S":
            return Want((), None, op)
        state = self._passes.get(key) if key is not None else None
        known = state or self._unknown
        ports = needed(op.kind, self.lower, self.upper, known.replies, known.own, known.data is not None)
        if key is None and not ports:  # a free order at a block that waits for nobody: the oldest pass
            key = next(iter(self._passes))
        return Want(ports, key, op)

    def _operate(self, kind: str, n: int | None, messages: tuple[Message, ...]) -> Sends:
        if n is None:
            return self._step()
        if kind == "A":
            return self._answer(messages)
        if kind in "EF":
            state = self._open(n, messages)
            return self._emit(n, state) if kind == "E" else self._forward(n, state, messages)
        return self._backward(kind, n, self._passes[n], messages)

    def _answer(self, messages: tuple[Message, ...]) -> Sends:
        for message in messages:
            assert isinstance(message, Up | Down)
            if below := isinstance(message, Up):
                self._heed(message)
            half = self.upper if below else self.lower
            half.answer(None if message.void else message.payload)
            if half.learns_from_answers:
                self.steps.step_half(below)
        return []

    def _heed(self, message: Up) -> None:
        self.corrections.hear("up", message.news)
        self.scaling.hear(message.overflow)

    def _open(self, n: int, messages: tuple[Message, ...]) -> Pass:
        state = self._passes.setdefault(n, Pass(replies=self.lower.replies))
        for message in messages:
            assert isinstance(message, Data | Up)
            state.enter(message)
            if isinstance(message, Data):
                state.data = on(message, self.block.device)
            else:
                self._heed(message)
                state.data = (None if message.void else self.upper.carried(message)) or state.data
        return state

    def _emit(self, n: int, state: Pass) -> Sends:
        payload = self.lower.offer(state.data) if state.data is not None and not state.void else None
        state.offered = payload is not None
        return [] if payload is None else self._up(n, state, payload)

    def _forward(self, n: int, state: Pass, messages: tuple[Message, ...]) -> Sends:
        self._begun = n - self._start + 1
        state.version = self._sees(n - self._start)
        if state.void:
            return [] if state.offered else self._up(n, state, ())
        payload = next((message.payload for message in messages if isinstance(message, Up)), ())
        x = self.upper.receive(payload, state.data).to(self.block.device)
        wants = self.upper.replies and self.upper.differentiates and x.is_floating_point()
        y = self.retention.keep(n, x.detach().requires_grad_(wants), state.version)
        self.counters.samples += x.shape[0] // self.upper.streams
        payload = self.lower.emit(y, state.data)
        return [] if state.offered else self._up(n, state, payload)

    def _sees(self, n: int) -> int:
        """The version of the weights that the n-th forward of this run uses (or the next one, if there is none yet)."""
        if self.order.sees is None:
            return self.block.version
        steps = self.order.sees(self.k, self.K, n)
        return self._versions[steps] if steps < len(self._versions) else self.block.version + 1

    def _backward(self, kind: str, n: int, state: Pass, messages: tuple[Message, ...]) -> Sends:
        """B: all gradients, for weights and input. I: one gradient, for the input. W: the rest, for the weights."""
        before, state.total = state.total, None
        self._collect(n, state, messages)
        latest = state.total
        if before is not None and not self.lower.relays:
            state.total = before if latest is None else before + latest
        answers, to_weights = self.upper.replies and kind in "BI", kind in "BW"
        to_input = answers and self.upper.differentiates
        payload, scale = None, 1.0
        cotangent = latest if kind == "I" else state.total
        if cotangent is not None and not state.void:
            tape = self.retention.open(n)
            given = cotangent.tensor.to(tape.y.dtype)
            with self.block.walking(tape.weights):
                gradient, grads = tape.vjp(given, to_input=to_input, to_weights=to_weights, again=kind == "I")
            if answers and (found := self.scaling.reply(gradient, cotangent.scale)) is not None:
                heard = next((m.payload for m in messages if isinstance(m, Down)), (self.scaling.seen(cotangent),))
                payload, scale = self.upper.reply_with(found[0], tape.x.detach(), tape.y.detach(), heard), found[1]
            if to_weights:
                plain = self.scaling.gradients(grads, cotangent.scale, state.hops - 1)
                self._dropped = self._dropped or plain is None
                if plain is not None:
                    self.steps.accumulate(self.block.parameters, self.corrections.gradients(plain, tape.weights))
        if to_weights:
            if not state.void:
                self.counters.version(n, state.version, self.block.version)
            self.retention.close(n)
            del self._passes[n]
        told = self.losses.told(n, state) if to_weights and self.losses is not None else None
        return (self._down(n, state, payload, scale) if answers else []) + ([("losses", told)] if told else [])

    def _collect(self, n: int, state: Pass, messages: tuple[Message, ...]) -> None:
        """Add up the gradients for the output that this operation uses: the own objective's, then one from above."""
        if self.lower.has_objective and not state.own and not state.void:
            state.own, state.hops = True, 1
            state.total = self._own_gradient(n, state)
        for message in messages:
            assert isinstance(message, Down)
            state.replies, state.hops = state.replies - 1, message.hops + 1
            self.corrections.hear("down", message.news)
            if message.void:
                state.void, self._dropped = True, self._dropped or not state.void
                continue
            if (y := self.lower.returned(message.payload)) is not None:
                self.retention.restore(n, y.to(self.block.device))
            gradient = self.scaling.heard(self.lower.pull(message.payload).to(self.block.device), message.scale)
            if self.corrections.cotangent is not None:
                gradient = gradient.through(self.corrections.cotangent)
            state.total = gradient if state.total is None else state.total + gradient

    def _own_gradient(self, n: int, state: Pass) -> Scaled | None:
        y = self.retention.open(n).y.detach().requires_grad_()
        with torch.enable_grad(), self.block.precision(), asked(self.losses, state.data):
            objective = self.lower.objective(y, state.data)
        if objective is None:
            return None
        value = number(objective)
        if not abs(value) < float("inf"):
            if self._on_nonfinite == "stop":
                raise NonFiniteError(f"the loss is {value}; {self.lower.remedy}")
            state.void = self._dropped = True
            self.counters.skipped += 1
            return None
        share = 1.0 if state.data is None else state.data.share
        self.counters.loss(value, y.shape[0], share, state.batch)
        gradient, plain = self.scaling.differentiate(objective, share, y, self.steps.lower_parameters)
        self._dropped = self._dropped or plain is None
        if plain:
            self.steps.accumulate(self.steps.lower_parameters, plain)
        return gradient

    def _step(self) -> Sends:
        if self._dropped:  # a minibatch of several passes is dropped whole
            self._dropped = False
            self.steps.clear()
        if self.steps.owed:
            if self.order.sees is not None:
                self.retention.reserve(self._sees(self._begun))
            self.steps.step()
            self.block.version += 1
            self.counters.updates += 1
            self.scaling.stepped()
        self._versions.append(self.block.version)
        return []

    def _up(self, n: int, state: Pass, payload: tuple[Tensor, ...]) -> Sends:
        if self.k == self.K - 1:
            return []
        message = Up(
            n, batch=state.batch, round=state.round, indices=state.indices, version=state.version,
            payload=payload, void=state.void, news=self.corrections.tell("up"), overflow=self.scaling.tell(),
        )  # fmt: skip
        self.counters.bytes_up += message.nbytes
        return [("up", message)]

    def _down(self, n: int, state: Pass, payload: tuple[Tensor, ...] | None, scale: float) -> Sends:
        message = Down(
            n, batch=state.batch, round=state.round, indices=state.indices, version=self.block.version,
            payload=payload or (), void=payload is None, hops=state.hops, scale=scale,
            news=self.corrections.tell("down"),
        )  # fmt: skip
        self.counters.bytes_down += message.nbytes
        state.sent += 1
        return [(down_port(state.sent - 1), message)]
