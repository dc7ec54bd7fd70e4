"""Asynchrony: how far a graph runs ahead, and what its updates are made of; what a method for graphs consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from decoupled.errors import UserError, unknown
from decoupled.graph.build import NodeGraph
from decoupled.graph.transform import MODES, PPT
from decoupled.specs import positive


@dataclass(frozen=True)
class Asynchrony:
    """How far a graph runs ahead, and what its updates are made of.

    Attributes:
        max_active_keys: instances in the graph at once.
        min_update_frequency: gradients a node adds up before it updates (a node may have its own, `PPT(muf=...)`).
        combine: "mean" or "sum" of those gradients.
        backward: what a backward after an update uses: "activation" (what the forward saved, with today's weights) or
            "recompute" (the forward is run again).
        replicas: node -> how many of it.
        backward_first: answers are handled before new work.
        frequencies: node -> its own min_update_frequency, before all others.
        batches: node -> how many waiting messages it handles in one call, at most (they come from any instances); its
            module must treat rows alone, and its way back recomputes.
        messages_per_instance: more unanswered ones on one output are taken for a loop that does not end.
    """

    max_active_keys: int = 4
    min_update_frequency: int = 1
    combine: str = "mean"
    backward: str = "activation"
    replicas: Mapping[str, int] = field(default_factory=dict)
    backward_first: bool = True
    frequencies: Mapping[str, int] = field(default_factory=dict)
    messages_per_instance: int = 10_000
    batches: Mapping[str, int] = field(default_factory=dict)
    name: str = ""

    trains: ClassVar[str] = "graphs of nodes (task=NAME, no data and model)"

    def __post_init__(self) -> None:
        positive(
            "graph", max_active_keys=self.max_active_keys, min_update_frequency=self.min_update_frequency,
            messages_per_instance=self.messages_per_instance,
        )  # fmt: skip
        positive("frequencies", **self.frequencies)
        positive("replicas", **self.replicas)
        positive("batches", **self.batches)
        if self.backward not in MODES:
            raise unknown("backward mode", self.backward, MODES)
        if self.combine not in ("mean", "sum"):
            raise UserError(f"combine must be 'mean' or 'sum', got {self.combine!r}")

    def describe(self, K: int) -> dict[str, Any]:
        """Its facts, as plain data; `K` workers change none of them."""
        return {
            "up": ["payload, state"],
            "down": ["gradient, state"],
            "order": "takes what has arrived, " + ("answers first" if self.backward_first else "as it came"),
            "instances in flight": self.max_active_keys,
            "updates": f"after {self.min_update_frequency} gradients, their {self.combine}",
            "weights of a backward": f"today's; {self.backward}",
            "locks removed": ["forward", "backward", "update"],
        }

    def check(self, graph: NodeGraph) -> None:
        """Refuse nodes that are not in the graph, or have no weights.

        Raises:
            UserError: names the node and the nearest one.
        """
        known = [node.name for node in graph.of(PPT)]
        for option, given in (
            ("frequencies", self.frequencies), ("replicas", self.replicas), ("batches", self.batches)
        ):  # fmt: skip
            for name in given:
                if name not in known:
                    raise unknown(f"node in {option}:", name, known)

    def frequency(self, graph: NodeGraph, node: PPT) -> int:
        """Gradients that `node` adds up; a replica does as the node it stands for."""
        return self.frequencies.get(_original(graph, node), node.own_muf or self.min_update_frequency)

    def batch(self, graph: NodeGraph, node: PPT) -> int:
        """Waiting messages that `node` handles in one call; a replica does as the node it stands for."""
        return self.batches.get(_original(graph, node), 1)


def _original(graph: NodeGraph, node: PPT) -> str:
    return next((name for name, copies in graph.replicas.items() if node.name in copies), node.name)
