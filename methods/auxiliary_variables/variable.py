"""The auxiliary variable of one edge: its value Z, its scaled dual U, and the updates of both.

Online, Z is carried from round to round of one minibatch and then discarded. Stored, Z has a row per sample of the
data set, addressed by sample index; a sample met for the first time starts from the forward value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from decoupled.coupling import Lower
from decoupled.errors import UserError
from decoupled.messages import Data
from decoupled.methods.auxiliary_variables.rows import Rows


def gradient_step(z: Tensor, x: Tensor, u: Tensor, p: Tensor, beta: float, eta: float) -> Tensor:
    """One step of size `eta` on (beta/2)||z - x + u||^2 + <p, z>; all (batch, *features)."""
    return z - eta * (beta * (z - x + u) + p)


def proximal_step(z: Tensor, x: Tensor, u: Tensor, p: Tensor, beta: float, eta: float) -> Tensor:
    """argmin over v of (beta/2)||v - x + u||^2 + <p, v> + ||v - z||^2 / (2 eta), in closed form."""
    return (beta * (x - u) + z / eta - p) / (beta + 1 / eta)


def nonnegative_step(z: Tensor, x: Tensor, u: Tensor, p: Tensor, beta: float, eta: float) -> Tensor:
    """The same minimiser under v >= 0 (variables behind a ReLU): the projection of `proximal_step`."""
    return proximal_step(z, x, u, p, beta, eta).clamp_min(0)


STEPS = {"gradient": gradient_step, "proximal": proximal_step, "nonnegative": nonnegative_step}


class Variable(Lower):
    """Lower half of an edge with an auxiliary variable.

    Args:
        beta: weight of the penalty. eta: step of the variable. sigma: step of the dual (0: none).
        stored: keep one row per sample. step: a name in `STEPS`.
    """

    awaits, replies = "A", 1
    has_objective = True
    needs_data = True

    def __init__(self, beta: float, eta: float, sigma: float, stored: bool, step: str) -> None:
        self._beta, self._eta, self._sigma, self._stored, self._step = beta, eta, sigma, stored, STEPS[step]
        self.z: Tensor | None = None  # (batch, *features), as is u
        self.u: Tensor | None = None
        self._x: Tensor | None = None  # the block's output
        self._indices: Any = None
        self._pending = 0
        self._rows = Rows()

    @property
    def held_bytes(self) -> int:
        """Bytes of the variables and duals that outlive an operation."""
        live = sum(t.numel() * t.element_size() for t in (self.z, self.u, self._x) if t is not None)
        return self._rows.nbytes if self._stored else live

    def offer(self, data: Data) -> tuple[Tensor, ...] | None:
        self._pending = 2  # the own objective and the answer
        self._indices = data.indices
        if self._stored:
            if data.indices is None:
                raise UserError(
                    "stored auxiliary variables are addressed by sample: yield (inputs, targets, indices) batches "
                    "(decoupled.data.Loader does), or choose stored=false"
                )
            self.z, self.u = self._rows.get(data.indices) if self._rows.know(data.indices) else None, None
        elif data.round == 0:
            self.z = self.u = None
        return None if self.z is None else (self.z,)

    def emit(self, y: Tensor, data: Data | None) -> tuple[Tensor, ...]:
        self._x = y.detach()
        if self.z is None:
            self.z = self._rows.merge(self._indices, self._x) if self._stored else self._x
        if self.u is None:
            self.u = torch.zeros_like(self.z)
        return (self.z,)

    def objective(self, y: Tensor, data: Data | None) -> Tensor | None:
        assert self.z is not None and self.u is not None
        residual = self.z - y + self.u
        self._half_done()
        if not residual.any():  # before the first answer has come down, Z is the block's own output
            return None
        return residual.square().sum() * (self._beta / 2 / y.shape[0])

    def answer(self, payload: tuple[Tensor, ...] | None) -> None:
        if payload is not None:
            assert self.z is not None and self.u is not None and self._x is not None
            p = payload[0].to(self.z.device) * len(self.z)
            self.z = self._step(self.z, self._x, self.u, p, self._beta, self._eta)
        self._half_done()

    def _half_done(self) -> None:
        """After the own objective and the answer, in either order, the round is over: dual step, rows written back."""
        self._pending -= 1
        if self._pending == 0 and self.z is not None and self.u is not None and self._x is not None:
            if self._sigma:
                self.u = self.u + self._sigma * (self.z - self._x)
            if self._stored:
                self._rows.put(self._indices, self.z)

    def clear(self) -> None:
        self.z = self.u = self._x = self._indices = None

    def state_dict(self) -> dict[str, Any]:
        return self._rows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rows.load_state_dict(state)
