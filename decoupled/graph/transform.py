"""Nodes that compute: parameterised and other transforms of a payload, and the loss where the way back begins.

    PPT    y = f(x; w)     forward remembers (x, y, version of w); backward pops it: dx goes on, dw is accumulated
    NPT    y = f(x)        the same without weights
    Loss   l(y, target)    waits for both with equal state; dl/dy starts the way back, the target is answered None

What a backward of a PPT uses when its weights have been updated since the forward (they are never stashed):

    "activation"   the saved activations of the forward and today's weights
    "recompute"    the saved input; the forward is run again with today's weights

After `muf` gradients (min_update_frequency) the PPT updates its own weights, without asking anybody.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from decoupled.errors import NonFiniteError, UserError
from decoupled.graph.matching import Matching
from decoupled.graph.node import Backward, Forward, Node, Result, Sends, State, twice
from decoupled.steps import MakeOptimizer, MakeScheduler

MODES = ("activation", "recompute")
Score = Callable[[Tensor, Tensor], float]


class NPT(Node):
    """Transform without weights.

    Args:
        function: payload -> payload; with `with_state`, (payload, *state) -> payload.
    """

    kind, steers = "npt", False

    def __init__(self, function: Callable[..., Tensor], name: str | None = None, with_state: bool = False) -> None:
        super().__init__(name or _name_of(function))
        self.function, self.with_state = function, with_state
        self.recompute = False
        self.peak_bytes = self._bytes = 0  # of the inputs and outputs that are kept
        self._kept: dict[State, tuple[Tensor, Tensor | None, int]] = {}  # input, output with its graph, version

    def forward(self, port: int, state: State, payload: Tensor) -> Sends:
        if not self.training:
            with torch.no_grad():
                return (Forward(0, state, self._run(payload, state)),)
        if state in self._kept:
            raise twice(self, f"input {port}", state)
        x = payload.detach()
        if x.is_floating_point():
            x.requires_grad_()
        with torch.enable_grad():
            y = self._run(x, state)
        self._kept[state] = x, None if self.recompute else y, self.version
        self._bytes += x.nbytes if self.recompute else x.nbytes + y.nbytes
        self.peak, self.peak_bytes = max(self.peak, len(self._kept)), max(self.peak_bytes, self._bytes)
        return (Forward(0, state, y.detach()),)

    def backward(self, port: int, state: State, gradient: Tensor | None) -> Sends:
        x, y, version = self._kept.pop(state)
        self._bytes -= x.nbytes if y is None else x.nbytes + y.nbytes
        if gradient is not None:
            if y is None:
                with torch.enable_grad():
                    y = self._run(x, state)
            if y.requires_grad:
                y.backward(gradient)
            self._learn(version)
        return (Backward(0, state, x.grad),)

    def _run(self, x: Tensor, state: State) -> Tensor:
        return self.function(x, *state) if self.with_state else self.function(x)

    def _learn(self, *versions: int) -> None:
        """Gradients for the weights have been added up; their forwards saw the weights of these versions."""

    def remembered(self) -> list[tuple[int, State]]:
        return [(0, state) for state in self._kept]

    def forget(self) -> None:
        self._kept.clear()
        self._bytes = 0

    def snapshot(self) -> dict[str, Any]:
        return super().snapshot() | {"peak_bytes": self.peak_bytes}


class PPT(NPT):
    """Parameterised transform: any module of one tensor to one tensor, with an optimizer of its own.

    Args:
        module: its weights belong to this node alone.
        muf: gradients after which it updates (min_update_frequency); None: what the trainer says.

    Attributes:
        staleness: own updates between forward and backward -> how often.
        updates: how many there were.
    """

    kind = "ppt"

    def __init__(
        self, module: nn.Module, name: str | None = None, muf: int | None = None, with_state: bool = False
    ) -> None:
        super().__init__(module, name, with_state)
        if muf is not None and muf < 1:
            raise UserError(f"node {self.name!r}: muf is a number of gradients, at least 1; got {muf}")
        self.module, self.own_muf = module, muf
        self.muf: float = muf or float("inf")
        self.mean = False
        self.staleness: Counter[int] = Counter()
        self.updates = self.gradients = 0  # gradients since the last update
        self._optimizer: torch.optim.Optimizer | None = None
        self._scheduler: LRScheduler | None = None
        self._twins: list[tuple[nn.Parameter, nn.Parameter]] = []  # weight, the same memory for the optimizer

    def prepare(
        self, optimizer: MakeOptimizer, muf: float, mean: bool, mode: str, batch: int = 1,
        scheduler: MakeScheduler | None = None,
    ) -> None:  # fmt: skip
        """Give it an optimizer, made for its own weights; see `Asynchrony` for the options."""
        self.recompute, self.mean, self.muf = mode == "recompute" or batch > 1, mean, muf
        self.batch = 1 if self.with_state else batch
        # The optimizer writes into the same memory through tensors with another version counter: autograd then uses
        # today's weights with the saved activations, instead of refusing to.
        self._twins = [(p, nn.Parameter(p.data)) for p in self.module.parameters() if p.requires_grad]
        self._optimizer = optimizer([twin for _, twin in self._twins]) if self._twins else None
        self._scheduler = scheduler(self._optimizer) if scheduler and self._optimizer else None

    def begin(self, training: bool) -> None:
        super().begin(training)
        self.module.train(training)
        self.gradients = 0
        self.module.zero_grad(set_to_none=True)

    def snapshot(self) -> dict[str, Any]:
        counts = {"updates": self.updates, "staleness": Counter(self.staleness)}
        return super().snapshot() | counts | {"weights": self.module.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        rest = dict(state)
        self.module.load_state_dict(rest.pop("weights"))
        super().restore(rest)

    def take_many(self, back: bool, messages: Sequence[tuple[State, Tensor | None]]) -> Sends:
        """Handle messages, or answers, that wait together: in one call of the module, on all their rows.

        What waits together is by chance, so nothing of the joint forward is kept: the way back recomputes.
        """
        self.visits += len(messages) * self.training
        if back:
            for state, _ in messages:
                self.check_answer(0, state)
        return self.check_sends(self._backward_many(messages) if back else self._forward_many(messages))

    def _forward_many(self, messages: Sequence[tuple[State, Any]]) -> Sends:
        if self.training:
            for state, x in messages:
                if state in self._kept:
                    raise twice(self, "input 0", state)
                self._kept[state] = x, None, self.version
                self._bytes += x.nbytes
            self.peak, self.peak_bytes = max(self.peak, len(self._kept)), max(self.peak_bytes, self._bytes)
        rows = [len(x) for _, x in messages]
        with torch.no_grad():
            y = self.module(torch.cat([x for _, x in messages]))
        if len(y) != sum(rows):
            raise UserError(
                f"node {self.name!r}: {len(messages)} messages of {sum(rows)} rows were handled together and {len(y)} "
                "rows came out; its module does not treat rows alone, leave it out of batches"
            )
        parts = y.split(rows)
        return [Forward(0, state, y) for (state, _), y in zip(messages, parts, strict=True)]

    def _backward_many(self, messages: Sequence[tuple[State, Tensor | None]]) -> Sends:
        kept = [self._kept.pop(state) for state, _ in messages]
        self._bytes -= sum(x.nbytes for x, _, _ in kept)
        given = [
            (state, x, g, version) for (state, g), (x, _, version) in zip(messages, kept, strict=True) if g is not None
        ]
        answers: dict[State, Tensor | None] = dict.fromkeys(state for state, _ in messages)
        if given:
            joint = torch.cat([x for _, x, _, _ in given]).requires_grad_(given[0][1].is_floating_point())
            with torch.enable_grad():
                y = self.module(joint)
            if y.requires_grad:
                y.backward(torch.cat([g for _, _, g, _ in given]))
            if joint.grad is not None:
                parts = joint.grad.split([len(x) for _, x, _, _ in given])
                answers |= {state: part for (state, *_), part in zip(given, parts, strict=True)}
            self._learn(*(version for *_, version in given))
        return [Backward(0, state, gradient) for state, gradient in answers.items()]

    def _learn(self, *versions: int) -> None:
        self.staleness.update(self.version - version for version in versions)
        self.gradients += len(versions)
        if self.gradients >= self.muf:
            self.update()

    def update(self) -> None:
        """One step with what has been added up; none if nothing has been."""
        if not self.gradients or self._optimizer is None:
            return
        for weight, twin in self._twins:
            twin.grad, weight.grad = weight.grad, None
            if self.mean and twin.grad is not None:
                twin.grad /= self.gradients
        self._optimizer.step()
        self.gradients = 0
        self.version += 1
        self.updates += 1

    def end_epoch(self) -> None:
        """After training: what is left of gradients becomes an update, and the learning rate's schedule moves on."""
        if self.training:
            self.update()
            if self._scheduler is not None and self.updates:
                self._scheduler.step()


class Loss(Node):
    """Where the way back begins: waits for a prediction and its target, with equal states.

    Args:
        function: (prediction, target) -> scalar, a mean over rows.
        score: (prediction, target) -> number, a sum over rows (how many are right); or None.
    """

    kind, inputs, outputs, steers = "loss", 2, 0, False

    def __init__(
        self, function: Callable[[Tensor, Tensor], Tensor], name: str | None = None, score: Score | None = None
    ) -> None:
        super().__init__(name or "loss")
        self.function, self.score = function, score
        self._waiting = Matching(self)

    def forward(self, port: int, state: State, payload: Tensor) -> Sends:
        both = self._waiting.add(port, state, payload)
        if both is None:
            return ()
        prediction, target = both[0].detach(), both[1]
        with torch.set_grad_enabled(self.training):
            loss = self.function(prediction.requires_grad_(self.training), target)
        if loss.dim() or (self.training and not loss.requires_grad):
            raise UserError(f"node {self.name!r}: the loss must be one number made of the prediction; use a mean")
        rows = prediction.shape[0] if prediction.dim() else 1
        score = float("nan") if self.score is None else float(self.score(prediction.detach(), target))
        result = Result(state, loss.item(), score, rows)
        if not self.training:
            return (result,)
        if not math.isfinite(result.loss):
            raise NonFiniteError(
                f"node {self.name!r}, instance {state[0]}: the loss is {result.loss}; lower the learning rate"
            )
        loss.backward(inputs=[prediction])
        return result, Backward(0, state, prediction.grad), Backward(1, state, None)

    def backward(self, port: int, state: State, gradient: Any) -> Sends:
        raise AssertionError("a loss has no outputs")

    def waiting(self) -> list[tuple[int, State]]:
        return self._waiting.remembered()

    remembered = waiting

    def forget(self) -> None:
        self._waiting.clear()


def _name_of(function: Callable[..., Any]) -> str:
    text = getattr(function, "__name__", type(function).__name__).lower()
    return text if text.isidentifier() else "npt"
