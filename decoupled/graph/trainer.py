"""GraphTrainer: trains a graph of nodes asynchronously on any runtime.

    method = {"name": "...", "max_active_keys": 8}
    with GraphTrainer(graph, method, optimizer=lambda p: torch.optim.Adam(p, 1e-3), workers=2) as trainer:
        trainer.fit(instances, epochs=10)
        print(trainer.evaluate(held_out))

    controller --instances--> worker 0 <--signals--> worker 1 ...    one actor per worker, edges both ways
              <---answers, results-----

Every epoch ends drained: all messages are answered, what gradients are left became updates, replicas are averaged.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch

from decoupled import registry
from decoupled.build import make_runtime
from decoupled.errors import StallError, UserError, unknown
from decoupled.graph.asynchrony import Asynchrony
from decoupled.graph.build import Input, NodeGraph
from decoupled.graph.controller import Controller
from decoupled.graph.instance import Instance
from decoupled.graph.placement import balance, by_hand, measure
from decoupled.graph.replicas import average, replicate
from decoupled.graph.statistics import NodeStatistics, WorkerStatistics, merged, of_node
from decoupled.graph.transform import PPT
from decoupled.graph.worker import CONTROLLER, GraphWorker
from decoupled.runtime.contract import Cost, Edge, Graph, Observer, Runtime, Timings
from decoupled.specs import positive
from decoupled.steps import MakeOptimizer, MakeScheduler

SAMPLE = 8  # instances that costs are measured on


class GraphTrainer:
    """Trains a graph.

    Args:
        graph: trained in place (with replicas, nodes are added to it).
        method: how far it runs ahead, and what updates are made of: a name, a mapping with name and options, or an
            `Asynchrony`.
        optimizer: parameters -> Optimizer, called once per parameterised node.
        scheduler: optimizer -> LRScheduler, ticks at the end of every epoch; or None.
        workers: how many, nodes balanced by measured cost; or node -> number of its worker.
        runtime: "threads", "simulated", "processes", a mapping with name and options, or a Runtime, which stays open.
        costs: on the simulated runtime, node -> seconds of a forward (a backward takes twice as long); default: 1 for
            parameterised nodes, 0 for others. Nodes that only steer take no time.
        observers: look on at operations and messages (traces).
        on_retire: called with the size of every instance that has come back.

    Raises:
        UserError: a graph that cannot work, or an impossible option.
    """

    def __init__(
        self,
        graph: NodeGraph,
        method: str | Mapping[str, Any] | Asynchrony | None = None,
        *,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None = None,
        workers: int | Mapping[str, int] = 2,
        runtime: str | Mapping[str, Any] | Runtime = "threads",
        costs: Mapping[str, float] | None = None,
        observers: Sequence[Observer] = (),
        on_retire: Callable[[int], None] | None = None,
    ) -> None:
        method = method or Asynchrony()
        self.asynchrony = method if isinstance(method, Asynchrony) else registry.make(method, Asynchrony)
        self.graph, self.epoch = graph.check(), 0
        self.asynchrony.check(graph)
        replicate(graph, self.asynchrony.replicas)
        self._observers, self._on_retire = observers, on_retire
        how = self.asynchrony
        for node in graph.of(PPT):
            muf, batch = how.frequency(graph, node), how.batch(graph, node)
            node.prepare(optimizer, muf, how.combine == "mean", how.backward, batch, scheduler)
        self._optimizer, self._scheduler = optimizer, scheduler
        count = workers if isinstance(workers, int) else max(workers.values(), default=0) + 1
        positive("graph", workers=count)
        self.places = {} if isinstance(workers, int) else by_hand(graph, workers)
        self._names = [f"worker{w}" for w in range(count)]
        self._owns_runtime, self._hosted = not isinstance(runtime, Runtime), False
        self.runtime = make_runtime(runtime, count, cost=costs_of(graph, costs))
        self._workers: list[GraphWorker] = []
        self._busy, self._wait = dict.fromkeys(self._names, 0.0), dict.fromkeys(self._names, 0.0)

    def fit(self, instances: Iterable[Instance], epochs: int = 1, shuffle: int | None = None) -> list[dict[str, Any]]:
        """Train.

        Args:
            instances: all of them once per epoch; iterated once per epoch.
            epochs: how often.
            shuffle: seed of their order, another one every epoch; None: as they are.

        Returns:
            One record per epoch: epoch, loss and score (means over the rows that the losses saw, during training),
            samples (sum of the instances' sizes), instances, seconds, samples_per_second.

        Raises:
            UserError: no instances, or epochs < 0.
            OperationError: a node failed, a loss is not finite, or the protocol was broken; names node, port and state.
            StallError: instances never came back; says where their messages are.
        """
        if not isinstance(epochs, Integral) or epochs < 0:
            raise UserError(f"epochs must be an integer of at least 0, got {epochs!r}")
        return [self._fit_epoch(instances, shuffle) for _ in range(epochs)]

    def evaluate(self, instances: Iterable[Instance]) -> dict[str, float]:
        """Mean loss and score per row, in evaluation mode; nothing comes back and nothing is remembered.

        Raises:
            UserError: no instances.
        """
        instances = self._host(instances, "evaluate")
        with self.runtime.call(self, "evaluate", ()):
            self._build()
            controller, _ = self._run(instances, training=False)
            return self.runtime.agree(controller.tally.means())

    def statistics(self) -> list[WorkerStatistics]:
        """One frozen record per worker, counted since the trainer was made."""
        nodes, records = self.nodes(), []
        for worker in self._workers:
            own = [node for node in nodes if node.worker == worker.name]
            records.append(
                WorkerStatistics(
                    worker.name, [node.node for node in own], self._busy[worker.name], self._wait[worker.name],
                    worker.bytes_forward, worker.bytes_backward, sum(node.peak_held_bytes for node in own),
                    sum(node.updates for node in own), merged([node.staleness for node in own]),
                )
            )  # fmt: skip
        return records

    def nodes(self) -> list[NodeStatistics]:
        """One frozen record per node, counted since the trainer was made."""
        return [of_node(node, w.name) for w in self._workers for node in w.nodes.values()]

    def close(self) -> None:
        """End the workers; the graph keeps its weights."""
        self.runtime.release(self)
        if self._owns_runtime:
            self.runtime.close()

    def __enter__(self) -> GraphTrainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- one epoch; with several processes, every one of them goes through this -----------------------------------

    def _fit_epoch(self, instances: Iterable[Instance], shuffle: int | None) -> dict[str, Any]:
        if shuffle is not None:
            given, random = list(instances), torch.Generator().manual_seed(shuffle * 10_007 + self.epoch)
            instances = [given[i] for i in torch.randperm(len(given), generator=random).tolist()]
        instances = self._host(instances, f"epoch {self.epoch + 1}")
        with self.runtime.call(self, "_fit_epoch", (), None):
            self._build()
            start = time.perf_counter()
            controller, timings = self._run(instances, training=True)
            self._meet()
            seconds = time.perf_counter() - start - timings.setup
            self.epoch += 1
            for name in self._names:
                self._busy[name] += timings.busy[name]
                self._wait[name] += timings.wait[name]
            tally = controller.tally
            record = {"epoch": self.epoch, **tally.means(), "samples": tally.examples, "instances": tally.instances}
            return self.runtime.agree(record | {"seconds": seconds, "samples_per_second": tally.examples / seconds})

    def _run(self, instances: Iterable[Instance], training: bool) -> tuple[Controller, Timings]:
        how = self.asynchrony
        limit = how.max_active_keys * how.messages_per_instance
        controller = Controller(
            self.graph, self._actors, self._names, iter(instances), how.max_active_keys, training,
            how.backward_first, limit, self._on_retire if training else None,
        )  # fmt: skip
        edges = wiring(self._workers, self.graph, self._actors, limit, how.backward_first)
        for worker in self._workers:
            worker.begin(training, limit, {edge.port for edge in edges if edge.target == worker.name})
        try:
            observers = self._observers if training else ()
            return controller, self.runtime.run(Graph([controller, *self._workers], edges), observers)
        except StallError as error:
            raise StallError(self._lost(controller)) from error

    def _lost(self, controller: Controller) -> str:
        """Where the messages of instances are that do not come back."""
        here = {n: node for n, node in self.graph.nodes.items() if self.runtime.owns(self._actors[n])}
        left = [f"node {n!r}, input {port}: {s} waits for the rest" for n, x in here.items() for port, s in x.waiting()]
        left = left or [f"node {n!r}, {what}" for n, node in here.items() for what in node.open()]
        keys, where = (
            ", ".join(map(str, controller.active)) or "unknown",
            "; ".join(left[:12]) or "no node of this process",
        )
        return (
            f"instances that never retire: {keys}; their messages are at {where}; correct the graph, or the instances' "
            "`losses`, if that is not how many times a loss is reached"
        )

    def _meet(self) -> None:
        """Every process gets the weights and counts of all nodes; replicas get their mean."""
        for worker in self._workers:
            if len(set(self.runtime.places.values())) > 1:
                state = self.runtime.agree(worker.snapshot(), of=worker.name)
                if not self.runtime.owns(worker.name):
                    worker.restore(state)
        for names in self.graph.replicas.values():
            modules = [node.module for node in self.graph.of(PPT) if node.name in names]
            mean = average([module.state_dict() for module in modules])
            for module in modules:
                module.load_state_dict(mean)

    def _host(self, instances: Iterable[Instance], when: str) -> Iterable[Instance]:
        """The leader's part before a call: place the nodes, and let other processes have a trainer like this one."""
        if self.runtime.rank == 0:
            rest = iter(instances)
            sample = list(itertools.islice(rest, SAMPLE))
            if not sample:
                raise UserError(
                    f"{when} has no instances: there are none, or an iterator that was used up; pass a list"
                )
            if not self.places:
                measured = measure(self.graph, sample, limit=SAMPLE * self.asynchrony.messages_per_instance)
                self.places = balance(self.graph, measured, len(self._names))
            instances = itertools.chain(sample, rest)
        if not self._hosted:
            self._hosted = True
            graph, how, places = self.graph, self.asynchrony, self.places
            steps: dict[str, Any] = {"optimizer": self._optimizer, "scheduler": self._scheduler}
            self.runtime.host(self, lambda runtime: GraphTrainer(graph, how, **steps, workers=places, runtime=runtime))
        return instances

    def _build(self) -> None:
        if self._workers:
            return
        self.places = self.runtime.agree(self.places)
        self.runtime.place(self._names)
        self._actors = {n: f"worker{w}" for n, w in self.places.items()}
        self._actors |= {node.name: CONTROLLER for node in self.graph.of(Input)}
        how = self.asynchrony
        self._workers = [GraphWorker(n, self.graph, self._actors, how.backward_first, how.name) for n in self._names]


def wiring(
    workers: Sequence[GraphWorker], graph: NodeGraph, actors: Mapping[str, str], capacity: int, backward_first: bool
) -> list[Edge]:
    """The edges that signals take. Nobody ever waits for room: what is under way is bounded by the active instances."""
    back = "backward" if backward_first else "forward"
    ways = {(CONTROLLER, worker.name, "forward") for worker in workers}  # the end of the epoch is told to all
    for source, _, target, _ in graph.edges():
        a, b = actors[source], actors[target]
        if a != b:
            ways |= {(a, b, "forward"), (b, a, back)}
    ways |= {(actors[loss], CONTROLLER, back) for loss, node in graph.nodes.items() if node.kind == "loss"}
    return [Edge(source, f"{target}.{port}", target, port, capacity) for source, target, port in sorted(ways)]


def costs_of(graph: NodeGraph, costs: Mapping[str, float] | None) -> Cost:
    """The virtual duration of an operation: that of its node, twice that on the way back.

    Raises:
        UserError: a node that is not there, or one that only steers and so takes no time.
    """
    seconds = costs if costs is not None else {node.name: 1.0 for node in graph.of(PPT)}
    working = [name for name, node in graph.nodes.items() if not node.steers]
    for name in seconds:
        if name not in working:
            raise unknown("node in costs:", name, working)

    def cost(actor: str, operation: str) -> float:
        kind, node, _ = operation.split(" ", 2)
        return seconds.get(node, 0.0) * (2.0 if kind == "B" else 1.0)

    return cost
