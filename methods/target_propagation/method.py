"""Target propagation: what comes down says where an output should have been, through networks that learn the way back.

    name    coupling               order   retention     what G_k, from the outputs of block k to its inputs, learns
    dtp     Targets("inverse")     sync*   KeepGraph     to undo block k:  G_k(f_k(h + e)) = h + e
    l_drl   Targets("transpose")   sync*   KeepGraph     the transposed Jacobian of block k:  J_G = J_f^T

    * or one_f_one_b (pipelined=True), in which targets are K-1-k updates late at block k

    h_k = f_k(h_{k-1})       block k > 0 runs on h_{k-1} and on h_{k-1} + e, side by side; only h_k goes on
    d_{K-1} = -step dL/dh_{K-1}            of every sample's own loss; the target of block k is h_k + d_k
    d_{k-1} = G_k(h_k + d_k) - G_k(h_k)    goes down, no gradient does; block k - 1 adds it to what it had put out
    block k < K-1 follows -d_k / (step * batch) in the place of dL/dh_k, the last block the loss

    penultimate=True (dtp): d_{K-2} = -step dL/dh_{K-2}, the gradient through the last block, which then has no G

Sources: Lee et al. 2015 (arXiv 1412.7525), Ernoult et al. 2022 (arXiv 2201.13415).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled.coupling import Coupling, Lower, Payload, Place, Top, Upper
from decoupled.errors import UserError
from decoupled.messages import Data
from decoupled.method import Facts, Method, late, top
from decoupled.methods.target_propagation.networks import Feedback, Noise
from decoupled.order import one_f_one_b, sync
from decoupled.registry import register


@register("dtp")
def dtp(
    step: float = 0.5, noise: float = 0.1, hidden: int = 0, lr: float = 1e-3, penultimate: bool = True,
    pipelined: bool = False,
) -> Method:  # fmt: skip
    """Difference target propagation: targets come down through learned inverses of the blocks.

    `step`: how far the first target is down the gradient; `noise`: of the inputs that inverses are learned at, as a
    part of their root mean square; `hidden`: width of a layer of theirs, 0: they are linear; `lr`: of Adam for them, 0:
    they have the optimizer of the blocks; `penultimate`: the first target is that of the block before the last;
    `pipelined`: in the order of pipedream, with late targets.
    """
    return _ordered(Targets("inverse", step, noise, hidden, lr, penultimate), pipelined)


@register("l_drl")
def l_drl(
    step: float = 0.5, noise: float = 0.1, hidden: int = 0, lr: float = 1e-3, penultimate: bool = False,
    pipelined: bool = False,
) -> Method:  # fmt: skip
    """Target propagation whose way back learns transposed Jacobians, so that targets become gradients; as `dtp`."""
    return _ordered(Targets("transpose", step, noise, hidden, lr, penultimate), pipelined)


def _ordered(coupling: Targets, pipelined: bool) -> Method:
    if not pipelined:
        return Method(coupling, sync, Facts(exact=False, reach=top, surrogate=True))
    return Method(coupling, one_f_one_b, late(1, surrogate=True))


class _Follows(Lower):
    """Takes the difference between target and output for a gradient; only the rows without noise have one."""

    awaits, replies = "B", 1

    def __init__(self, place: Place, rule: Targets) -> None:
        self._doubled, self._step = rule.doubles(place), rule.step

    def emit(self, y: Tensor, data: Data | None) -> tuple[Tensor, ...]:
        return (_clean(y.detach(), self._doubled),)

    def pull(self, payload: tuple[Tensor, ...]) -> Tensor:
        difference = payload[0].to(torch.promote_types(payload[0].dtype, torch.float32))
        gradient = difference / (-self._step * len(difference))
        return torch.cat((gradient, torch.zeros_like(gradient))) if self._doubled else gradient


class _Loss(Top):
    """The loss of the network on the rows without noise."""

    def __init__(self, place: Place, rule: Targets) -> None:
        super().__init__(place)
        self._doubled = rule.doubles(place)

    def objective(self, y: Tensor, data: Data | None) -> Tensor:
        return super().objective(_clean(y, self._doubled), data)


class _First(Upper):
    """Sends the first target of all, by the gradient through the last block."""

    replies = True

    def __init__(self, rule: Targets) -> None:
        self._step = rule.step

    def reply(self, gradient: Tensor) -> tuple[Tensor, ...]:
        return (gradient * (-self._step * len(gradient)),)


class Back(Upper):
    """Doubles the input with noise; on the way back trains G, then sends what G makes of the difference above."""

    replies, differentiates, streams = True, False, 2

    def __init__(self, place: Place, rule: Targets) -> None:
        outputs, inputs = place.shapes[place.k], place.shapes[place.k - 1]
        if not {len(outputs), len(inputs)} <= {1, 3}:
            raise UserError(
                f"block{place.k} maps {inputs} to {outputs}; target propagation is for features or images, use another "
                "method"
            )
        self._rule, self._top = rule, place.top
        self._back, self._noise = Feedback(outputs, inputs, rule.hidden), Noise()
        self.module: Any = nn.ModuleList([self._back, self._noise])
        self.optimizer = partial(torch.optim.Adam, lr=rule.lr) if rule.lr else None

    def receive(self, payload: tuple[Tensor, ...], data: Data | None) -> Tensor:
        h = payload[0]
        return torch.cat((h, h + self._noise(h, self._rule.noise)))

    def reply_with(self, gradient: Tensor | None, x: Tensor, y: Tensor, heard: Payload) -> Payload:
        own = next(self._back.parameters()).dtype
        (h, noisy), (out, moved) = x.to(own).chunk(2), y.to(own).chunk(2)
        with torch.enable_grad():
            self._lesson(h, noisy, out, moved).backward()
        difference = heard[0].to(out)
        if self._top:
            difference = difference.chunk(2)[0] * (-self._rule.step * len(h))
        with torch.no_grad():
            return ((self._back(out + difference) - self._back(out)).to(x.dtype),)

    def _lesson(self, h: Tensor, noisy: Tensor, out: Tensor, moved: Tensor) -> Tensor:
        """What G is trained to make small, per sample and unit of its output."""
        if self._rule.goal == "inverse":
            return F.mse_loss(self._back(moved), noisy)
        e, z = noisy - h, self._noise(out, self._rule.noise)
        here = self._back(out)
        along = (e * (self._back(moved) - here)).mean() / e.square().mean()
        return (self._back(out + z) - here).square().mean() / z.square().mean() - 2 * along


@dataclass(frozen=True)
class Targets(Coupling):
    """Activation up; down the difference between where the output should have been and where it was."""

    goal: Literal["inverse", "transpose"]
    step: float
    noise: float
    hidden: int
    lr: float
    penultimate: bool
    down: tuple[str, ...] = field(default=("difference",), init=False)
    substitutes: bool = field(default=True, init=False)  # half of the inputs have noise

    def __post_init__(self) -> None:
        if not (self.step > 0 and self.noise > 0 and self.hidden >= 0 and self.lr >= 0):
            raise UserError(
                f"step and noise must be positive, hidden and lr at least 0, got step={self.step:g}, "
                f"noise={self.noise:g}, hidden={self.hidden}, lr={self.lr:g}"
            )

    def doubles(self, place: Place) -> bool:
        """Whether the block runs on inputs with noise, too, to learn its way back."""
        return place.k > 0 and not (place.top and self.penultimate)

    def lower(self, place: Place) -> Lower:
        return _Loss(place, self) if place.top else _Follows(place, self)

    def upper(self, place: Place) -> Upper:
        return Back(place, self) if self.doubles(place) else _First(self)


def _clean(y: Tensor, doubled: bool) -> Tensor:
    return y.chunk(2)[0] if doubled else y
