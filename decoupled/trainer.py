"""Trainer: what a user calls from Python. It cuts the model, builds the workers, and runs epochs on a runtime.

    with decoupled.Trainer(model, method="pipedream", blocks=2, loss=F.cross_entropy,
                           optimizer=lambda params: torch.optim.SGD(params, lr=0.1)) as trainer:
        trainer.fit(loader, epochs=10)
        print(trainer.evaluate(test_loader))

Every epoch ends drained: all passes are answered, nothing is in flight, and the state can be saved.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from decoupled import registry
from decoupled.between import CANDIDATES, Between
from decoupled.build import Model, Recipe, assemble, chain, cut, decision, make_devices, make_runtime, wiring
from decoupled.checkpoint import check, load_worker_states, rng_state, set_rng_state
from decoupled.coupling import Loss
from decoupled.errors import PeerLost, UserError
from decoupled.evaluation import evaluate, evaluate_blocks, frozen, train_unless_mixed, update_blocks, update_bn
from decoupled.method import Method
from decoupled.runtime.contract import Actor, Graph, Observer, Runtime
from decoupled.selection import SelectionStatistics
from decoupled.selector import Selector
from decoupled.source import Source, Whole, peek
from decoupled.spread import (
    Prints,
    agree,
    answer,
    bring_home,
    described,
    fingerprints,
    follower,
    join,
    news,
    owned,
    take,
)
from decoupled.statistics import BlockStatistics
from decoupled.steps import MakeOptimizer, MakeScheduler
from decoupled.worker import Worker


class Trainer:
    """Trains a network cut into blocks with a decoupled method.

    Args:
        model: nn.Sequential, or a list of nn.Module, one per block (then `blocks` is None). Trained in place; with
            processes it has the trained weights after `close`, and `trainer.model` before. Modules in evaluation mode
            stay in it (frozen BatchNorm), unless all are.
        method: a name, or a mapping with ``name`` and options, e.g. ``{"name": "overlapping_local", "reach": 2}``.
        blocks: number of blocks (balanced by measured time on the first batch; pass `trainer.cuts` to repeat a run
            exactly), or a list of cut indices.
        loss: (output, target) -> scalar, mean over the batch. Micro-batches count what a cross entropy divides by, with
            other losses their samples.
        optimizer: parameters -> Optimizer; called once for every block and every coupling half with parameters.
        scheduler: optimizer -> LRScheduler, ticks once per optimizer step of its own block; or None.
        runtime: "threads", "simulated", "processes" (one per block, or what torchrun has started), a mapping with
            ``name`` and options, e.g. ``{"name": "processes", "processes": 2, "heartbeat": 30.0}``, or a Runtime, which
            stays open. With processes every rank makes the same calls, and rank 0 holds the data and the results.
        devices: one per block in turn; default: all visible GPUs, else the CPU.
        seed: of everything the library draws: auxiliary heads, dropout.
        on_nonfinite: a NaN or infinite loss stops the run ("stop") or drops the batch ("skip"; the running statistics
            of BatchNorm have seen its inputs all the same).
        precision: "float32", "bf16" or "fp16" (autocast; fp16 with a dynamic loss scale, or a mapping with its options,
            see `decoupled.scaling.Precision`); one for all blocks, or one per block.
        observers: look on at operations and messages (traces).
        on_batch: called with the number of samples after every minibatch fed (progress bars).

    Raises:
        UserError: unknown method, option or runtime, or a model that cannot be cut as asked.

    Sources: the methods' cards name their papers (`decoupled.card(name)`).

    Example:
        >>> layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)]
        >>> batches = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(4)]
        >>> given = {"loss": nn.functional.cross_entropy, "optimizer": torch.optim.SGD}
        >>> with Trainer(nn.Sequential(*layers), "pipedream", blocks=2, **given) as trainer:
        ...     history = trainer.fit(batches, epochs=2)
        >>> len(history), [block.updates for block in trainer.statistics()]
        (2, [8, 8])
    """

    def __init__(
        self,
        model: Model,
        method: str | Mapping[str, Any] | Method,
        blocks: int | Sequence[int] | None = None,
        *,
        loss: Loss,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None = None,
        runtime: str | Mapping[str, Any] | Runtime = "threads",
        devices: Sequence[Any] | None = None,
        seed: int = 0,
        on_nonfinite: str = "stop",
        precision: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] = "float32",
        observers: Sequence[Observer] = (),
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        point = method if isinstance(method, Method) else registry.make(method)
        self._recipe = Recipe(point, loss, optimizer, scheduler, make_devices(devices), seed, on_nonfinite, precision)
        if isinstance(model, nn.Sequential) and (model._forward_hooks or model._forward_pre_hooks):
            warnings.warn("hooks of the model as a whole are not called; register them at its layers", stacklevel=2)
        self._given, self._blocks = model, blocks
        self._observers, self._on_batch = observers, on_batch
        units, self._cuts = cut(model, blocks, point)  # wrong input is refused now; timed again on the first batch
        self._units, self._frozen = units, frozen(units)
        others = int(point.selection is not None)
        self._runtime = make_runtime(runtime, len(self._cuts) + 1, others)
        self._owns_runtime = not isinstance(runtime, Runtime)
        self._workers: list[Worker] = []
        self._between: Between | None = None  # for methods that select samples
        self._sample: tuple[tuple[int, ...], str] | None = None
        self._first: Tensor | None = None  # some inputs of the present epoch
        self._output: tuple[int, ...] | None = None
        self._resume_rng: dict[str, Any] | None = None
        self._epoch = self._batch = self._key = 0
        self._final: list[BlockStatistics] | None = None  # once the other processes have ended
        self._closed = self._hosted = False
        self._behind = self._newer = False  # other processes have blocks; with newer weights
        self._failed = False  # the user has heard of it
        self._handed: Prints = {}  # copies of blocks elsewhere, as `model` gave them to the user

    @property
    def method(self) -> Method:
        """The point of the grid that is trained with."""
        return self._recipe.method

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self._epoch

    @property
    def cuts(self) -> list[int]:
        """Index of the first unit of every block but the first (final once `fit` has seen a batch)."""
        return list(self._cuts)

    @property
    def model(self) -> nn.Sequential:
        """The forward network with the trained weights and the names of the given one, without auxiliary heads.

        Weights changed in it (back to a better epoch's) go to the processes of their blocks before the next call.
        """
        if self._newer and not self._closed:
            for worker, state in zip(self._workers, self._everywhere("module"), strict=True):
                worker.block.module.load_state_dict(state)
            self._newer, self._handed = False, {}
        if self._workers and not self._closed and self._runtime.rank == 0:
            self._hand_on()
            self._handed = fingerprints(self._workers, self._runtime)
        units = self._network()
        names = list(self._given._modules) if isinstance(self._given, nn.Sequential) else []
        if len(names) != len(units):  # there are layers of the method's, or units within units
            return nn.Sequential(*units)
        return nn.Sequential(OrderedDict(zip(names, units, strict=True)))

    @property
    def runtime(self) -> Runtime:
        """What it runs on: see its `rank`, `places` and `startup_seconds`."""
        return self._runtime

    @property
    def workers(self) -> Sequence[Worker]:
        """The workers, once `fit` has seen a batch (for inspection; those of other processes are as they were made)."""
        return tuple(self._workers)

    def fit(self, batches: Iterable[Any], epochs: int = 1) -> list[dict[str, float]]:
        """Train.

        Args:
            batches: iterable of (inputs, targets) or (inputs, targets, indices), iterated once per epoch; a
                `set_epoch(epoch)` method is called before each epoch, then a `set_draw(epoch)` method with the epoch
                whose random augmentation the method repeats (see `decoupled.data.Loader`).
            epochs: how often.

        Returns:
            One record per epoch: epoch, loss (mean objective of the last block on what it was given: the training loss
            of the network, or for auxiliary variables the loss on the variable), samples, seconds, samples_per_second.

        Raises:
            UserError: no batches, or batches of a wrong form, or epochs < 0.
            OperationError: an operation failed; names block, batch and operation.
        """
        self._check_open()
        if not isinstance(epochs, Integral) or epochs < 0:
            raise UserError(f"epochs must be an integer of at least 0, got {epochs!r}")
        return [self._run_epoch(batches) for _ in range(epochs)]

    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]:
        """Mean loss and accuracy of the forward network in evaluation mode.

        Blocks are taken as they are: after a broken epoch they may have made different numbers of updates.

        Returns:
            ``{"loss": ..., "accuracy": ...}``; see `decoupled.evaluation.evaluate`.
        """
        if not self._workers or self._closed:
            return evaluate(self._network(), batches, self._recipe.loss)
        self._hand_on()
        blocks = [worker.block for worker in self._workers]
        with self._runtime.call(self, "evaluate", ()):
            return evaluate_blocks(blocks, batches, self._recipe.loss, self._runtime, self._output)

    def update_bn(self, batches: Iterable[Any]) -> None:
        """Estimate the running statistics of BatchNorm again: means over what the forward network makes of `batches`.

        Needed before a test where `method.coupling.substitutes`: there blocks were trained on other inputs than those
        that the network gives them. As `torch.optim.swa_utils.update_bn`, but with dropout off, and where blocks live.

        Raises:
            UserError: no batches. OperationError: a block failed; the former statistics are kept.
        """
        here = not self._workers or self._closed
        if here or self._runtime.rank == 0:
            _, batches = peek(batches, "update_bn")
        if here:
            return update_bn(self._network(), batches)
        self._hand_on()
        with self._runtime.call(self, "update_bn", ()):
            self._behind = self._newer = len(owned(self._workers, self._runtime)) < len(self._workers)
            update_blocks([worker.block for worker in self._workers], batches, self._runtime)

    def statistics(self) -> list[BlockStatistics]:
        """One frozen record per block, counted since the trainer was made."""
        return self._final if self._final is not None else self._everywhere("statistics")

    def selected(self) -> SelectionStatistics | None:
        """What stood between the data and the blocks has counted; None: nothing did, or nothing has been trained."""
        return None if self._between is None else self._between.selector.statistics()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit from here (a drained point); tensors and plain values only.

        Raises:
            UserError: nothing has been trained or loaded yet.
        """
        if not self._workers or self._sample is None:
            raise UserError("there is no state yet: call fit (or load_state_dict) first")
        self._hand_on()
        state = {
            "format": 1,
            "method": self.method.name,
            "cuts": self.cuts,
            "sample": {"shape": list(self._sample[0]), "dtype": self._sample[1]},
            "position": {"epoch": self._epoch, "batch": self._batch, "key": self._key},
            "seed": self._recipe.seed,
            "rng": self._resume_rng or rng_state(),
            "blocks": self._everywhere("state"),
            "selection": {} if self._between is None else self._between.selector.state_dict(),
        }
        return copy.deepcopy(state)  # training on must not change what was saved

    def load_state_dict(
        self, state: Mapping[str, Any] | None, *, other_method: bool = False, missing_ok: bool = False
    ) -> None:
        """Continue from `state` (rank 0's counts) and seed; build the model, method and optimizers as they were.

        Args:
            state: what `state_dict` returned.
            other_method: it may be of another method (a warm-up): blocks go on with their weights, random numbers,
                optimizers and schedulers; corrections, heads and stored variables are new.
            missing_ok: with None for a state the trainer stays as it is.

        Raises:
            UserError: the state is of another method or number of blocks, or the processes of its blocks have ended.
        """
        if self._behind:  # else a closed trainer has all that it needs
            self._check_open()
        if self._runtime.rank == 0 and not (missing_ok and state is None):
            measured = isinstance(self._blocks, int)
            check(state or {}, None if other_method else self.method.name, self._cuts, measured)
        self._host()
        with self._runtime.call(self, "load_state_dict", None):
            state, other_method = self._runtime.agree((state, other_method))
            if state is None:
                return
            shape, dtype = state["sample"]["shape"], getattr(torch, state["sample"]["dtype"])
            self._cuts, self._resume_rng, self._handed = list(state["cuts"]), dict(state["rng"]), {}
            if not other_method:
                self._recipe = replace(self._recipe, seed=state.get("seed", self._recipe.seed))
            self._build(torch.zeros(2, *shape, dtype=dtype))
            load_worker_states(self._workers, copy.deepcopy(state["blocks"]), other_method)
            if self._between is not None and not other_method:
                self._between.selector.load_state_dict(copy.deepcopy(state["selection"]))
            self._epoch, self._batch, self._key = (state["position"][name] for name in ("epoch", "batch", "key"))
            self._runtime.agree(None)  # all have it

    def close(self) -> None:
        """End the workers; the trained model stays usable.

        Raises:
            PeerLost: a process has ended since the last call, and the weights of its blocks with it.
        """
        if not self._runtime.mine:  # in a fork of the process that the workers belong to
            return
        try:
            if not self._closed and self._behind and self._runtime.rank == 0:
                if not self._newer:
                    self._hand_on()
                self._final = self._everywhere("statistics")
                bring_home(self._workers, self._runtime, self._everywhere("state"))
                self._newer = False
        except Exception:
            if not self._failed:
                raise
        finally:
            self._handed = {}
            if not self._closed:
                self._closed = True
                self._runtime.release(self)
            if self._owns_runtime:
                self._runtime.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._failed = True
            self._runtime.give_up(self, error)
        self.close()

    def _run_epoch(self, batches: Iterable[Any]) -> dict[str, float]:
        """One epoch; every process of the runtime goes through this, only the leader has batches."""
        iterator = self._begin(batches) if self._runtime.rank == 0 else iter(())
        self._host()
        self._hand_on()
        try:
            with self._runtime.call(self, "fit", ()):
                return self._train(iterator)
        except BaseException:
            self._failed = True
            raise

    def _train(self, iterator: Iterator[Any]) -> dict[str, float]:
        position = self._epoch, self._batch, self._key
        cuts, sample, position = self._runtime.agree((self._cuts, self._first, position))
        self._epoch, self._batch, self._key = position
        if not self._workers:
            self._cuts = cuts
            self._build(sample)
            agree(described(self._workers, self._recipe), self._runtime)
        readers, intakes, edges = wiring(self._workers, self.method)
        feed, actors, between = self.method.feed, list[Actor](self._workers), self._between
        if between is not None:
            between.begin(self._epoch, self._key, self._batch, readers)
            feed, readers = Whole(), [CANDIDATES]
            actors, edges = between.actors(), [*edges, *between.edges()]
        source = Source(
            iterator, feed, readers, self._key, self._batch, self._output, self._on_batch, self._recipe.loss
        )
        train_unless_mixed(self._units, self._frozen)
        counter = source if between is None else between.feeder
        for worker in self._workers:
            worker.begin(self._key, self._epoch)
        for intake in intakes:
            intake.begin(self._key)
        self._behind = self._newer = len(owned(self._workers, self._runtime)) < len(self._workers)
        start = time.perf_counter()
        try:
            timings = self._runtime.run(Graph([source, *actors, *intakes], edges), self._observers)
        finally:
            self._key, self._batch = counter.key, counter.batch
        seconds = time.perf_counter() - start - timings.setup
        self._epoch += 1
        for worker in self._workers:
            worker.counters.busy_seconds += timings.busy[worker.name]
            worker.counters.wait_seconds += timings.wait[worker.name]
        if between is not None:
            between.selector.tally.add_seconds(timings.busy[Selector.name], timings.wait[Selector.name])
        loss = [worker.counters.take_loss() for worker in self._workers][-1]
        record = {
            "epoch": self._epoch, "loss": self._runtime.agree(loss, of=self._workers[-1].name),
            "samples": source.samples, "seconds": seconds, "samples_per_second": source.samples / seconds,
        }  # fmt: skip
        return self._runtime.agree(record)

    def _begin(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The leader's part before an epoch."""
        if callable(set_epoch := getattr(batches, "set_epoch", None)):
            set_epoch(self._epoch)
        if callable(set_draw := getattr(batches, "set_draw", None)):
            set_draw(self.method.draws(self._epoch))
        if self._resume_rng is not None:
            set_rng_state(self._resume_rng)
            self._resume_rng = None
        inputs, iterator = peek(batches, f"epoch {self._epoch + 1}")
        if not self._workers and isinstance(self._blocks, int) and self._blocks > 1:
            self._units, self._cuts = cut(self._given, self._blocks, self.method, inputs, self._recipe.devices[0])
        self._first = inputs[:2]
        return iterator

    def _network(self) -> list[nn.Module]:
        """The units of the forward network."""
        self._check_home()
        blocks: list[Any] = [w.block.module for w in self._workers] or assemble(self._units, self._cuts, self.method)
        return [unit for block in blocks for unit in block]  # one may be there twice

    def _host(self) -> None:
        """Let the other processes, if there are any, have a trainer like this one."""
        if not self._hosted:
            self._runtime.host(self, follower(Trainer, self._recipe, nn.Sequential(*self._units), list(self._cuts)))
            self._hosted = True

    def _everywhere(self, what: str) -> list[Any]:
        """What is asked of every block, from the process where it lives."""
        self._check_home()
        away = self._workers and not self._closed
        answers = self._runtime.ask(self, "_answer", what) if away else [answer(self._workers, what)]
        return join(answers, len(self._workers))

    def _answer(self, what: str) -> dict[int, Any]:
        return answer(owned(self._workers, self._runtime), what)

    def _hand_on(self) -> None:
        """Weights that the user has changed in `model` go to where their blocks live."""
        if not self._handed:
            return
        now = fingerprints(self._workers, self._runtime)
        if changed := news(self._workers, self._handed, now):
            if self._newer:
                raise UserError(
                    "a `trainer.model` from before the latest training was changed, and its blocks in other processes "
                    "have other weights by now; take `trainer.model` again and change that"
                )
            self._runtime.ask(self, "_take", changed)
        self._handed = now

    def _take(self, changed: Mapping[int, Mapping[str, Tensor]]) -> None:
        take(owned(self._workers, self._runtime), changed)

    def _check_open(self) -> None:
        if self._closed:
            raise UserError("this trainer is closed; make a new one, or keep it open with `with`")

    def _check_home(self) -> None:
        if self._closed and self._newer:
            if self._runtime.rank:
                raise UserError("only rank 0 has the whole model, its state and statistics; ask there")
            raise PeerLost("the weights of blocks in other processes were lost with them")

    def _build(self, sample: Tensor) -> None:
        self._sample = (tuple(sample.shape[1:]), str(sample.dtype).removeprefix("torch."))
        first = [] if self.method.selection is None else [Selector.name]
        self._runtime.place([*first, *(f"block{k}" for k in range(len(self._cuts) + 1))])
        self._workers = chain(self._units, self._cuts, sample[:2], self._recipe, self._runtime.owns)
        self._output = decision(self._workers, self._recipe.loss)
        if self.method.selection is not None:
            self._between = Between(self.method, self._workers, sample[:2], self._recipe.loss, self._recipe.seed)
