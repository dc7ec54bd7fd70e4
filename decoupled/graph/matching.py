"""Matching: payloads that belong together arrive one by one; they are released when all are there."""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import Tensor

from decoupled.graph.node import Node, State, twice

T = TypeVar("T")


class Matching(Generic[T]):
    """Collects one item per port of `node` for every state; `side` says which ports: "inputs" or "outputs"."""

    def __init__(self, node: Node, side: str = "inputs") -> None:
        self._node, self._side = node, side
        self._partial: dict[State, dict[int, T]] = {}

    def add(self, port: int, state: State, item: T) -> list[T] | None:
        """The items of all ports in their order, if this was the last one; else None."""
        partial = self._partial.setdefault(state, {})
        if port in partial:
            raise twice(self._node, f"{self._side} {port}", state)
        partial[port] = item
        ports = getattr(self._node, self._side)
        if len(partial) < ports:
            return None
        del self._partial[state]
        return [partial[i] for i in range(ports)]

    def remembered(self) -> list[tuple[int, State]]:
        """(port, state) of what still waits for the others."""
        return [(port, state) for state, partial in self._partial.items() for port in partial]

    def __len__(self) -> int:
        return len(self._partial)

    def clear(self) -> None:
        """Forget all."""
        self._partial.clear()


def total(gradients: list[Tensor | None]) -> Tensor | None:
    """The sum of gradients in their order, without those that are None; None if all are."""
    found: Tensor | None = None
    for gradient in gradients:
        if gradient is not None:
            found = gradient if found is None else found + gradient
    return found
