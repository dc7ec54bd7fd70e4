"""Nodes: what a static graph is made of, and the protocol between them.

    forward(port, state, payload)     a message came in on an input  -> what to send
    backward(port, state, gradient)   the answer to a message sent on an output came back  -> what to send

A state is a tuple `(instance, ...)` that says which instance a message belongs to and where in the instance's own
control flow it is: `(i, t)` in a loop, `(i, node)` in a tree. Everything a node remembers is keyed by it.

The protocol, checked at every message: a node never has two unanswered messages with one state on one output, and
every forward message is answered exactly once, with the same state on the same output. An answer is the gradient of
the payload, or None where there is none (class numbers, targets).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from decoupled.errors import ProtocolError, StallError

if TYPE_CHECKING:
    from decoupled.graph.build import NodeGraph, Wire

State = tuple[Any, ...]
StateFunction = Callable[..., Any]  # called with the elements of a state: lambda i, t: ...


class Key(int):
    """The number of an instance, with what state functions need to know `about` it (a tree, the edges of a graph).

    Two keys are equal if their numbers are. `about` is None, a bool, int, float or str, or a tuple of such.
    """

    about: Any

    def __new__(cls, number: int, about: Any = None) -> Key:
        key = super().__new__(cls, number)
        key.about = about
        return key


class Forward(NamedTuple):
    """To be sent on output `port`."""

    port: int
    state: State
    payload: Tensor


class Backward(NamedTuple):
    """To be sent back on input `port`: the answer to the message that came in there with this state."""

    port: int
    state: State
    gradient: Tensor | None


class Result(NamedTuple):
    """What a loss node found: loss is a mean over `samples` rows, score a sum over them (NaN: nothing is scored)."""

    state: State
    loss: float
    score: float
    samples: int


Sends = Sequence[Forward | Backward | Result]


class Node(ABC):
    """One node of the graph.

    Args:
        name: in errors, drawings and statistics; None: made of the kind.

    Attributes:
        inputs, outputs: how many ports it has; known once it is connected.
        peak: most states remembered at once. visits: messages and answers handled in training.
        version: number of updates of its weights.
        limit: unanswered messages on one output that are taken for a loop that never ends.
    """

    kind = "node"
    changes_state = False  # what leaves has another state than what came in
    steers = True  # does no work worth queueing for: handles a message in the operation that brings it
    inputs = outputs = 1
    batch = 1  # waiting messages that it may be given together, see `PPT.take_many`
    graph: NodeGraph | None = None  # once connected

    def __init__(self, name: str | None = None) -> None:
        self.name = name or ""
        self.training = True
        self.peak = self.visits = self.version = 0
        self.limit: float = float("inf")
        self._unanswered: list[set[State]] = []

    def __call__(self, *wires: Wire) -> Any:
        """Connect the inputs to these wires; returns the wire of the output, or a tuple of wires if there are more."""
        from decoupled.graph.build import connect

        return connect(self, wires)

    @abstractmethod
    def forward(self, port: int, state: State, payload: Tensor) -> Sends:
        """What to send for a message that came in; in evaluation mode nothing is remembered for later."""

    @abstractmethod
    def backward(self, port: int, state: State, gradient: Tensor | None) -> Sends:
        """What to send for an answer that came back."""

    def remembered(self) -> Sequence[tuple[int, State]]:
        """What is left of unfinished messages: (input port, state). Empty between epochs."""
        return ()

    def waiting(self) -> Sequence[tuple[int, State]]:
        """Those of them that wait here for others to come: (input port, state)."""
        return ()

    def forget(self) -> None:  # noqa: B027 - many nodes remember nothing
        """Drop everything that belongs to unfinished messages."""

    def snapshot(self) -> dict[str, Any]:
        """Its counts, and weights if it has any."""
        return {"peak": self.peak, "visits": self.visits, "version": self.version}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a snapshot."""
        for name, value in state.items():
            setattr(self, name, value)

    # --- what runs the node calls these --------------------------------------------------------------------------

    def begin(self, training: bool) -> None:
        """Get ready for an epoch; what a broken one has left is forgotten."""
        self.training = training
        self._unanswered = [set() for _ in range(self.outputs)]
        self.forget()

    def take_forward(self, port: int, state: State, payload: Tensor) -> Sends:
        """`forward`, with what leaves checked."""
        self.visits += self.training
        return self.check_sends(self.forward(port, state, payload))

    def take_backward(self, port: int, state: State, gradient: Tensor | None) -> Sends:
        """`backward`, with what came in and what leaves checked."""
        self.visits += self.training
        self.check_answer(port, state)
        return self.check_sends(self.backward(port, state, gradient))

    def open(self) -> list[str]:
        """What keeps this node from having finished, in words; empty between epochs."""
        sent = [f"output {port} waits for the answer to {s}" for port, all in enumerate(self._unanswered) for s in all]
        return sent + [f"input {port} holds {state}" for port, state in self.remembered()]

    def check_answer(self, port: int, state: State) -> None:
        """An answer came back: somebody must have waited for it."""
        try:
            self._unanswered[port].remove(state)
        except KeyError:
            raise ProtocolError(
                f"node {self.name!r}, output {port}: an answer with state {state} came back, but no message with that "
                "state is unanswered there; every message is answered once, with the state it was sent with"
            ) from None

    def check_sends(self, sends: Sends) -> Sends:
        """`sends`, once it is known that they keep to the protocol."""
        if self.training:
            for send in sends:
                if type(send) is Forward:
                    unanswered = self._unanswered[send.port]
                    if send.state in unanswered:
                        raise twice(self, f"output {send.port}", send.state)
                    unanswered.add(send.state)
                    if len(unanswered) > self.limit:
                        raise StallError(
                            f"node {self.name!r}, output {send.port}: {len(unanswered)} messages are unanswered, the "
                            f"latest with state {send.state}; an instance never retires: a loop does not end, or "
                            "messages_per_instance is too small"
                        )
        return sends


def twice(node: Node, where: str, state: State) -> ProtocolError:
    """The error for two messages with one key."""
    return ProtocolError(
        f"node {node.name!r}, {where}: a second message with state {state}, and the first has not been answered; "
        "a state must tell apart the instance and every visit of a node (count the rounds of a loop with Isu)"
    )
