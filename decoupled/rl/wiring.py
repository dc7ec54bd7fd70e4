"""The edges between the roles, and what their operations cost on a virtual clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from decoupled.messages import Message
from decoupled.rl.memory import UNANSWERED
from decoupled.rl.roles import Roles
from decoupled.runtime.contract import Actor, Cost, Edge, Outcome, Want


class Elsewhere(Actor):
    """Stands for an actor that lives in another process, or takes no part in a run."""

    def __init__(self, name: str, beside: str | None = None) -> None:
        self.name, self.beside = name, beside

    def wants(self) -> Sequence[Want]:
        return ()

    def handle(self, want: Want, messages: tuple[Message, ...]) -> Outcome:
        raise AssertionError(f"{self.name} is not here")


def joined(names: Sequence[str], roles: Roles) -> list[Edge]:
    """The edges; `names`: the learner's, then the actors'. One loop has none."""
    learner, *actors = names
    if not actors:
        return []
    edges = [
        Edge("replay", "drawn", learner, "drawn", roles.ahead + 1),  # and the end
        Edge(learner, "judged", "replay", "judged", roles.ahead),
    ]
    for name in actors:
        edges += [
            Edge("replay", f"go.{name}", name, "go", UNANSWERED),
            Edge(name, "experience", "replay", "experience", UNANSWERED),
            Edge(learner, "weights", name, "weights", 2),
        ]
    return edges


def costs_of(costs: Mapping[str, float] | None, roles: Roles) -> Cost:
    """The virtual duration of an operation."""
    seconds = {"act": 1.0, "update": 1.0, "auxiliary": 1.0} | dict(costs or {})
    steps = roles.envs * (roles.chunk if roles.actors else 1)
    by_kind = {"E": seconds["act"] * steps, "S": seconds["update"], "P": seconds["auxiliary"]}

    def cost(actor: str, operation: str) -> float:
        return by_kind.get(operation[0], 0.0)

    return cost
