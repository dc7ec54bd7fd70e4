"""Helpers for testing methods: tiny float64 networks, a training run in one call, and a reference to compare it with.

    case = Case(widths=(4, 5, 3), cuts=(1,), sizes=(6, 6, 4))      a network of two blocks, three minibatches
    run = train(case, "pipedream")                                 run.weights[k][v]: block k after v updates
    expected = reference(case, "pipedream")                        the same from the declared facts, by plain autograd
    compare(run.weights, expected)

The reference knows what a method *declares* (`Method.facts`), never how the library does it. `cases` and `timings` are
Hypothesis strategies and need the extra `dev`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from decoupled import registry
from decoupled.build import Recipe, chain
from decoupled.correction import hooks
from decoupled.coupling import Lower
from decoupled.messages import Data, Message
from decoupled.method import Method
from decoupled.randomness import seeded
from decoupled.runtime.contract import Edge, Observer
from decoupled.runtime.timing import Timing
from decoupled.source import Repeat
from decoupled.steps import MakeOptimizer
from decoupled.trainer import Trainer
from decoupled.worker import Worker

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Spec = str | Mapping[str, Any] | Method
Batch = tuple[Tensor, Tensor, Tensor]
Weights = list[list[Tensor]]  # [block][version], all parameters of the block in one vector

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.2),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.02),
}


@dataclass(frozen=True)
class Case:
    """A network of `K` float64 blocks and its (inputs, targets, sample indices); the same each time it is asked.

    Attributes:
        widths: features, hidden widths, classes; unit i maps widths[i] to widths[i + 1], tanh on all but the last.
        cuts: index of the first unit of every block but the first.
        sizes: samples of each minibatch.
        seed: of the weights and the data.
    """

    widths: tuple[int, ...]
    cuts: tuple[int, ...]
    sizes: tuple[int, ...]
    seed: int = 0

    @property
    def K(self) -> int:
        return len(self.cuts) + 1

    def blocks(self) -> list[nn.Module]:
        with seeded(self.seed):
            units = [nn.Sequential(nn.Linear(a, b)) for a, b in itertools.pairwise(self.widths)]
        for unit in units[:-1]:
            unit.append(nn.Tanh())
        return [nn.Sequential(*units[a:b]).double() for a, b in itertools.pairwise([0, *self.cuts, len(units)])]

    def batches(self) -> list[Batch]:
        draw = torch.Generator().manual_seed(self.seed)
        total, features, classes = sum(self.sizes), self.widths[0], self.widths[-1]
        x = torch.randn(total, features, generator=draw, dtype=torch.float64)
        y = torch.randint(classes, (total,), generator=draw)
        return list(zip(x.split(self.sizes), y.split(self.sizes), torch.arange(total).split(self.sizes), strict=True))


@dataclass(frozen=True)
class Run:
    """A finished training run: `weights[k][v]` are block k's weights after v of its updates."""

    trainer: Trainer
    weights: Weights
    history: list[dict[str, float]]


def train(
    case: Case,
    method: Spec,
    *,
    optimizer: MakeOptimizer = OPTIMIZERS["sgd"],
    runtime: Any = "simulated",
    epochs: int = 1,
    blocks: Sequence[nn.Module] | None = None,
    batches: Sequence[Any] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    **options: Any,
) -> Run:
    """Train a case (or `blocks` on `batches`) as `Trainer` does, and record all weights after each update."""
    blocks = case.blocks() if blocks is None else blocks
    weights: Weights = [[] for _ in blocks]
    owner = {id(next(block.parameters())): k for k, block in enumerate(blocks) if _has_weights(block)}

    def recording(parameters: list[nn.Parameter]) -> Optimizer:
        made = optimizer(parameters)
        if (k := owner.get(id(parameters[0]))) is not None:
            made.register_step_pre_hook(lambda *_: weights[k].append(flat(blocks[k])))  # what corrections left too
        return made

    given: dict[str, Any] = {"loss": loss, "optimizer": recording, "runtime": runtime, **options}
    with Trainer(blocks, method, **given) as trainer:
        history = trainer.fit(case.batches() if batches is None else batches, epochs)
    for versions, block in zip(weights, blocks, strict=True):
        versions.append(flat(block))
    return Run(trainer, weights, history)


def workers(case: Case, method: Spec) -> list[Worker]:
    """The workers that `train` begins with."""
    given = (nn.functional.cross_entropy, OPTIMIZERS["sgd"], None, [torch.device("cpu")], 0, "stop")
    return chain(case.blocks(), range(1, case.K), case.batches()[0][0], Recipe(point(method), *given))


def point(method: Spec) -> Method:
    """The `Method` that a spec stands for."""
    return method if isinstance(method, Method) else registry.make(method)


def variants() -> list[dict[str, Any]]:
    """Every registered method with its defaults, with each switch flipped, with each count one more (above 2: less)."""
    specs = []
    for name in registry.methods():
        defaults = registry.options(name)
        changed = {key: not value for key, value in defaults.items() if isinstance(value, bool)}
        changed |= {key: value + (1 if value <= 2 else -1) for key, value in defaults.items() if type(value) is int}
        specs += [{"name": name}, *({"name": name, key: value} for key, value in changed.items())]
    return specs


def label(spec: Any) -> str:
    """A test id for one of `variants`."""
    return ",".join(str(value) if key == "name" else f"{key}={value}" for key, value in spec.items())


def flat(module: nn.Module) -> Tensor:
    """A copy of all parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()] or [torch.zeros(0)])


def compare(found: Weights, expected: Weights, tolerance: float = 1e-12) -> None:
    """Check that two trajectories agree; the AssertionError names the first block and update that differ."""
    assert len(found) == len(expected), f"{len(found)} blocks instead of {len(expected)}"
    for k, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert len(mine) == len(theirs), f"block {k}: {len(mine) - 1} updates instead of {len(theirs) - 1}"
        for v, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            error = float((a - b).abs().max())
            assert error <= tolerance, f"block {k} differs by {error:.3g} after update {v}"


# --- the reference ------------------------------------------------------------------------------------------------


def sends_gradients(method: Method, K: int) -> bool:
    """Whether activations go up, gradients (or nothing) down, in a fixed order, on every minibatch as it comes."""
    plain = method.coupling.up == ("activation",) and method.coupling.down in ((), ("gradient",))
    return method.fixed and method.selection is None and ((plain and not method.facts.surrogate) or K == 1)


def has_reference(method: Method, K: int) -> bool:
    """Whether `reference` can predict it: plain gradients, late by one number of updates, not corrected further."""
    least, most = method.facts.least_delay or method.facts.delay, method.facts.delay
    steady = all(least(k, K) == most(k, K) for k in range(K)) and method.facts.backward_weights != "mixed"
    return sends_gradients(method, K) and steady and all(hooks(c) <= {"cotangent"} for c in method.corrections)


def reference(case: Case, method: Spec, *, optimizer: MakeOptimizer = OPTIMIZERS["sgd"], epochs: int = 1) -> Weights:
    """Every block's weights after each of its updates, from the declared facts alone.

    Update n of block k (no update, if nothing reaches it) is the gradient on minibatch n of the objectives in
    ``facts.reach(k, K)``, by autograd on the
    whole network with `detach` below the lowest block that an objective reaches, and with the weights of the blocks in
    between held fixed that it only passes through. The forward runs block k with the
    weights it had ``facts.delay(k, K)`` updates ago, never older than the epoch; the backward goes through those, or
    through today's (`backward_weights`). A minibatch is one update: micro-batches only re-associate a mean.
    """
    facts, feed, K, blocks = point(method).facts, point(method).feed, case.K, case.blocks()
    halves = [worker.lower for worker in workers(case, method)]  # with the heads that the library draws from the seed
    modules = [*blocks, *(half.module for half in halves)]
    optimizers = [optimizer(list(m.parameters())) for m in modules if m is not None and _has_weights(m)]
    history = [[_leaves(block)] for block in blocks]
    repeated = [b for b in case.batches() for _ in range(feed.rounds if isinstance(feed, Repeat) else 1)]
    for _ in range(epochs):
        start = len(history[0]) - 1
        for n, (x, y, indices) in enumerate(repeated, start):
            data = Data(n, batch=n, inputs=x, targets=y, indices=indices)
            old = [history[k][max(start, n - facts.delay(k, K))] for k in range(K)]
            _gradients(blocks, halves, old, facts.backward_weights == "current", point(method), data)
            for made in optimizers:
                made.step()
                made.zero_grad()
            for k, block in enumerate(blocks):
                history[k].append(_leaves(block))
    learned = [versions if facts.reach(k, K) else versions[:1] for k, versions in enumerate(history)]
    return [[torch.cat([p.flatten() for p in version.values()]) for version in versions] for versions in learned]


def _gradients(
    blocks: Sequence[nn.Module], halves: Sequence[Lower], old: Sequence[dict[str, Tensor]], today: bool, method: Method,
    data: Data,
) -> None:  # fmt: skip
    """Leave in `.grad` of blocks and heads what the method declares; `old` are the weights of the forward."""
    K, x = len(blocks), data.inputs
    assert x is not None
    inputs = [x]  # what each block met in the forward
    for block, weights in zip(blocks, old, strict=True):
        inputs.append(functional_call(block, weights, inputs[-1]).detach())
    used = [_leaves(block) for block in blocks] if today else old
    leaves = [{name: w.clone().requires_grad_() for name, w in weights.items()} for weights in used]
    for j in sorted({j for k in range(K) for j in method.facts.reach(k, K)}):
        reached = [k for k in range(K) if j in method.facts.reach(k, K)]
        h = x
        for k in range(j + 1):
            if k == reached[0]:
                h = h.detach()
            if today:
                h = inputs[k] + (h - h.detach())  # the stale input, with the gradient of today's
            h = functional_call(blocks[k], leaves[k] if k in reached else used[k], h)
            for correction in method.corrections if k < j and h.requires_grad else ():
                h.register_hook(correction.cotangent)
        objective = halves[j].objective(h, data)
        assert objective is not None, f"block {j} has nothing to learn from minibatch {data.batch}"
        objective.backward()
    for block, weights in zip(blocks, leaves, strict=True):
        for name, parameter in block.named_parameters():
            parameter.grad = weights[name].grad


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _leaves(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


# --- observers and strategies -------------------------------------------------------------------------------------


class Tap(Observer):
    """Records all messages and operations (on threads in an order that varies)."""

    def __init__(self) -> None:
        self.messages: list[tuple[Edge, Message]] = []
        self.operations: list[tuple[str, str, float, float]] = []

    def operation(self, actor: str, operation: str, start: float, end: float) -> None:
        self.operations.append((actor, operation, start, end))

    def delivery(self, edge: Edge, message: Message, sent: float, arrived: float) -> None:
        self.messages.append((edge, message))


def cases(
    blocks: tuple[int, int] = (1, 6), batches: tuple[int, int] = (1, 8), size: tuple[int, int] = (1, 5)
) -> SearchStrategy[Case]:
    """Cases of any depth, widths and cuts; least and most `blocks`, `batches`, and `size` of all but the last batch."""
    from hypothesis import strategies as st

    @st.composite
    def case(draw: Callable[[Any], Any]) -> Case:
        K = draw(st.integers(*blocks))
        units = draw(st.integers(K, K + 2))
        widths = draw(st.lists(st.integers(2, 5), min_size=units + 1, max_size=units + 1))
        cuts = sorted(draw(st.permutations(range(1, units)))[: K - 1])
        full, count = draw(st.integers(*size)), draw(st.integers(*batches))
        sizes = [full] * (count - 1) + [draw(st.integers(1, full))]
        return Case(tuple(widths), tuple(cuts), tuple(sizes), draw(st.integers(0, 99)))

    return case()


def timings(K: int) -> SearchStrategy[Timing]:
    """Any speeds, latency and jitter for `K` blocks."""
    from hypothesis import strategies as st

    durations = st.lists(st.floats(0.1, 4.0), min_size=K, max_size=K)
    return st.builds(
        Timing, forward=durations, backward=durations, step=st.floats(0, 1), recompute=st.booleans(),
        latency=st.floats(0, 8), jitter=st.sampled_from([0.0, 0.5, 5.0]), seed=st.integers(0, 99),
        slow=st.dictionaries(st.integers(0, K - 1), st.sampled_from([0.1, 10.0]), max_size=2),
    )  # fmt: skip
