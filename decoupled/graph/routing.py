"""Nodes that steer: they decide by state where messages go, and put messages together; none has weights.

Cond(f)            to the branch that f(state) names                    backward: to its only predecessor
Phi                from any of several predecessors                     backward: to where the message came from
Isu(f, inverse)    state <- f(state), the payload untouched             backward: state <- inverse(state)
Broadcast          copies to every successor                            backward: waits for all, sends the sum
Concat(dim)        waits for all inputs with equal state, concatenates  backward: splits the gradient
Split(sizes, dim)  splits into one piece per successor                  backward: waits for all, concatenates
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from decoupled.errors import ProtocolError, UserError
from decoupled.graph.matching import Matching, total
from decoupled.graph.node import Backward, Forward, Node, Sends, State, StateFunction, twice


class Cond(Node):
    """Routes by state.

    Args:
        choose: called with the elements of the state. True: the first branch, False: the second; or its number.
        branches: how many there are.
    """

    kind = "cond"

    def __init__(self, choose: StateFunction, branches: int = 2, name: str | None = None) -> None:
        super().__init__(name)
        self.choose, self.outputs = choose, branches

    def forward(self, port: int, state: State, payload: Tensor) -> Sends:
        choice = self.choose(*state)
        branch = int(not choice) if isinstance(choice, bool) else choice
        if not isinstance(branch, int) or not 0 <= branch < self.outputs:
            raise ProtocolError(
                f"node {self.name!r} has no branch {choice!r} for state {state}; its {self.outputs} branches are "
                f"numbered 0 to {self.outputs - 1} (True is the first, False the second)"
            )
        return (Forward(branch, state, payload),)

    def backward(self, port: int, state: State, gradient: Tensor | None) -> Sends:
        return (Backward(0, state, gradient),)


class Phi(Node):
    """Joins streams: passes on what comes from any of its inputs; `join` adds one (the way back of a loop)."""

    kind, inputs = "phi", 0

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name)
        self._origin: dict[State, int] = {}

    def join(self, *wires: Any) -> None:
        """Connect further inputs."""
        self(*wires)

    def forward(self, port: int, state: State, payload: Tensor) -> Sends:
        if self.training:
            if state in self._origin:
                raise twice(self, f"input {port}", state)
            self._origin[state] = port
            self.peak = max(self.peak, len(self._origin))
        return (Forward(0, state, payload),)

    def backward(self, port: int, state: State, gradient: Tensor | None) -> Sends:
        return (Backward(self._origin.pop(state), state, gradient),)

    def remembered(self) -> list[tuple[int, State]]:
        return [(port, state) for state, port in self._origin.items()]

    def forget(self) -> None:
        self._origin.clear()


class Isu(Node):
    """Invertible state update: f and its inverse take the elements of a state and return a whole state."""

    kind, changes_state = "isu", True

    def __init__(self, f: StateFunction, inverse: StateFunction | None = None, name: str | None = None) -> None:
        super().__init__(name)
        self.f, self.inverse = f, inverse

    def forward(self, port: int, state: State, payload: Tensor) -> Sends:
        new = self.f(*state)
        if self.training and self._inverse(*new) != state:
            raise ProtocolError(
                f"node {self.name!r}: f takes state {state} to {new}, and inverse takes that to "
                f"{self._inverse(*new)}; the way back needs the very state, correct `inverse`"
            )
        return (Forward(0, new, payload),)

    def backward(self, port: int, state: State, gradient: Tensor | None) -> Sends:
        return (Backward(0, self._inverse(*state), gradient),)

    def _inverse(self, *state: Any) -> State:
        assert self.inverse is not None  # the graph is checked before it runs
        return self.inverse(*state)


class Broadcast(Node):
    """Copies to every successor. A wire that is used more than once gets one by itself."""

    kind = "broadcast"

    def __init__(self, copies: int, name: str | None = None) -> None:
        super().__init__(name)
        self.outputs = copies
        self._gradients: Matching[Tensor | None] = Matching(self, "outputs")

    def forward(self, port: int, state: State, payload: Tensor) -> Sends:
        return [Forward(out, state, payload) for out in range(self.outputs)]

    def backward(self, port: int, state: State, gradient: Tensor | None) -> Sends:
        gradients = self._gradients.add(port, state, gradient)
        self.peak = max(self.peak, len(self._gradients))
        return () if gradients is None else (Backward(0, state, total(gradients)),)

    def forget(self) -> None:
        self._gradients.clear()


class Concat(Node):
    """Concatenates what comes on its inputs with equal states."""

    kind = "concat"

    def __init__(self, dim: int = -1, name: str | None = None) -> None:
        super().__init__(name)
        self.dim = dim
        self._waiting: Matching[Tensor] = Matching(self)
        self._sizes: dict[State, list[int]] = {}

    def forward(self, port: int, state: State, payload: Tensor) -> Sends:
        payloads = self._waiting.add(port, state, payload)
        self.peak = max(self.peak, len(self._waiting) + len(self._sizes))
        if payloads is None:
            return ()
        if self.training:
            self._sizes[state] = [p.shape[self.dim] for p in payloads]
        return (Forward(0, state, torch.cat(payloads, self.dim)),)

    def backward(self, port: int, state: State, gradient: Tensor | None) -> Sends:
        sizes = self._sizes.pop(state)
        if gradient is None:
            return [Backward(i, state, None) for i in range(self.inputs)]
        return [Backward(i, state, part) for i, part in enumerate(gradient.split(sizes, self.dim))]

    def waiting(self) -> list[tuple[int, State]]:
        return self._waiting.remembered()

    def remembered(self) -> list[tuple[int, State]]:
        return self.waiting() + [(0, state) for state in self._sizes]

    def forget(self) -> None:
        self._waiting.clear()
        self._sizes.clear()


class Split(Node):
    """Splits into pieces of these sizes, one per successor."""

    kind = "split"

    def __init__(self, sizes: Sequence[int], dim: int = -1, name: str | None = None) -> None:
        super().__init__(name)
        self.sizes, self.dim, self.outputs = list(sizes), dim, len(sizes)
        self._shapes: dict[State, Tensor] = {}  # an empty view stands for the payload: shape, type and device
        self._gradients: Matching[Tensor | None] = Matching(self, "outputs")

    def forward(self, port: int, state: State, payload: Tensor) -> Sends:
        if payload.shape[self.dim] != sum(self.sizes):
            raise UserError(
                f"node {self.name!r} splits {sum(self.sizes)} = {' + '.join(map(str, self.sizes))} along dimension "
                f"{self.dim}, and got a payload of shape {tuple(payload.shape)} with state {state}"
            )
        if self.training:
            self._shapes[state] = payload.new_zeros(()).expand(payload.shape)
            self.peak = max(self.peak, len(self._shapes))
        return [Forward(out, state, part) for out, part in enumerate(payload.split(self.sizes, self.dim))]

    def backward(self, port: int, state: State, gradient: Tensor | None) -> Sends:
        gradients = self._gradients.add(port, state, gradient)
        if gradients is None:
            return ()
        zeros = self._shapes.pop(state)
        if all(g is None for g in gradients):
            return (Backward(0, state, None),)
        parts = zip(gradients, zeros.split(self.sizes, self.dim), strict=True)
        return (Backward(0, state, torch.cat([zero if g is None else g for g, zero in parts], self.dim)),)

    def remembered(self) -> list[tuple[int, State]]:
        return [(0, state) for state in self._shapes]

    def forget(self) -> None:
        self._shapes.clear()
        self._gradients.clear()
