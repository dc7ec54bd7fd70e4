"""Random programs of branches, loops, forks and spreads, nested at will: the graph of a program has the gradients of
ordinary autograd of the same program, written out, in any interleaving.

    program   linear | tanh | cut | pieces              a value of one row to another of the same width
              then(p, q)      q(p(x))
              branch(k, p, q) p(x) or q(x), by the instance and the rounds of the loops around
              fork(p, q)      linear([p(x), q(x)])
              loop(k, p)      p(p(...p(x))), a number of rounds that the instance says
              spread(k, p)    the mean of p(x) over as many copies, each with a state of its own

Every construct ends with the state it began with, so that they nest: a loop puts its round at the end of the state, a
spread the number of the copy, and both take it away again.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled.graph import (
    NPT,
    PPT,
    Asynchrony,
    Concat,
    Cond,
    Flatmap,
    GraphTrainer,
    Group,
    Instance,
    Isu,
    Loss,
    NodeGraph,
    Phi,
    Pumped,
    Split,
    Ungroup,
    Wire,
    execute,
)
from decoupled.runtime.simulated import Simulated

WIDTH = 4
Program = tuple[Any, ...]

numbers = st.integers(0, 2)  # which number of an instance's `about` a construct goes by
leaves = st.sampled_from([("linear",), ("tanh",), ("cut",), ("pieces",)])
programs = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(st.just("then"), inner, inner),
        st.tuples(st.just("branch"), numbers, inner, inner),
        st.tuples(st.just("fork"), inner, inner),
        st.tuples(st.just("loop"), numbers, inner),
        st.tuples(st.just("spread"), numbers, inner),
    ),
    max_leaves=7,
)


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def left(k: int, about: tuple[int, ...], position: tuple[int, ...]) -> bool:
    """Which way a branch goes."""
    return (about[k] + sum(position)) % 2 == 0


def mean(x: Tensor) -> Tensor:
    return x.mean(0, keepdim=True)


class Compiler:
    """Builds the graph of a program; its parameterised nodes are numbered in the order they are met."""

    def __init__(self, program: Program) -> None:
        self.graph, self._count = NodeGraph("program"), 0
        end = self.build(program, self.graph.input("x"))
        Loss(F.mse_loss)(self.linear(end, WIDTH, 1), self.graph.input("y"))

    def linear(self, wire: Wire, inputs: int, outputs: int) -> Wire:
        self._count += 1
        return PPT(nn.Linear(inputs, outputs), f"w{self._count}")(wire)

    def build(self, program: Program, x: Wire) -> Wire:
        match program:
            case ("linear",):
                return self.linear(x, WIDTH, WIDTH)
            case ("tanh",):
                return NPT(torch.tanh)(x)
            case ("cut",):
                a, b = Split([1, WIDTH - 1])(x)
                return Concat()(self.linear(a, 1, 1), self.linear(b, WIDTH - 1, WIDTH - 1))
            case ("pieces",):
                each = Ungroup(lambda i, *p: [(i, *p, 0), (i, *p, 1)], dim=1)(x)
                return Group(lambda i, *p: (i, *p[:-1]), 2, dim=1)(self.linear(each, WIDTH // 2, WIDTH // 2))
            case ("then", p, q):
                return self.build(q, self.build(p, x))
            case ("branch", k, p, q):
                yes, no = Cond(lambda i, *s: left(k, i.about, s))(x)
                return Phi()(self.build(p, yes), self.build(q, no))
            case ("fork", p, q):
                return self.linear(Concat()(self.build(p, x), self.build(q, x)), 2 * WIDTH, WIDTH)
            case ("loop", k, p):
                start = Isu(lambda i, *s: (i, *s, 0), lambda i, *s: (i, *s[:-1]))(x)
                h = Phi()
                done = Isu(lambda i, *s: (i, *s[:-1], s[-1] + 1), lambda i, *s: (i, *s[:-1], s[-1] - 1))(
                    self.build(p, h(start))
                )
                again, last = Cond(lambda i, *s: s[-1] < i.about[k])(done)
                h.join(again)
                return Isu(lambda i, *s: (i, *s[:-1]), lambda i, *s: (i, *s, i.about[k]))(last)
            case ("spread", k, p):
                copies = Flatmap(lambda i, *s: [(i, *s, c) for c in range(i.about[k])])(x)
                both = Group(lambda i, *s: (i, *s[:-1]), lambda i, *s: i.about[k])(self.build(p, copies))
                return NPT(mean)(both)
        raise AssertionError(program)


class Written:
    """The same program in ordinary autograd, with the weights of its graph."""

    def __init__(self, program: Program, module: nn.ModuleDict) -> None:
        self._program, self._module = program, module
        self._numbers: dict[int, list[str]] = {}  # id of a part of the program -> names of its own weights
        self._number(program, (count := iter(range(1, 1 << 20))))
        self._last = f"w{next(count)}"

    def _number(self, program: Program, count: Iterator[int]) -> None:
        """In the order in which `Compiler` meets them."""
        for part in program[1:]:
            if isinstance(part, tuple):
                self._number(part, count)
        own = {"linear": 1, "cut": 2, "pieces": 1, "fork": 1}.get(program[0], 0)
        self._numbers[id(program)] = [f"w{next(count)}" for _ in range(own)]

    def loss(self, instance: Instance) -> Tensor:
        x, y = (message.payload for message in instance.messages)
        return F.mse_loss(self._module[self._last](self.run(self._program, x, instance.about, ())), y)

    def run(self, program: Program, x: Tensor, about: tuple[int, ...], s: tuple[int, ...]) -> Tensor:
        own = [self._module[name] for name in self._numbers[id(program)]]
        match program:
            case ("linear",):
                return own[0](x)
            case ("tanh",):
                return torch.tanh(x)
            case ("cut",):
                return torch.cat([own[0](x[:, :1]), own[1](x[:, 1:])], 1)
            case ("pieces",):
                return torch.cat([own[0](piece) for piece in x.chunk(2, 1)], 1)
            case ("then", p, q):
                return self.run(q, self.run(p, x, about, s), about, s)
            case ("branch", k, p, q):
                return self.run(p if left(k, about, s) else q, x, about, s)
            case ("fork", p, q):
                return own[0](torch.cat([self.run(p, x, about, s), self.run(q, x, about, s)], 1))
            case ("loop", k, p):
                for t in range(about[k]):
                    x = self.run(p, x, about, (*s, t))
                return x
            case ("spread", k, p):
                return mean(torch.cat([self.run(p, x, about, (*s, c)) for c in range(about[k])]))
        raise AssertionError(program)


def distinct(program: Program) -> Program:
    """A copy in which no part is the same object as another: hypothesis shares equal ones."""
    return tuple(distinct(part) if isinstance(part, tuple) else part for part in list(program))


def made(abouts: list[tuple[int, int, int]]) -> list[Instance]:
    return [
        Instance([Pumped("x", (), torch.randn(1, WIDTH)), Pumped("y", (), torch.randn(1, 1))], about=about)
        for about in abouts
    ]


def expected(program: Program, graph: NodeGraph, instances: list[Instance]) -> dict[str, Tensor]:
    written, module = Written(program, graph.module), graph.module
    torch.stack([written.loss(instance) for instance in instances]).sum().backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    return found


abouts = st.lists(st.tuples(*[st.integers(1, 3)] * 3), min_size=1, max_size=4)


@settings(max_examples=60)
@given(program=programs, abouts=abouts, seed=st.integers(0, 10_000), keys=st.integers(1, 4),
       workers=st.integers(1, 4), jitter=st.floats(0, 3), first=st.booleans(), together=st.booleans(),
       backward=st.sampled_from(["activation", "recompute"]))  # fmt: skip
def test_a_random_program_has_the_gradients_of_autograd_in_any_interleaving(
    program: Program, abouts: list[tuple[int, int, int]], seed: int, keys: int, workers: int, jitter: float,
    first: bool, together: bool, backward: str,
) -> None:  # fmt: skip
    program, draw = distinct(program), random.Random(seed)
    graph, instances = Compiler(program).graph.check(), made(abouts)
    gradients = expected(program, graph, instances)
    before = {n: p.detach().clone() for n, p in graph.module.named_parameters()}
    computing = [n for n, node in graph.nodes.items() if node.kind != "input"]
    places = {n: draw.randrange(workers) for n in computing} | dict(zip(computing, range(workers), strict=False))
    runtime = Simulated(
        cost=lambda actor, operation: draw.random(), latency=lambda edge, m: jitter * draw.random(), fifo=False
    )
    batches = {name: draw.randint(2, 4) for name in graph.module if together}
    how = Asynchrony(keys, 10**6, "sum", backward, backward_first=first, batches=batches)
    sgd = lambda weights: torch.optim.SGD(weights, 1.0)  # noqa: E731
    with GraphTrainer(graph, how, optimizer=sgd, workers=places, runtime=runtime) as trainer:
        record = trainer.fit(instances)[0]
        assert {late for node in trainer.nodes() for late in node.staleness} <= {0}
    assert record["instances"] == len(instances)
    for n, weight in graph.module.named_parameters():
        torch.testing.assert_close(
            before[n] - weight.detach(), gradients[n], rtol=0, atol=1e-10, msg=lambda m: f"{program} {m}"
        )
    assert all(not node.open() for node in graph.nodes.values())


@settings(max_examples=30)
@given(program=programs, abouts=abouts, seed=st.integers(0, 10_000))
def test_every_message_is_answered_once_with_its_state(
    program: Program, abouts: list[tuple[int, int, int]], seed: int
) -> None:
    """States go all the way and come back: what is answered is what was sent, output by output."""
    graph, draw = Compiler(distinct(program)).graph.check(), random.Random(seed)
    went: Counter[Any] = Counter()
    for node in graph.nodes.values():
        forward, answer = node.check_sends, node.check_answer

        def sent(sends: Any, node: Any = node, forward: Any = forward) -> Any:
            went.update((node.name, send.port, send.state) for send in sends if type(send).__name__ == "Forward")
            return forward(sends)

        def came(port: int, state: Any, node: Any = node, answer: Any = answer) -> None:
            went[node.name, port, state] -= 1
            answer(port, state)

        node.check_sends, node.check_answer = sent, came  # type: ignore[method-assign]
    execute(graph, made(abouts), choose=draw.randrange)
    left_over = {where: count for where, count in went.items() if count}
    assert {where[0] for where in left_over} <= {"x", "y"} and set(left_over.values()) <= {1}  # the controller's own
    assert all(not node.remembered() for node in graph.nodes.values())


def test_programs_have_what_they_are_drawn_for() -> None:
    """A loop in a branch in a spread in a loop, by hand: the graph has a node of every kind, visited in many states."""
    inner = ("branch", 2, ("loop", 1, ("cut",)), ("pieces",))
    program: Program = ("loop", 0, ("then", ("spread", 1, inner), ("fork", ("tanh",), ("linear",))))
    graph, instances = Compiler(program).graph.check(), made([(3, 2, 1), (1, 3, 2)])
    kinds = "input ppt npt loss cond phi isu concat split broadcast group ungroup flatmap"
    assert {node.kind for node in graph.nodes.values()} == set(kinds.split())
    gradients = expected(program, graph, instances)
    execute(graph, instances)
    assert all(float(gradients[n].abs().sum()) > 0 for n in gradients)
    for n, weight in graph.module.named_parameters():
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, gradients[n], rtol=0, atol=1e-12)
