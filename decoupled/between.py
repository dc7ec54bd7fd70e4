"""What a trainer puts between its source and its blocks for a method that selects samples, and how it is wired.

    source --data--> selector --batch--> feeder --data--> blocks
                      |  ^  ^---served-----'
                      |  |-------losses------ relay <--losses-- top block     (the edge to the relay drops the oldest)
                      |  '-------losses------------------------ top block     (with a lag: nothing is dropped)
                      '--probe--> block 0 --probe--> ... top block --scores--> selector

The relay stands beside the top block, so that what is dropped is dropped there and the block never waits. A probe is a
forward in evaluation mode, without a graph; block k carries it out just before it begins the pass that is chosen next,
so that the weights it meets are as old as those of a forward, on every runtime.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from decoupled.coupling import Loss
from decoupled.errors import UserError
from decoupled.evaluation import evaluating
from decoupled.messages import Data, End, Losses, Message, Probe
from decoupled.method import Method
from decoupled.runtime.contract import Actor, Edge, Outcome, Want
from decoupled.sample_losses import each, mass
from decoupled.selector import Selector
from decoupled.source import Addressed, Reader, Whole
from decoupled.worker import Worker

CANDIDATES = Reader("selector", inputs=True, targets=True)
AHEAD = 2  # batches of candidates that may wait


class Feeder(Actor):
    """Turns chosen batches into passes, and tells the selector when it is through with one."""

    name, beside = "feeder", "selector"

    def __init__(self, feed: Whole, loss: Loss) -> None:
        self._feed, self._mass = feed, partial(mass, loss)

    def begin(self, key: int, batch: int, readers: Sequence[Reader]) -> None:
        """Get ready for a run whose first pass has number `key`."""
        self._addressed, self.batch = Addressed(readers, key), batch
        self._passes: Iterator[Data] | None = None
        self._over = False

    @property
    def key(self) -> int:
        """Of the next pass."""
        return self._addressed.key

    def wants(self) -> Sequence[Want]:
        if self._over:
            return ()
        return (Want(("batch",)),) if self._passes is None else (Want(),)

    def handle(self, want: Want, messages: tuple[Message, ...]) -> Outcome:
        if messages and isinstance(messages[0], Data):
            self._passes, self.batch = self._feed.passes(messages[0], self._mass), messages[0].batch + 1
            return Outcome()
        if messages:
            self._over = True
            return Outcome(None, self._addressed.end())
        assert self._passes is not None
        data = next(self._passes, None)
        if data is not None:
            return Outcome(None, self._addressed.sends(data))
        self._passes = None
        return Outcome(None, [("served", Message(self.batch))])


class Relay(Actor):
    """Passes losses on."""

    name = "relay"

    def __init__(self, beside: str) -> None:
        self.beside, self._over = beside, False

    def wants(self) -> Sequence[Want]:
        return () if self._over else (Want(("losses",)),)

    def handle(self, want: Want, messages: tuple[Message, ...]) -> Outcome:
        self._over = isinstance(messages[0], End)
        return Outcome(None, [("losses", messages[0])])


class Probed(Actor):
    """A block's worker that also carries out probes; `loss` is the user's."""

    def __init__(self, worker: Worker, loss: Loss) -> None:
        self.name, self.device, self.beside = worker.name, worker.device, worker.beside
        self._worker, self._loss = worker, loss

    def wants(self) -> Sequence[Want]:
        wants = self._worker.wants()
        return [*(Want(("probe",), want.key) for want in wants if want.tag.kind in "EF"), *wants]

    def handle(self, want: Want, messages: tuple[Message, ...]) -> Outcome:
        if want.ports != ("probe",):
            return self._worker.handle(want, messages)
        (probe,), worker = messages, self._worker
        assert isinstance(probe, Probe)
        with evaluating([worker.block.module]):
            y = worker.block.infer(probe.x.to(worker.device))
        if worker.k < worker.K - 1:
            return Outcome(f"P{probe.key}", [("probe", replace(probe, x=y))])
        losses = each(self._loss, y, probe.targets.to(y.device)).float().cpu()
        scores = Losses(probe.key, batch=probe.batch, indices=probe.indices, losses=losses)
        return Outcome(f"P{probe.key}", [("scores", scores)])


class Between:
    """The actors of one trainer's selection.

    Args:
        method: that selects. workers: of its blocks. inputs: some, for shape and type.
        loss: the user's. seed: the trainer's.

    Raises:
        UserError: samples get weights, and a block with an objective does not hear of them; or losses are wanted from
            blocks that drop batches.
    """

    def __init__(self, method: Method, workers: Sequence[Worker], inputs: Tensor, loss: Loss, seed: int) -> None:
        assert method.selection is not None
        self._method, self._workers, self._loss, self._selection = method, workers, loss, method.selection
        deaf = [w.name for w in workers if w.lower.has_objective and not w.lower.needs_data]
        if self._selection.weighs and deaf:
            raise UserError(
                f"method {method.name!r} weighs samples, and {deaf[0]} gets no data of its own; use another boss"
            )
        if (self._selection.lag is not None or self._selection.scores) and method.coupling.lossy:
            raise UserError(
                f"method {method.name!r} needs the losses of batches, and blocks of its boss drop some of them or take "
                "them again; use another boss"
            )
        self._flight = self._selection.ready + method.facts.in_flight(0, len(workers)) + 2 * len(workers)
        chooser = self._selection.chooser(inputs, workers[-1].place.shapes[-1], seed)
        count = method.feed.count
        chosen = self._selection
        ahead = max(chosen.packets, (chosen.lag or 0) + chosen.pool)  # with a lag all losses are waited for
        self.selector = Selector(chosen, chooser, count, self._flight + ahead + 3)
        self.feeder = Feeder(method.feed, loss)

    def begin(self, epoch: int, key: int, batch: int, readers: Sequence[Reader]) -> None:
        """Get ready for an epoch whose first pass has number `key`."""
        self.selector.begin(epoch, key, batch)
        self.feeder.begin(key, batch, readers)

    def actors(self) -> list[Actor]:
        """All actors behind the source, the blocks' among them."""
        blocks = [Probed(w, self._loss) if self._selection.scores else w for w in self._workers]
        relay = [Relay(self._workers[-1].name)] if self._selection.lag == 0 else []
        return [self.selector, self.feeder, *relay, *blocks]

    def edges(self) -> list[Edge]:
        """All edges but those from the feeder to the blocks and between blocks."""
        chosen, names = self._selection, [worker.name for worker in self._workers]
        top, passes = names[-1], self._method.feed.count
        edges = [
            Edge("source", CANDIDATES.name, "selector", "data", AHEAD),
            Edge("selector", "batch", "feeder", "batch", chosen.ready + 1),
            Edge("feeder", "served", "selector", "served", chosen.ready + 1),
        ]
        if chosen.lag == 0:
            edges.append(Edge(top, "losses", "relay", "losses", chosen.packets, drops=True))
            edges.append(Edge("relay", "losses", "selector", "losses", 1))
        elif chosen.lag:
            edges.append(Edge(top, "losses", "selector", "losses", (chosen.lag + chosen.pool) * passes + 1))
        if chosen.scores:
            for below, above in zip(["selector", *names], names, strict=False):
                edges.append(Edge(below, "probe", above, "probe", 1))
            edges.append(Edge(top, "scores", "selector", "scores", 1))
        return edges
