"""The selector: takes candidates, lets the chooser choose, gathers batches, and hears how they went.

    data --> pool --(scores)--> choose --> kept --> full batches --> batch
                                  ^
    losses --> matched with the samples of their batch --> hear

It makes one batch in advance, and learns from losses only while the boss has enough to do. With a lag it hears the
losses of batch m exactly before batch m + lag is chosen, so that the run is the same on every runtime. The other actors
are in `decoupled.between`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from decoupled.errors import ProtocolError, UserError
from decoupled.messages import Data, End, Losses, Message, Probe
from decoupled.runtime.contract import Actor, Outcome, Want
from decoupled.selection import Chooser, Selection, SelectionStatistics, Tally

_SERVED, _DATA, _LOSSES, _SCORES = (Want((port,)) for port in ("served", "data", "losses", "scores"))


class Selector(Actor):
    """Turns candidates into batches.

    Args:
        selection: what is declared. chooser: the rule.
        passes: of a batch: so many messages with losses come back.
        open_batches: most batches whose losses may still come; beyond that the oldest one's have been dropped.
    """

    name = "selector"

    def __init__(self, selection: Selection, chooser: Chooser, passes: int, open_batches: int) -> None:
        self.selection, self.chooser, self.tally = selection, chooser, Tally()
        self._passes, self._open_batches = passes, open_batches

    def begin(self, epoch: int, key: int, batch: int) -> None:
        """Get ready for an epoch whose first pass has number `key` and whose first batch `batch`."""
        self.chooser.begin(epoch)
        self._key, self._batch, self._warm = key, batch, epoch < self.selection.warmup
        self._credit, self._size = self.selection.ready, 0
        self._pool: list[Data] = []  # candidates that wait to be chosen from
        self._kept: list[Data] = []  # chosen samples that wait for the batch to be full
        self._out: deque[Data] = deque()  # batches to be sent
        self._due: dict[Hashable, int] = {}  # passes whose losses have not come, with their batches
        self._sent: dict[int, Data] = {}  # those batches
        self._scoring = self._ended = self._closed = self._over = self._left_out = False

    # --- what comes next ------------------------------------------------------------------------------------------

    def wants(self) -> Sequence[Want]:
        if self._over:
            return ()
        if self._scoring:
            return (_SCORES,)
        lag, served = self.selection.lag, (_SERVED,) if self._credit < self.selection.ready else ()
        next_due = Want(("losses",), next(iter(self._due))) if lag and self._due else _LOSSES
        if self._closed:
            return (next_due,)
        if self._out or self._ended:
            own = (Want(),) if self._credit else ()
        elif lag and len(self._due) > (lag - 1) * self._passes:
            return (*served, next_due)
        else:
            own = (_DATA,)
        return (*served, *own, *((_LOSSES,) if lag == 0 else ()))  # losses last: the boss comes first

    def handle(self, want: Want, messages: tuple[Message, ...]) -> Outcome:
        if not messages:
            return Outcome(None, [self._serve()])
        message, port = messages[0], want.ports[0]
        if port == "served":
            self._credit += 1
        elif port == "losses":
            return self._hear(message)
        elif port == "scores":
            assert isinstance(message, Losses)
            self._scoring = False
            self.tally.scored += sum(len(_indices(data)) for data in self._pool)
            return self._choose(message.losses)
        elif isinstance(message, End):
            self._ended = True
            if self._pool:
                return self._ask()
            self._gather(rest=True)
        else:
            assert isinstance(message, Data)
            return self._take(message)
        return Outcome()

    # --- candidates ------------------------------------------------------------------------------------------------

    def _take(self, data: Data) -> Outcome:
        if data.indices is None:
            raise UserError(
                f"batch {data.batch} has no sample indices, and a selection matches losses by them; let the loader "
                "give (inputs, targets, indices)"
            )
        assert data.inputs is not None
        self._size = self._size or len(data.inputs)
        self.tally.scanned += len(data.inputs)
        self._pool.append(data)
        if len(self._pool) < (1 if self._warm else self.selection.pool):
            return Outcome()
        return self._ask()

    def _ask(self) -> Outcome:
        """Choose from the pool, after a probe if the chooser wants one."""
        if self._warm or not self.chooser.scores:
            return self._choose(None)
        self._scoring = True
        data = cat(self._pool)
        assert data.inputs is not None and data.targets is not None
        probe = Probe(self._key, batch=self._batch, x=data.inputs, targets=data.targets, indices=data.indices)
        return Outcome(None, [("probe", probe)])

    def _choose(self, losses: Tensor | None) -> Outcome:
        pool, self._pool = self._pool, []
        data = cat(pool)
        rows, weights = self.chooser.choose(data, losses)
        if rows is None and weights is None and not self._kept:
            for one in pool:  # as it came
                self._queue(one)
        else:
            self._left_out = self._left_out or (rows is not None and len(rows) < len(_indices(data)))
            chosen = data if rows is None else take(data, rows)
            self._kept.append(chosen if weights is None else replace(chosen, weights=weights))
        self._gather(rest=self._ended)
        return Outcome(f"C{self._batch}")

    def _gather(self, rest: bool = False) -> None:
        """Queue full batches; at the end also the `rest`."""
        count = sum(len(_indices(data)) for data in self._kept)
        while count >= self._size or (rest and count):
            data, size = cat(self._kept), min(count, self._size)
            self._kept = [take(data, torch.arange(size, count))] if count > size else []
            count -= size
            # Normalisation cannot train on one sample; where samples are left out anyway, it is one of them.
            if size > 1 or self._size == 1 or not self._left_out:
                self._queue(data if size == len(_indices(data)) else take(data, torch.arange(size)))

    def _queue(self, data: Data) -> None:
        self._out.append(replace(data, key=0, batch=self._batch))
        self._batch += 1
        self.tally.batches, self.tally.trained = self.tally.batches + 1, self.tally.trained + len(_indices(data))

    def _serve(self) -> tuple[str, Message]:
        if not self._out:
            self._closed = True
            self._over = self.selection.lag is None
            return "batch", End(self._batch)
        data = self._out.popleft()
        self._credit -= 1
        if self.selection.lag is not None:
            self._due |= {self._key + n: data.batch for n in range(self._passes)}
            self._sent[data.batch] = data
            if len(self._sent) > self._open_batches:
                self._give_up(below=min(self._sent) + 1)
        self._key += self._passes
        return "batch", data

    # --- losses ----------------------------------------------------------------------------------------------------

    def _hear(self, told: Message) -> Outcome:
        if isinstance(told, End):
            self.tally.dropped += len(self._due)
            self._over = True
            return Outcome()
        assert isinstance(told, Losses)
        if self._due.pop(told.key, None) is None:
            return Outcome()  # it was given up
        self.tally.packets += 1
        if not told.void:
            self.chooser.hear(told, matching(self._sent[told.batch], told))
        if not self.selection.lag:  # they come in order: what is older was dropped
            self._give_up(below=told.batch)
        if told.batch not in self._due.values():
            del self._sent[told.batch]
        return Outcome(f"L{told.key}")

    def _give_up(self, below: int) -> None:
        """No losses of batches with a smaller number will be heard."""
        lost = [key for key, batch in self._due.items() if batch < below]
        self.tally.dropped += len(lost)
        for key in lost:
            self._sent.pop(self._due.pop(key), None)

    # --- what is known ---------------------------------------------------------------------------------------------

    def statistics(self) -> SelectionStatistics:
        """What has been counted."""
        more = {"consulted": self.chooser.consulted, "flops": self.chooser.flops}
        return SelectionStatistics(**asdict(self.tally), **more)

    def state_dict(self) -> dict[str, Any]:
        chooser = {"consulted": self.chooser.consulted, "flops": self.chooser.flops, **self.chooser.state_dict()}
        return {"tally": self.tally.state_dict(), "chooser": chooser}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        chooser = dict(state["chooser"])
        self.tally.load_state_dict(state["tally"])
        self.chooser.consulted, self.chooser.flops = chooser.pop("consulted"), chooser.pop("flops")
        self.chooser.load_state_dict(chooser)


def _indices(data: Data) -> Tensor:
    assert data.indices is not None
    return data.indices


def cat(parts: Sequence[Data]) -> Data:
    """Several pieces of data as one; the other fields are those of the first."""
    if len(parts) == 1:
        return parts[0]
    weights = None
    if any(part.weights is not None for part in parts):
        ones = [torch.ones(len(_indices(part)), dtype=torch.float32) for part in parts]
        weights = torch.cat([one if p.weights is None else p.weights for one, p in zip(ones, parts, strict=True)])
    columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "targets", "indices")}
    return replace(parts[0], weights=weights, **columns)


def take(data: Data, rows: Tensor) -> Data:
    """Some samples of `data`, by position."""
    columns = {name: getattr(data, name) for name in ("inputs", "targets", "indices", "weights")}
    return replace(data, **{name: None if column is None else column[rows] for name, column in columns.items()})


def matching(data: Data, told: Losses) -> Data:
    """The samples that `told` is about, in its order, found by their indices.

    Raises:
        ProtocolError: it names a sample that was not in the batch.
    """
    mine, theirs = _indices(data), told.indices
    assert theirs is not None
    if theirs.device != mine.device:
        theirs = theirs.to(mine.device)
    if torch.equal(mine, theirs):
        return data
    order = mine.argsort()
    found = torch.searchsorted(mine[order], theirs).clamp(max=len(mine) - 1)
    rows = order[found]
    if not torch.equal(mine[rows], theirs):
        raise ProtocolError(f"batch {told.batch}: losses of samples {theirs.tolist()}, sent were {mine.tolist()}")
    return take(data, rows)
