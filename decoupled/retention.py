"""Retention: what a block keeps between sending a pass up and hearing back.

    policy               kept per pass                    weights in the backward    activations in the backward
    KeepNothing          the graph, until the next op     those of the forward       stored (F and B are adjacent)
    KeepGraph            the graph over frozen copies     those of the forward       stored
    KeepInputAndWeights  input + frozen copies            those of the forward       recomputed, bit-equal
    KeepInput            input                            today's                    recomputed with today's weights
    KeepLiveGraph        the graph over the live weights  today's, for the input     stored

    What recomputes keeps the graph, too, where the backward of a pass comes right behind its forward, at the top block.

Weights are never changed under a live graph (KeepLiveGraph is the exception): where an order puts a step between F and
B, the graph is built over a frozen copy, one copy per weight version however many passes use it. Corrections that run a
pass with other weights (predictions) change such a copy, never the live weights. A recompute replays the random numbers
of the forward and leaves running statistics alone (notes: stash policies S0, S1, S2, S3, S5).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from decoupled.block import Block, Weights
from decoupled.errors import ProtocolError
from decoupled.tape import Tape


class Retention(ABC):
    """Keeps passes of one block between F and B.

    Args:
        block: the block.
        steps_between: whether its order ever puts an optimizer step between F and B of a pass.
        at_once: whether B of a pass comes right behind F, to the same weights.

    Attributes:
        keeps: of a pass: "graph", "input", or "nothing".
        recomputes: whether a backward that does not come at once runs the forward again.
        today: whether a backward uses today's weights, not those of the forward.
        records: whether any gradient will come; without one no graph is kept.
        live: whether graphs stand over the live weights while steps change them.
        forward_weights, backward_weights: what corrections make of copies of today's weights before they are used.
        recording: what corrections put around a run whose graph is used.
        held_bytes, peak_held_bytes: bytes kept for passes in flight (inputs, saved activations, frozen weights).
        peak_passes: most passes kept at once.
    """

    keeps: str = "graph"
    recomputes: bool = False
    today: bool = False
    records: bool = True
    live: bool = False
    forward_weights: Callable[[Weights], Weights] | None = None
    backward_weights: Callable[[Weights], Weights] | None = None
    recording: Callable[[Weights], AbstractContextManager[Any]] = nullcontext

    def __init__(self, block: Block, steps_between: bool, at_once: bool = False) -> None:
        self._block, self._steps_between, self._at_once = block, steps_between, at_once
        self._kept: dict[int, Any] = {}
        self._frozen: dict[int, tuple[Weights, set[int]]] = {}
        self._bytes: dict[int, int] = {}
        self._saved: dict[tuple, int] = {}
        self._needed = math.inf  # oldest version that a forward to come will run with
        self._copy_bytes = sum(p.numel() * p.element_size() for p in block.parameters)
        self.peak_held_bytes = self.peak_passes = 0

    @abstractmethod
    def keep(self, n: int, x: Tensor, version: int | None = None) -> Tensor:
        """Forward of pass `n` on leaf `x`, with reserved weights `version` (default: today's); returns the output."""

    @abstractmethod
    def open(self, n: int) -> Tape:
        """The recorded pass `n`, recomputed if need be; called once or more before `close`."""

    def restore(self, n: int, y: Tensor) -> None:  # noqa: B027
        """The output of pass `n` comes back with its gradient; for policies that make the input from it."""

    def close(self, n: int) -> None:
        """Forget pass `n`."""
        self._kept.pop(n, None)
        self._bytes.pop(n, None)
        for version, (_, users) in list(self._frozen.items()):
            if n in users:
                users.discard(n)
                if not users and version != self._block.version and version < self._needed:
                    del self._frozen[version]

    def clear(self) -> None:
        """Forget everything (after a failure)."""
        self._kept.clear()
        self._bytes.clear()
        self._frozen.clear()
        self._needed = math.inf

    def reserve(self, needed: int) -> None:
        """A step is next, and forwards to come run with the weights of version `needed` or later: keep today's."""
        self._needed = needed
        self._prune()
        if needed <= self._block.version not in self._frozen:
            self._frozen[self._block.version] = (self._copy(self.forward_weights), set())
            self.peak_held_bytes = max(self.peak_held_bytes, self.held_bytes)

    @property
    def held_bytes(self) -> int:
        kept = [v for v, (_, users) in self._frozen.items() if users or v >= self._needed]
        return sum(self._bytes.values()) + len(kept) * self._copy_bytes

    def _hold(self, n: int, thing: Any, nbytes: int) -> None:
        if n in self._kept:
            raise ProtocolError(f"{self._block.name}: pass {n} is kept already")
        self._kept[n], self._bytes[n] = thing, nbytes
        self.peak_held_bytes = max(self.peak_held_bytes, self.held_bytes)
        self.peak_passes = max(self.peak_passes, len(self._kept))

    def _weights(self, n: int, version: int | None) -> Weights | None:
        """Leaves for the forward of pass `n`; None: the live weights, which no step changes before its backward."""
        today = self._block.version
        version = today if version is None else version
        if version == today and not self._steps_between and self.forward_weights is None:
            return None
        self._prune()
        if version not in self._frozen:
            if version != today:
                raise ProtocolError(f"{self._block.name}: weights {version} are not kept, only {list(self._frozen)}")
            self._frozen[version] = (self._copy(self.forward_weights), set())
        weights, users = self._frozen[version]
        users.add(n)
        return weights

    def _prune(self) -> None:
        for old in [v for v, (_, users) in self._frozen.items() if not users]:
            if old != self._block.version and old < self._needed:
                del self._frozen[old]

    def _copy(self, change: Callable[[Weights], Weights] | None) -> Weights:
        """Today's weights as new leaves, changed by a correction."""
        copies = self._block.freeze()
        if change is None:
            return copies
        return [w.detach().requires_grad_(c.requires_grad) for w, c in zip(change(copies), copies, strict=True)]

    def _record(self, x: Tensor, weights: Weights | None, **how: Any) -> Tape:
        leaves = self._block.weights if weights is None else weights
        with torch.set_grad_enabled(self.records), self.recording(leaves):
            y = self._block.run(x, weights, **how)
        return Tape(x, y, leaves)

    def _keep_graph(self, n: int, x: Tensor, weights: Weights | None) -> Tensor:
        tape, nbytes = self._graph_bytes(x, lambda: self._record(x, weights))
        self._hold(n, tape, nbytes)
        return tape.y

    def _graph_bytes(self, x: Tensor, run: Callable[[], Tape]) -> tuple[Tape, int]:
        """Record a pass and say how many bytes its graph saves (measured once per input shape, unless `live`)."""
        shape = (tuple(x.shape), x.dtype)
        if shape in self._saved and not self.live:
            return run(), self._saved[shape]
        seen: dict[int, int] = {x.untyped_storage().data_ptr(): x.numel() * x.element_size()}
        weights = {p.untyped_storage().data_ptr() for p in self._block.parameters}
        for frozen, _ in self._frozen.values():
            weights.update(w.untyped_storage().data_ptr() for w in frozen)

        def pack(t: Tensor) -> tuple[Tensor, int | None]:
            pointer = t.untyped_storage().data_ptr()  # several views of one tensor count once
            seen[pointer] = max(seen.get(pointer, 0), t.numel() * t.element_size())
            version = None if self.live and pointer in weights else t._version
            return (t if t.is_leaf else t.detach()), version  # a non-leaf itself would make a reference cycle

        with torch.autograd.graph.saved_tensors_hooks(pack, _unchanged):
            tape = run()
        pack(tape.y)
        weights.update(buffer.untyped_storage().data_ptr() for buffer in self._block.module.buffers())
        self._saved[shape] = sum(size for pointer, size in seen.items() if pointer not in weights)
        return tape, self._saved[shape]


def _unchanged(packed: tuple[Tensor, int | None]) -> Tensor:
    """The check of torch's own saved tensors, which hooks switch off."""
    tensor, version = packed
    if version is not None and tensor._version != version:
        raise ProtocolError("a tensor saved for the backward was modified by an inplace operation")
    return tensor


class KeepGraph(Retention):
    """Keeps the autograd graph; over frozen copies of the weights if steps come between."""

    def keep(self, n: int, x: Tensor, version: int | None = None) -> Tensor:
        return self._keep_graph(n, x, self._weights(n, version))

    def open(self, n: int) -> Tape:
        return self._kept[n]


class KeepLiveGraph(KeepGraph):
    """Keeps the graph and lets steps change the weights under it, as published code did before torch refused that.

    The gradient is that of no weights. A tensor other than a weight that changes under the graph is an error here too.
    """

    today = live = True

    def __init__(self, block: Block, steps_between: bool, at_once: bool = False) -> None:
        super().__init__(block, False, at_once)


class KeepNothing(Retention):
    """The graph lives until the very next backward, over the live weights; a second pass or a step is refused."""

    def keep(self, n: int, x: Tensor, version: int | None = None) -> Tensor:
        if self._kept:
            raise ProtocolError(f"{self._block.name}: KeepNothing holds one pass at a time, {list(self._kept)} is open")
        tape, nbytes = self._graph_bytes(x, lambda: self._record(x, None))
        self._hold(n, (tape, self._block.version), nbytes)
        return tape.y

    def open(self, n: int) -> Tape:
        tape, version = self._kept[n]
        if version != self._block.version:
            raise ProtocolError(f"{self._block.name}: the weights moved between F{n} and B{n}; keep the graph or input")
        return tape


class _Recompute(Retention):
    """What the two recomputing policies share: run without a graph, record again when the answer comes."""

    keeps, recomputes = "input", True

    @property
    def _replays(self) -> bool:
        """Whether the forward is run again; not of a pass that comes back before anything else happens."""
        moved = self.forward_weights is not None or self.backward_weights is not None
        return moved or not (self._at_once and self.records)

    def keep(self, n: int, x: Tensor, version: int | None = None) -> Tensor:
        weights = self._weights(n, version)
        if not self._replays:
            return self._keep_graph(n, x, weights)
        state = self._block.random_state()
        with torch.no_grad():
            y = self._block.run(x, weights)
        self._hold(n, (x, weights, state), x.numel() * x.element_size())
        return y

    def open(self, n: int) -> Tape:
        kept = self._kept[n]
        if not isinstance(kept, Tape):
            x, weights, state = kept
            kept = self._kept[n] = self._record(x, weights, replay=state, again=True)
        return kept


class KeepInputAndWeights(_Recompute):
    """Keeps the input and the weights of the forward; recomputes. Bit-equal to KeepGraph, less memory, more work."""


class KeepInput(_Recompute):
    """Keeps the input; recomputes with today's weights (Features Replay), or with what corrections make of them."""

    today = True

    def __init__(self, block: Block, steps_between: bool, at_once: bool = False) -> None:
        super().__init__(block, False, at_once)

    def keep(self, n: int, x: Tensor, version: int | None = None) -> Tensor:
        if not self._replays:
            return self._keep_graph(n, x, None)
        state = self._block.random_state()
        with torch.no_grad():
            y = self._block.run(x, None if self.forward_weights is None else self._copy(self.forward_weights))
        self._hold(n, (x, None, state), x.numel() * x.element_size())
        return y

    def open(self, n: int) -> Tape:
        kept = self._kept[n]
        if not isinstance(kept, Tape) and self.backward_weights is not None:
            x, _, state = kept
            kept = self._kept[n] = self._record(x, self._copy(self.backward_weights), replay=state, again=True)
        return super().open(n)
