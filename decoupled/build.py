"""From a model and a method to a wired chain: blocks, workers, edges.

    source --data--> block 0 --up--> block 1 --up--> ... block K-1 <--data-- source
                            <-down--        <-down--

Every port is bounded: upwards by what the order keeps in flight (or the method's `channel`), downwards too
(one channel per reply of a pass), data by how far the bottom block may be ahead of the top.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from decoupled.block import Block
from decoupled.coupling import Loss, Lower, Place, Upper
from decoupled.errors import UserError, first_line, unknown
from decoupled.intake import Intake
from decoupled.method import Method
from decoupled.partition import split
from decoupled.randomness import seeded
from decoupled.runtime.contract import Cost, Edge, Runtime
from decoupled.runtime.launch import under_torchrun
from decoupled.runtime.processes import Processes
from decoupled.runtime.simulated import Simulated
from decoupled.runtime.threads import Threads
from decoupled.sample_losses import SampleLosses
from decoupled.scaling import Precision, Scaling, precisions
from decoupled.source import Reader
from decoupled.specs import check_options, check_seed, parse, positive
from decoupled.steps import MakeOptimizer, MakeScheduler, Steps
from decoupled.waits import down_port
from decoupled.worker import Worker

Model = nn.Sequential | Sequence[nn.Module]
POLICIES = ("stop", "skip")
RUNTIMES: dict[str, Callable[..., Runtime]] = {"simulated": Simulated, "threads": Threads, "processes": Processes}


@dataclass(frozen=True)
class Recipe:
    """Everything beside the model and the data that makes a run: the arguments of `Trainer`."""

    method: Method
    loss: Loss
    optimizer: MakeOptimizer
    scheduler: MakeScheduler | None
    devices: Sequence[torch.device]
    seed: int
    on_nonfinite: str
    precision: Any = "float32"

    def precisions(self, K: int) -> list[Precision]:
        """What each of K blocks computes in.

        Raises:
            UserError: not one precision per block.
        """
        made = precisions(self.precision)
        if len(made) == 1 and (isinstance(self.precision, str | Mapping) or K == 1):
            return made * K
        if len(made) != K:
            raise UserError(f"precision names {len(made)} blocks of {K}; give one for all, or one per block")
        return made

    def __post_init__(self) -> None:
        precisions(self.precision)
        if self.on_nonfinite not in POLICIES:
            raise unknown("on_nonfinite policy", self.on_nonfinite, POLICIES)
        functions = {"loss": self.loss, "optimizer": self.optimizer, "scheduler": self.scheduler or self.optimizer}
        for name, function in functions.items():
            if not callable(function):
                raise UserError(
                    f"{name} must be a function, got {type(function).__name__}; see the docstring of Trainer"
                )
        if isinstance(self.loss, nn.Module) and any(p.requires_grad for p in self.loss.parameters()):
            raise UserError("the loss has parameters, which nobody would train; move them into the model's last unit")
        if self.method.feed.share < 1 and getattr(self.loss, "reduction", "mean") == "sum":
            raise UserError(f"{self.method.name} takes means over micro-batches, and the loss is a sum; use a mean")
        check_seed(self.seed)


def cut(
    model: Model, blocks: int | Sequence[int] | None, method: Method, sample: Tensor | None = None,
    device: torch.device | None = None,
) -> tuple[list[nn.Module], list[int]]:  # fmt: skip
    """The units of the model and the indices where later blocks begin; a sample is timed on `device`."""
    if blocks is None:
        if isinstance(model, nn.Sequential) or not isinstance(model, Sequence):
            raise UserError("blocks=None means that `model` is a list with one module per block; say how many blocks")
        blocks = list(range(1, len(model)))
    if isinstance(model, Sequence) and not model:
        raise UserError("the model has no blocks: the list is empty")
    parts = split(model, blocks, sample, device=device, replays=replaying(method, blocks))
    units = [unit for part in parts for unit in part]
    return units, list(itertools.accumulate(len(part) for part in parts))[:-1]


def replaying(method: Method | None, blocks: int | Sequence[int]) -> Callable[[int], bool]:
    """Whether block k of so many runs every forward twice with `method` (None: with none); see `split`."""
    return lambda k: method is not None and isinstance(blocks, int) and method.replays(k, blocks)


def chain(
    units: Sequence[nn.Module], cuts: Sequence[int], sample: Tensor, recipe: Recipe,
    here: Callable[[str], bool] = lambda name: True,
) -> list[Worker]:  # fmt: skip
    """The workers of a chain, wired to their halves.

    Args:
        units: the finest pieces of the model. cuts: index of the first unit of every later block.
        sample: (batch, *features), some inputs, to find the shapes on the edges.
        here: whether a block runs in this process; the others stay on the CPU.
    """
    modules, method = assemble(units, cuts, recipe.method), recipe.method
    K = len(modules)
    shapes, dtypes, overwrites = probe(modules, sample)
    precise = recipe.precisions(K)
    scaled = next((one for one in precise if one.scale is not None), None)
    workers = []
    with seeded(recipe.seed):  # heads are initialised from the seed alone
        for k, module in enumerate(modules):
            losses = None
            if method.selection is not None:
                tells = method.selection.lag is not None and k == K - 1
                losses = SampleLosses(recipe.loss, tells, method.selection.alpha)
            place = Place(k, K, losses or recipe.loss, shapes, tuple(sample.shape[1:]), tuple(modules))
            device = recipe.devices[k % len(recipe.devices)] if here(f"block{k}") else torch.device("cpu")
            lower, upper = halves(method, place)
            if upper.intake is not None:
                upper.intake.device = device
            if lower.has_objective and not dtypes[k].is_floating_point:
                raise UserError(f"block{k} ends in {dtypes[k]}, which no objective can train; move the cut behind it")
            for half in (lower, upper):
                if half.module is not None:
                    half.module.to(device=device, dtype=dtypes[k])
            seed = recipe.seed * 1_000_003 + k
            block = Block(module, f"block{k}", seed, device, overwrites[k], precise[k].autocast)
            groups = (block.parameters, _parameters(lower.module), _parameters(upper.module))
            steps = Steps(groups, recipe.optimizer, recipe.scheduler, (lower.optimizer, upper.optimizer))
            retention = method.retention(block, _steps_between(method, k, K), method.at_once(k, K))
            workers.append(
                Worker(
                    place, block, lower, upper, retention, method.order, method.corrections, steps,
                    recipe.on_nonfinite, method.name, Scaling(scaled, method.coupling.linear), losses,
                )
            )  # fmt: skip
    return workers


def assemble(units: Sequence[nn.Module], cuts: Sequence[int], method: Method) -> list[nn.Sequential]:
    """One module per block: its units, behind what the coupling puts in front of them."""
    edges = [0, *cuts, len(units)]
    fronts = [method.coupling.front(k, len(edges) - 1) for k in range(len(edges) - 1)]
    parts = [units[a:b] for a, b in itertools.pairwise(edges)]
    return [nn.Sequential(*([] if f is None else [f]), *part) for f, part in zip(fronts, parts, strict=True)]


def halves(method: Method, place: Place) -> tuple[Lower, Upper]:
    """The coupling halves around block `place.k`."""
    coupling = method.coupling
    return coupling.lower(place), coupling.upper(place) if place.k else coupling.bottom(place)


def decision(workers: Sequence[Worker], loss: Loss) -> tuple[int, ...] | None:
    """Shape of the network's output per sample, classes first, if its loss takes class numbers."""
    output = workers[-1].place.shapes[-1]
    classifies = loss is nn.functional.cross_entropy or isinstance(loss, nn.CrossEntropyLoss)
    return output if classifies and output else None


class Wired(Protocol):
    """What wiring needs to know of a block's actor."""

    name: str
    k: int
    lower: Lower
    upper: Upper
    needs_data: bool


def wiring(workers: Sequence[Wired], method: Method) -> tuple[list[Reader], list[Intake], list[Edge]]:
    """Who reads data, the buffers between blocks, and all edges."""
    K = len(workers)
    readers = [
        Reader(w.name, inputs=w.upper.needs_data or w.lower.needs_inputs, targets=w.lower.needs_data)
        for w in workers if w.needs_data
    ]  # fmt: skip
    ahead, giver = method.facts.in_flight(0, K) + K, "source" if method.selection is None else "feeder"
    edges = [Edge(giver, reader.name, reader.name, "data", ahead) for reader in readers]
    intakes = [w.upper.intake for w in workers if w.upper.intake is not None]
    for below, above in itertools.pairwise(workers):
        if (intake := above.upper.intake) is not None:
            edges.append(Edge(below.name, "up", intake.name, "up", intake.slots))
            edges.append(Edge(intake.name, "up", above.name, "up", 1))
            edges.append(Edge(above.name, "down", intake.name, "ready", 1))
            continue
        flight = method.facts.in_flight(below.k, K) if below.lower.awaits == "B" else 0
        edges.append(Edge(below.name, "up", above.name, "up", max(method.channel, flight + 1)))
        if above.upper.replies:
            ports = [down_port(part) for part in range(below.lower.replies)]
            edges += [Edge(above.name, port, below.name, port, flight + 1) for port in ports]
    return readers, intakes, edges


def probe(
    modules: Sequence[nn.Module], sample: Tensor
) -> tuple[tuple[tuple[int, ...], ...], list[torch.dtype], list[bool]]:
    """Run the blocks once in evaluation mode; neither they nor the sample change.

    Returns:
        For every block: shape of its output without the batch dimension, dtype of its output, and whether it changes
        its input in place.

    Raises:
        UserError: a block cannot take its predecessor's output, or the input.
    """
    shapes, dtypes, overwrites, x = [], [], [], sample
    for k, module in enumerate(modules):
        modes = {m: m.training for m in module.modules()}
        module.eval()
        try:
            reference = next(itertools.chain(module.parameters(), module.buffers()), None)
            given = x.to("cpu" if reference is None else reference.device, copy=True)
            with torch.no_grad():
                y = module(given)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise UserError(
                f"block{k} does not take an input of shape {tuple(x.shape)} ({first_line(error)}); check the model "
                "against the batches"
            ) from error
        finally:
            for m, mode in modes.items():
                m.training = mode
        if not isinstance(y, Tensor):
            raise UserError(f"block{k} returns {type(y).__name__}; a block maps one tensor to one tensor")
        shapes.append(tuple(y.shape[1:]))
        dtypes.append(y.dtype)
        overwrites.append(given._version > 0)
        x = y
    return tuple(shapes), dtypes, overwrites


def make_runtime(
    runtime: str | Mapping[str, Any] | Runtime, blocks: int, others: int = 0, cost: Cost | None = None
) -> Runtime:
    """A runtime by name, or by ``{"name": ..., options}``; a Runtime is returned as it is.

    Torch's intra-op threads are divided by the blocks, on every runtime alike: their number decides the order of
    additions in a sum. `others`: actors beside the blocks that may have a process of their own. `cost`: what operations
    take on the simulated runtime, where they are not those of a chain of blocks.

    Raises:
        UserError: unknown name or option, or more processes than blocks.
    """
    if isinstance(runtime, Runtime):
        return runtime
    intra_op = max(1, torch.get_num_threads() // blocks)
    name, options = parse("runtime", runtime)
    if name not in RUNTIMES:
        raise unknown("runtime", name, RUNTIMES)
    check_options("runtime", name, RUNTIMES[name], options)
    if name == "processes" and not under_torchrun():
        options.setdefault("processes", blocks)
    if options.setdefault("intra_op", intra_op) is not None:
        positive(f"runtime {name!r}", intra_op=options["intra_op"])
    if cost is not None and name == "simulated":
        options.setdefault("cost", cost)
    made = RUNTIMES[name](**options)
    if isinstance(made, Processes) and made.world > (most := blocks + others):
        raise UserError(f"{made.world} processes for {blocks} blocks: some would be idle; use at most {most}")
    return made


def make_devices(devices: Sequence[Any] | str | None) -> list[torch.device]:
    """One device per block in turn; default: all visible GPUs, else the CPU."""
    if devices:
        names = [devices] if isinstance(devices, str | torch.device) else list(devices)
        try:
            return [torch.empty(0, device=name).device for name in names]
        except (RuntimeError, AssertionError, TypeError) as error:
            raise UserError(
                f"devices={devices!r} cannot be used ({first_line(error)}); name devices there are"
            ) from None
    if torch.cuda.is_available():
        return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [torch.device("cpu")]


def _steps_between(method: Method, k: int, K: int) -> bool:
    return method.order.rule is None or method.order.delay(k, K) > 0


def _parameters(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())
