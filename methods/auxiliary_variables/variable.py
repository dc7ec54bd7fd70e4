"""The auxiliary variable of one edge: its value Z, its scaled dual U, and the updates of both.

Online, Z and U are carried from round to round of one minibatch and then discarded. Stored, they have a row per sample
of the data set, addressed by sample index; a sample met for the first time starts from the forward value and U = 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decoupled.coupling import Lower
from decoupled.errors import UserError, unknown
from decoupled.messages import Data
from decoupled.methods.auxiliary_variables.rows import Rows

DIVERGED = 1e4  # ||Z - X + U|| over ||X||: no variable that stands for X is as far from it
NOISE = 8.0  # the same in units of the last place: the rounding of one forward against another


def squared(y: Tensor) -> float:
    """||y||^2, added up in float32 at least."""
    flat = y.detach().flatten().to(torch.promote_types(y.dtype, torch.float32))
    return float(torch.dot(flat, flat))


def rounding(square: float, y: Tensor, scale: float) -> bool:
    """Whether a squared distance from `y` is nothing but rounding (float32's at most): Adam makes whole steps of it."""
    limit = (NOISE * min(torch.finfo(dtype).eps for dtype in (y.dtype, torch.float32))) ** 2
    return square == 0 or square < limit * scale < math.inf


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


@dataclass(frozen=True)
class Rule:
    """How a variable and its dual move.

    Attributes:
        beta: weight of the penalty. eta: step of the variable. sigma: step of the dual (0: none).
        stored: keep one row per sample, in up to `memory` bytes. step: a name in `STEPS`.
        z_steps: passes (steps of the variable) per step of the dual and of the weights.
    """

    beta: float
    eta: float
    sigma: float = 0.0
    stored: bool = False
    step: str = "gradient"
    z_steps: int = 1
    memory: float = math.inf

    def __post_init__(self) -> None:
        for name, value in (("beta", self.beta), ("eta", self.eta), ("z_steps", self.z_steps), ("memory", self.memory)):
            if value <= 0:
                raise UserError(f"{name} must be positive, got {value}")
        if not 0 <= self.sigma <= 1:
            raise UserError(f"sigma must lie in [0, 1], got {self.sigma}")
        if self.step not in STEPS:
            raise unknown("step of the auxiliary variable", self.step, STEPS)

    @property
    def overshoots(self) -> bool:
        """Whether a step of the variable overshoots by more than it came from, whatever lies above."""
        return self.step == "gradient" and self.eta * self.beta >= 2

    def broken(self) -> str:
        """Which condition of stability these numbers break, and what to set; if none, what is left to lower."""
        product, far = self.eta * self.beta, f"eta*beta = {self.eta * self.beta:g}"
        if self.overshoots:
            return f"{far} breaks eta*beta < 2; set eta below {2 / self.beta:g}"
        if self.sigma > product:
            return f"sigma = {self.sigma:g} breaks sigma <= eta*beta = {product:g}; set sigma={product:g} or less"
        return f"{far} and sigma = {self.sigma:g} break no rule; the block above is too steep for eta: set it lower"


class Variable(Lower):
    """Lower half of an edge with an auxiliary variable that moves by `rule`; `edge` is its name in errors."""

    awaits, replies = "A", 1
    has_objective = True
    needs_data = True

    def __init__(self, rule: Rule, edge: str = "") -> None:
        self._rule, self._edge, self._step = rule, edge, STEPS[rule.step]
        self.z: Tensor | None = None  # (batch, *features), as is u
        self.u: Tensor | None = None
        self._x: Tensor | None = None  # the block's output
        self._indices: Any = None
        self._share, self._round_ends, self._pending = 1.0, True, 0
        memory = rule.memory / (2 if rule.sigma else 1)
        self._rows = {"z": Rows(memory)} | ({"u": Rows(memory)} if rule.sigma else {})
        self._moves = 0
        self._squares: dict[str, Tensor] = {}  # sums over the moves since `clear`

    @property
    def held_bytes(self) -> int:
        """Bytes in memory of the variables and duals that outlive an operation."""
        live = sum(t.numel() * t.element_size() for t in (self.z, self.u, self._x) if t is not None)
        return sum(rows.memory_bytes for rows in self._rows.values()) if self._rule.stored else live

    def figures(self) -> Mapping[str, float]:
        """Root mean squares of the residuals Z - X and beta (Z - Z before) since `clear`, and bytes in the file."""
        residuals = {name: math.sqrt(float(total) / self._moves) for name, total in self._squares.items()}
        return residuals | {"file_bytes": sum(rows.file_bytes for rows in self._rows.values())}

    def offer(self, data: Data) -> tuple[Tensor, ...] | None:
        self._pending = 2  # the own objective and the answer
        self._indices, self._share = data.indices, data.share
        self._round_ends = (data.round + 1) % self._rule.z_steps == 0
        if self._rule.stored:
            if data.indices is None:
                raise UserError(
                    "stored auxiliary variables are addressed by sample: yield (inputs, targets, indices) batches "
                    "(decoupled.data.Loader does), or choose stored=false"
                )
            known = self._rows["z"].know(data.indices)
            self.z, self.u = (self._rows[n].get(data.indices) if known and n in self._rows else None for n in "zu")
        elif data.round == 0:
            self.z = self.u = None
        return None if self.z is None else (self.z,)

    def emit(self, y: Tensor, data: Data | None) -> tuple[Tensor, ...]:
        self._x = y.detach()
        if self.z is None:
            self.z = self._rows["z"].merge(self._indices, self._x) if self._rule.stored else self._x
            if self._rule.stored and "u" in self._rows:
                self.u = self._rows["u"].merge(self._indices, torch.zeros_like(self.z))
        if self.u is None:
            self.u = torch.zeros_like(self.z)
        return (self.z,)

    def objective(self, y: Tensor, data: Data | None) -> Tensor | None:
        assert self.z is not None and self.u is not None
        square = (self.z - y + self.u).square().sum()
        self._half_done()
        size, scale = float(square.detach()), squared(y)
        if size > DIVERGED**2 * (1 + scale):
            raise UserError(f"the auxiliary variable of edge {self._edge} diverges: {self._rule.broken()}")
        if rounding(size, y, scale):  # before the first answer has come down, Z is the block's own output
            return None
        return square * (self._rule.beta / 2 / y.shape[0])

    def answer(self, payload: tuple[Tensor, ...] | None) -> None:
        if payload is not None:
            assert self.z is not None
            self.move(payload[0].to(self.z.device) * (len(self.z) / self._share))
        self._half_done()

    def move(self, p: Tensor) -> None:
        """One step of the variable, given the gradient `p` (batch, *features) of what lies above, per sample."""
        assert self.z is not None and self.u is not None and self._x is not None
        before, self.z = self.z, self._step(self.z, self._x, self.u, p, self._rule.beta, self._rule.eta)
        self._moves += 1
        for name, gap in (("primal", self.z - self._x), ("dual", self._rule.beta * (self.z - before))):
            square = gap.square().mean()
            self._squares[name] = self._squares[name] + square if name in self._squares else square

    def _half_done(self) -> None:
        """After the own objective and the answer, in either order, the pass is over: dual step, rows written back."""
        self._pending -= 1
        if self._pending == 0 and self.z is not None and self.u is not None and self._x is not None:
            if self._rule.sigma and self._round_ends:
                self.u = self.u + self._rule.sigma * (self.z - self._x)
            if self._rule.stored:
                for name, rows in self._rows.items():
                    rows.put(self._indices, self.z if name == "z" else self.u)

    def clear(self) -> None:
        self.z = self.u = self._x = self._indices = None
        self._moves, self._squares = 0, {}

    def state_dict(self) -> dict[str, Any]:
        return {name: rows.state_dict() for name, rows in self._rows.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, rows in self._rows.items():
            rows.load_state_dict(state[name])
