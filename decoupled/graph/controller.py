"""The controller: pumps instances into a graph, `max_active_keys` at a time, and retires those that have come back.

pump      active < max_active_keys: all messages of the next instance go to the inputs
retire    every message of an instance has been answered, and its losses have been reached
          (validation: the losses have been reached)
drain     no more instances and none active: every worker is told to end
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from decoupled.errors import OperationError
from decoupled.graph.build import Input, NodeGraph
from decoupled.graph.instance import Instance
from decoupled.graph.message import Found, Signal
from decoupled.graph.node import Forward, Key
from decoupled.graph.worker import CONTROLLER, addresses
from decoupled.messages import End, Message
from decoupled.runtime.contract import Actor, Outcome, Want


@dataclass
class Tally:
    """Sums over what the losses found: `score` and `loss` are of `samples` rows, `examples` of `instances`."""

    loss: float = 0.0
    score: float = 0.0
    samples: int = 0
    instances: int = 0
    examples: int = 0

    def means(self) -> dict[str, float]:
        """loss and score per row."""
        rows = max(1, self.samples)
        return {"loss": self.loss / rows, "score": self.score / rows}


class Controller(Actor):
    """The actor outside the graph.

    Args:
        graph: checked. places: node -> actor. workers: their names.
        instances: what to pump, in this order.
        max_active_keys: instances in the graph at once.
        training: with the way back.
        backward_first: see `GraphWorker`. limit: see `GraphWorker.begin`.
        on_retire: called with the size of every instance that has retired.

    Attributes:
        tally: of the results so far.
        active: number of an instance -> [answers, losses] still to come.
    """

    name, in_caller = CONTROLLER, True

    def __init__(
        self,
        graph: NodeGraph,
        places: Mapping[str, str],
        workers: Sequence[str],
        instances: Iterator[Instance],
        max_active_keys: int,
        training: bool = True,
        backward_first: bool = True,
        limit: int = 1 << 30,
        on_retire: Callable[[int], None] | None = None,
    ) -> None:
        self._graph, self._inputs = graph, {node.name: node for node in graph.of(Input)}
        self._successors, _ = addresses(graph, places)
        self._workers, self._instances, self._most = workers, instances, max_active_keys
        self._training, self._on_retire = training, on_retire
        ports = ("backward", "forward") if backward_first else ("forward",)
        self._mail = tuple(Want((port,)) for port in ports[:1])
        self._number, self._more, self._ended = 0, True, False
        self._sizes: dict[int, int] = {}
        self.active: dict[int, list[int]] = {}
        self.tally = Tally()
        for node in self._inputs.values():
            node.limit = limit
            node.begin(training)

    def wants(self) -> Sequence[Want]:
        if self._more and len(self.active) < self._most:
            return (*self._mail, Want())
        if self.active:
            return self._mail
        return () if self._ended else (Want(),)

    def handle(self, want: Want, messages: tuple[Message, ...]) -> Outcome:
        if not messages:
            return self._pump() if self._more else self._end()
        message = messages[0]
        if isinstance(message, Found):
            tally = self.tally
            tally.loss += message.loss * message.samples
            tally.score += message.score
            tally.samples += message.samples
            number, what = message.key[0], 1  # type: ignore[index]
        else:
            assert isinstance(message, Signal)
            self._inputs[message.node].take_backward(0, message.state, None)
            number, what = message.state[0], 0
        left = self.active[number]
        left[what] -= 1
        if left == [0, 0]:
            self._retire(number)
        return Outcome()

    def _pump(self) -> Outcome:
        instance = next(self._instances, None)
        if instance is None:
            self._more = False
            return Outcome()
        key = Key(self._number, instance.about)
        self._number += 1
        self._sizes[key] = instance.size
        self.active[key] = [len(instance.messages) if self._training else 0, instance.losses]
        sends: list[tuple[str, Message]] = []
        for name, position, payload in instance.messages:
            node = self._inputs.get(name) or self._graph.entrance(name)
            state = (key, *position)
            try:
                node.check_sends([Forward(0, state, payload)])
            except Exception as error:
                raise OperationError(self.name, f"pumping instance {key}", error) from error
            target, port, place = self._successors[name][0]
            sends.append((f"{place}.forward", Signal(state, False, target.name, port, payload, key.about, 0)))
        return Outcome(None, sends)

    def _retire(self, number: int) -> None:
        del self.active[number]
        size = self._sizes.pop(number)
        self.tally.instances += 1
        self.tally.examples += size
        if self._on_retire is not None:
            self._on_retire(size)

    def _end(self) -> Outcome:
        self._ended = True
        return Outcome(None, [(f"{worker}.forward", End(self._number)) for worker in self._workers])
