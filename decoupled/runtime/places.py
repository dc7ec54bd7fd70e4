"""Which rank each actor lives in, and what is known of a rank when it is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from decoupled.runtime.contract import Edge
from decoupled.runtime.local import Status


class Places(dict[str, int]):
    """Actor -> rank.

    Attributes:
        who: process number and host of every rank.
        edges: of the present graph.
    """

    def __init__(self, world: int) -> None:
        super().__init__()
        self._world = world
        self.who: Sequence[tuple[int, str]] = ()
        self.edges: Sequence[Edge] = ()

    def add(self, actors: Sequence[str]) -> None:
        """Put those that have no place yet into ranks, neighbours together."""
        new = [name for name in actors if name not in self]
        self.update({name: i * self._world // len(new) for i, name in enumerate(new)})

    def obituary(
        self, rank: int, reason: str, status: Status | None, last: Mapping[Edge, object] | None
    ) -> str:  # fmt: skip
        """Who is lost, why, and what is known of it: its last operations, its edges, and the last batch on them.

        Args:
            status: what it last said. last: edge -> key of the latest message, as this process knows it; None: no run.
        """
        actors = [name for name, place in self.items() if place == rank]
        pid, host = self.who[rank] if rank < len(self.who) else ("?", "?")
        text = [f"rank {rank} ({', '.join(actors) or 'no blocks'}; process {pid} on {host}): {reason}"]
        if last is None:
            return text[0]
        if status is not None:
            text += [f"{actor} was last at {operation}" for actor, operation in status.operations.items()]
        for edge in self.edges:
            places = {self[edge.source], self[edge.target]}
            if rank in places and len(places) == 2:
                text.append(f"edge {edge}" + (f", last batch {last[edge]}" if edge in last else ""))
        return "; ".join(text)
