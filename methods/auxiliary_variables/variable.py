"""The auxiliary variable of one edge: its value Z, its scaled dual U, and the updates of both.

Online, Z is carried from round to round of one minibatch and then discarded. Stored, Z and U have a row per sample of
the data set, addressed by sample index; a sample met for the first time starts from the forward value, U from zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from decoupled.coupling import Lower
from decoupled.errors import UserError
from decoupled.messages import Data


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
        self._table = _Table()

    @property
    def held_bytes(self) -> int:
        """Bytes of the variables and duals that outlive an operation."""
        live = [] if self._stored else [t for t in (self.z, self.u) if t is not None]
        return sum(t.numel() * t.element_size() for t in [*live, *self._table.tensors()])

    def offer(self, data: Data) -> tuple[Tensor, ...] | None:
        self._pending = 2  # the own objective and the answer
        self._indices = data.indices
        if self._stored:
            if data.indices is None:
                raise UserError(
                    "stored auxiliary variables are addressed by sample: yield (inputs, targets, indices) batches "
                    "(decoupled.data.Loader does), or choose stored=false"
                )
            self.z, self.u = self._table.rows(data.indices) if self._table.knows(data.indices) else (None, None)
        elif data.round == 0:
            self.z = self.u = None
        return None if self.z is None else (self.z,)

    def emit(self, y: Tensor, data: Data | None) -> tuple[Tensor, ...]:
        self._x = y.detach()
        if self.z is None:
            self.z, self.u = self._x.clone(), torch.zeros_like(self._x)
            if self._stored:
                self._table.fill(self._indices, self.z, self.u)
                self.z, self.u = self._table.rows(self._indices)
        return (self.z,)

    def objective(self, y: Tensor, data: Data | None) -> Tensor:
        assert self.z is not None and self.u is not None
        value = (self.z - y + self.u).square().sum() * (self._beta / 2 / y.shape[0])
        self._half_done()
        return value

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
            self.u = self.u + self._sigma * (self.z - self._x)
            if self._stored:
                self._table.write(self._indices, self.z, self.u)

    def clear(self) -> None:
        self.z = self.u = self._x = self._indices = None

    def state_dict(self) -> dict[str, Any]:
        return self._table.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._table.load_state_dict(state)


class _Table:
    """Z and U per sample, grown to the largest index seen."""

    def __init__(self) -> None:
        self._z: Tensor | None = None
        self._u: Tensor | None = None
        self._known = torch.zeros(0, dtype=torch.bool)

    def tensors(self) -> list[Tensor]:
        return [t for t in (self._z, self._u) if t is not None]

    def knows(self, indices: Tensor) -> bool:
        """Whether every row has been filled."""
        return len(self._known) > int(indices.max()) and bool(self._known[indices].all())

    def rows(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        assert self._z is not None and self._u is not None
        return self._z[indices], self._u[indices]

    def fill(self, indices: Tensor, z: Tensor, u: Tensor) -> None:
        """Write the rows that are not known yet."""
        size = max(len(self._known), int(indices.max()) + 1)
        if self._z is None or self._u is None:
            self._z, self._u = z.new_zeros(0, *z.shape[1:]), u.new_zeros(0, *u.shape[1:])
        if size > len(self._known):
            grow = max(size, len(self._known) * 3 // 2) - len(self._known)
            self._z = torch.cat([self._z, self._z.new_zeros(grow, *z.shape[1:])])
            self._u = torch.cat([self._u, self._u.new_zeros(grow, *u.shape[1:])])
            self._known = torch.cat([self._known, self._known.new_zeros(grow)])
        new = ~self._known[indices]
        self.write(indices[new], z[new], u[new])
        self._known[indices] = True

    def write(self, indices: Tensor, z: Tensor, u: Tensor) -> None:
        assert self._z is not None and self._u is not None
        self._z[indices], self._u[indices] = z, u

    def state_dict(self) -> dict[str, Any]:
        return {} if self._z is None else {"z": self._z, "u": self._u, "known": self._known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._z, self._u, self._known = state["z"].clone(), state["u"].clone(), state["known"].clone()
