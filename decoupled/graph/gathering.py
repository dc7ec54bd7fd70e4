"""Nodes that turn one message into many or many into one; each remembers what it needs to find the way back.

Group(by, size)     waits for `size` messages whose states map to one state, joins the payloads in the order of
                    their states                                       backward: splits the gradient
Ungroup(states)     cuts a payload into equal pieces, one per state    backward: waits for all, joins the gradients
Flatmap(states)     the same payload once per state                    backward: waits for all, sends the sum
"""

from __future__ import annotations

import torch
from torch import Tensor

from decoupled.errors import ProtocolError, UserError
from decoupled.graph.matching import total
from decoupled.graph.node import Backward, Forward, Node, Sends, State, StateFunction, twice


class Group(Node):
    """Joins the messages of a group.

    Args:
        by: state -> state of the group (which the joined message has).
        size: state of the group -> how many messages it has; or that number.
        dim: payloads are concatenated along this dimension (0: rows).
    """

    kind, changes_state = "group", True

    def __init__(self, by: StateFunction, size: StateFunction | int, dim: int = 0, name: str | None = None) -> None:
        super().__init__(name)
        self.by, self.dim = by, dim
        self._size = size
        self._waiting: dict[State, dict[State, Tensor]] = {}
        self._members: dict[State, list[tuple[State, int]]] = {}  # group -> its states, and their length along dim

    def forward(self, port: int, state: State, payload: Tensor) -> Sends:
        group = self.by(*state)
        waiting = self._waiting.setdefault(group, {})
        if state in waiting or group in self._members:
            raise twice(self, f"input {port} (group {group})", state)
        waiting[state] = payload
        self.peak = max(self.peak, len(self._waiting) + len(self._members))
        if len(waiting) < (self._size if isinstance(self._size, int) else self._size(*group)):
            return ()
        del self._waiting[group]
        members = sorted(waiting)
        if self.training:
            self._members[group] = [(member, waiting[member].shape[self.dim]) for member in members]
        return (Forward(0, group, torch.cat([waiting[member] for member in members], self.dim)),)

    def backward(self, port: int, state: State, gradient: Tensor | None) -> Sends:
        members = self._members.pop(state)
        if gradient is None:
            return [Backward(0, member, None) for member, _ in members]
        parts = gradient.split([length for _, length in members], self.dim)
        return [Backward(0, member, part) for (member, _), part in zip(members, parts, strict=True)]

    def waiting(self) -> list[tuple[int, State]]:
        return [(0, state) for members in self._waiting.values() for state in members]

    def remembered(self) -> list[tuple[int, State]]:
        return self.waiting() + [(0, state) for members in self._members.values() for state, _ in members]

    def forget(self) -> None:
        self._waiting.clear()
        self._members.clear()


class _Expand(Node):
    """What Ungroup and Flatmap share: one message out per state, and answers that are waited for."""

    changes_state = True

    def __init__(self, states: StateFunction, name: str | None = None) -> None:
        super().__init__(name)
        self.states = states
        self._origin: dict[State, State] = {}  # state that went out -> the one that came in
        self._answers: dict[State, dict[State, Tensor | None]] = {}  # came in -> went out -> gradient
        self._sent: dict[State, list[State]] = {}

    def forward(self, port: int, state: State, payload: Tensor) -> Sends:
        states = list(self.states(*state))
        if self.training:
            if state in self._sent:
                raise twice(self, f"input {port}", state)
            if not states:
                return (Backward(0, state, None),)
            self._sent[state] = states
            for new in states:
                if new in self._origin:
                    raise twice(self, "output 0", new)
                self._origin[new] = state
            self.peak = max(self.peak, len(self._sent))
        return self._expand(state, states, payload)

    def backward(self, port: int, state: State, gradient: Tensor | None) -> Sends:
        origin = self._origin.pop(state)
        answers = self._answers.setdefault(origin, {})
        answers[state] = gradient
        if len(answers) < len(self._sent[origin]):
            return ()
        del self._answers[origin]
        gradients = [answers[sent] for sent in self._sent.pop(origin)]
        return (Backward(0, origin, self._join(origin, gradients)),)

    def _expand(self, state: State, states: list[State], payload: Tensor) -> Sends:
        raise NotImplementedError

    def _join(self, state: State, gradients: list[Tensor | None]) -> Tensor | None:
        raise NotImplementedError

    def remembered(self) -> list[tuple[int, State]]:
        return [(0, state) for state in self._sent]

    def forget(self) -> None:
        self._origin.clear()
        self._answers.clear()
        self._sent.clear()


class Flatmap(_Expand):
    """Sends the same payload once per state; without states the message is answered None at once.

    Args:
        states: called with the elements of the state, returns the states to send.
    """

    kind = "flatmap"

    def _expand(self, state: State, states: list[State], payload: Tensor) -> Sends:
        return [Forward(0, new, payload) for new in states]

    def _join(self, state: State, gradients: list[Tensor | None]) -> Tensor | None:
        return total(gradients)


class Ungroup(_Expand):
    """Cuts a payload into equal pieces, one per state.

    Args:
        states: called with the elements of the state, returns the states to send, in the order of the pieces.
        dim: along which dimension.
    """

    kind = "ungroup"

    def __init__(self, states: StateFunction, dim: int = 0, name: str | None = None) -> None:
        super().__init__(states, name)
        self.dim = dim

    def _expand(self, state: State, states: list[State], payload: Tensor) -> Sends:
        length = payload.shape[self.dim]
        if not states or length % len(states):
            raise UserError(
                f"node {self.name!r}: a payload of shape {tuple(payload.shape)} with state {state} cannot be cut along "
                f"dimension {self.dim} into {len(states)} equal pieces"
            )
        parts = payload.split(length // len(states), self.dim)
        return [Forward(0, new, part) for new, part in zip(states, parts, strict=True)]

    def _join(self, state: State, gradients: list[Tensor | None]) -> Tensor | None:
        given = [gradient for gradient in gradients if gradient is not None]
        if not given:
            return None
        if len({g.shape for g in given}) > 1:
            raise ProtocolError(f"node {self.name!r}: the gradients for state {state} have different shapes")
        zero = torch.zeros_like(given[0])
        return torch.cat([zero if gradient is None else gradient for gradient in gradients], self.dim)
