"""Stages: the two halves of an edge whose variable lambda and multiplier kappa belong to samples of the data set.

    serial phase     F: send X          B: take the gradient, p = B dJ/dX        the last one records lambda and kappa
    parallel phase   E: send lambda     F: X = f(lambda below)   B: J   S   A: take p, move both   (sweep: A B S)

    lambda, kappa (batch, *features): by sample index, as the filter's D leaves them; X stands for D(X) in what follows
    J       = sum_i (beta/2) ||X[i] - lambda[i]||^2 + <kappa[i], X[i] - lambda[i]>  over the batch size
    lambda <- lambda - eta (p - kappa - beta (X - lambda))
    kappa  <- kappa + sigma beta (X - lambda)                   with the new lambda; penalty methods have no kappa

A pass has a `_Visit` from its E to its A: lambda of later passes can be sent before earlier ones are answered.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decoupled.coupling import Lower, Place, Upper
from decoupled.errors import UserError
from decoupled.messages import Data
from decoupled.methods.auxiliary_variables.filters import Filter
from decoupled.methods.auxiliary_variables.rows import Rows
from decoupled.methods.auxiliary_variables.rule import Phases, Rule


@dataclass
class _Visit:
    """One pass through an edge; tensors (batch, *features)."""

    indices: Tensor | None
    lam: Tensor | None = None
    kap: Tensor | None = None
    x: Tensor | None = None
    g: Tensor | None = None  # kappa + beta (X - lambda)
    half_done: bool = False  # of the own objective and the answer, one has been there
    answered: bool = False


class Below(Lower):
    """Lower half: keeps lambda and kappa.

    Args:
        place: where. rule: how lambda and kappa move. phases: which epochs are serial.
        stored: per sample from epoch to epoch; else from round to round of one minibatch.
        filter: of what is stored and sent.
    """

    replies = 1
    needs_data = True

    def __init__(self, place: Place, rule: Rule, phases: Phases, stored: bool, filter: Filter) -> None:
        self._rule, self._phases, self._stored, self._filter = rule, phases, stored, filter
        self._lam, self._kap = Rows(), Rows()
        self._carried: tuple[Tensor | None, Tensor | None] = None, None
        self._visits: dict[Hashable, _Visit] = {}
        self._edge = f"edge block{place.k} -> block{place.k + 1}"
        self.remedy = f"{self._edge}: {rule.remedy}"
        self.begin(0)

    def begin(self, epoch: int) -> None:
        self._serial, self._records = self._phases.serial_at(epoch), self._phases.records(epoch)
        self.awaits, self.has_objective = ("B", False) if self._serial else ("A", True)

    @property
    def held_bytes(self) -> int:
        """Bytes of the variables and multipliers that outlive a pass."""
        carried = sum(t.numel() * t.element_size() for t in self._carried if t is not None)
        return self._lam.memory_bytes + self._kap.memory_bytes + carried

    def offer(self, data: Data) -> tuple[Tensor, ...] | None:
        visit = self._visit(data)
        if not self._stored:
            visit.lam, visit.kap = self._carried if data.round else (None, None)
        elif not self._must_wait(visit) and self._lam.know(self._rows_of(visit)):
            self._fetch(visit)
        return None if visit.lam is None else (visit.lam,)

    def emit(self, y: Tensor, data: Data | None) -> tuple[Tensor, ...]:
        assert data is not None
        visit = self._visit(data)
        visit.x = self._filter.down(y.detach()) if self._records or not self._serial else None
        if self._serial:
            self._visits = {data.key: visit}  # one pass at a time: an earlier one that is still here was dropped above
            return (y.detach(),)
        assert visit.x is not None
        if visit.lam is None and self._stored:  # rows met for the first time start at X
            self._lam.merge(self._rows_of(visit), visit.x)
            if self._rule.multiplies:
                self._kap.merge(self._rows_of(visit), torch.zeros_like(visit.x))
            self._fetch(visit)
        visit.lam = visit.x if visit.lam is None else visit.lam
        if visit.kap is None and self._rule.multiplies:
            visit.kap = torch.zeros_like(visit.lam)
        visit.g = self._rule.gradient(visit.x, visit.lam, visit.kap)
        return (visit.lam,)

    def objective(self, y: Tensor, data: Data | None) -> Tensor | None:
        assert data is not None
        visit = self._visits[data.key]
        assert visit.lam is not None and visit.x is not None and visit.g is not None
        if visit.answered:  # a sweep: lambda has moved since
            visit.g = self._rule.gradient(visit.x, visit.lam, visit.kap)
        self._half_done(data.key, visit)
        return self._rule.objective(self._filter.down(y), visit.lam, visit.kap, visit.g)

    def answer(self, payload: tuple[Tensor, ...] | None) -> None:
        key, visit = next(item for item in self._visits.items() if not item[1].answered)
        visit.answered = True
        if payload is not None:
            assert visit.lam is not None and visit.x is not None and visit.g is not None
            p = payload[0].to(visit.lam.device) * len(visit.lam)
            visit.lam = self._rule.moved(visit.lam, visit.x, visit.kap, visit.g, p)
            if not torch.isfinite(visit.lam.sum()):
                raise UserError(f"{self._edge}: the variable is no longer finite; {self._rule.remedy}")
        self._half_done(key, visit)

    def pull(self, payload: tuple[Tensor, ...]) -> Tensor:
        """In a serial phase: the gradient, recorded as what the parallel phase starts from."""
        visit = self._visits.pop(next(iter(self._visits)))
        if self._records:
            assert visit.x is not None
            p = self._filter.transposed(payload[0].to(visit.x.device)) * len(visit.x)
            lam, kap = self._rule.started(visit.x, p)
            self._write(visit, lam, kap)
        return payload[0]

    def clear(self) -> None:
        self._visits.clear()
        self._carried = None, None

    def state_dict(self) -> dict[str, Any]:
        return {"lambda": self._lam.state_dict(), "kappa": self._kap.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._lam, self._kap = Rows(), Rows()
        self._lam.load_state_dict(state["lambda"])
        self._kap.load_state_dict(state["kappa"])

    def _visit(self, data: Data) -> _Visit:
        return self._visits.setdefault(data.key, _Visit(data.indices))

    def _rows_of(self, visit: _Visit) -> Tensor:
        if visit.indices is None:
            raise UserError(
                "stored auxiliary variables are addressed by sample: yield (inputs, targets, indices) batches "
                "(decoupled.data.Loader does), or choose stored=false"
            )
        return visit.indices

    def _fetch(self, visit: _Visit) -> None:
        visit.lam = self._lam.get(self._rows_of(visit))
        visit.kap = self._kap.get(self._rows_of(visit)) if self._rule.multiplies else None

    def _write(self, visit: _Visit, lam: Tensor, kap: Tensor | None) -> None:
        self._lam.put(self._rows_of(visit), lam)
        if kap is not None:
            self._kap.put(self._rows_of(visit), kap)

    def _must_wait(self, visit: _Visit) -> bool:
        """Whether an earlier pass that is not over will still move a row of this one, or has not been sent up yet."""
        others = [v for v in self._visits.values() if v is not visit]
        rows = [v.indices for v in others if v.indices is not None]
        unsent = any(v.lam is None for v in others)  # what goes up stays in order: room there is bounded
        return unsent or (bool(rows) and bool(torch.isin(self._rows_of(visit), torch.cat(rows)).any()))

    def _half_done(self, key: Hashable, visit: _Visit) -> None:
        """After the own objective and the answer, in either order, the visit is over and its rows are written back."""
        if not visit.half_done:
            visit.half_done = True
            return
        assert visit.lam is not None and visit.x is not None
        kap = None if visit.kap is None else self._rule.multiplier(visit.kap, visit.x, visit.lam)
        if self._stored:
            self._write(visit, visit.lam, kap)
        else:
            self._carried = visit.lam, kap
        del self._visits[key]


class Above(Upper):
    """Upper half: takes U of what comes up, and sends U^T of the gradient down."""

    replies = True

    def __init__(self, phases: Phases, filter: Filter) -> None:
        self._phases, self._filter, self._serial = phases, filter, phases.serial_at(0)

    def begin(self, epoch: int) -> None:
        self._serial = self._phases.serial_at(epoch)

    def receive(self, payload: tuple[Tensor, ...], data: Data | None) -> Tensor:
        return payload[0] if self._serial else self._filter.up(payload[0])

    def reply(self, gradient: Tensor) -> tuple[Tensor, ...]:
        return (gradient if self._serial else self._filter.transposed(gradient),)
