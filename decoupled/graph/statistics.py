"""What a graph counts, as frozen records a user gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from decoupled.graph.node import Node
from decoupled.graph.transform import NPT, PPT


@dataclass(frozen=True)
class NodeStatistics:
    """One node since the trainer was made; also readable as a mapping.

    Attributes:
        node, kind: its name and what it is. worker: where it lives.
        visits: messages and answers handled.
        updates: optimizer steps. parameters: number of weights.
        staleness: updates between forward and backward -> number of gradients.
        peak_kept: most states remembered at once. peak_held_bytes: most bytes of inputs and outputs kept with them.
    """

    node: str
    kind: str
    worker: str
    visits: int
    updates: int
    parameters: int
    staleness: dict[int, int]
    peak_kept: int
    peak_held_bytes: int

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


@dataclass(frozen=True)
class WorkerStatistics:
    """One worker since the trainer was made; also readable as a mapping.

    Attributes:
        worker: its name. nodes: those that live there.
        busy_seconds, wait_seconds: in operations; waiting for messages or for room (virtual in `simulated`).
        bytes_forward, bytes_backward: payload bytes sent to other workers.
        peak_held_bytes: sum over its nodes of the most bytes each has kept.
        updates: optimizer steps of its nodes. staleness: updates between forward and backward -> number of gradients.
    """

    worker: str
    nodes: list[str]
    busy_seconds: float
    wait_seconds: float
    bytes_forward: int
    bytes_backward: int
    peak_held_bytes: int
    updates: int
    staleness: dict[int, int]

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


def of_node(node: Node, worker: str) -> NodeStatistics:
    """What one node has counted so far."""
    ppt = node if isinstance(node, PPT) else None
    return NodeStatistics(
        node=node.name, kind=node.kind, worker=worker, visits=node.visits, updates=ppt.updates if ppt else 0,
        parameters=sum(p.numel() for p in ppt.module.parameters()) if ppt else 0,
        staleness=dict(sorted(ppt.staleness.items())) if ppt else {}, peak_kept=node.peak,
        peak_held_bytes=node.peak_bytes if isinstance(node, NPT) else 0,
    )  # fmt: skip


def merged(histograms: list[dict[int, int]]) -> dict[int, int]:
    """The sum of histograms."""
    keys = sorted({key for one in histograms for key in one})
    return {key: sum(one.get(key, 0) for one in histograms) for key in keys}
