"""On GPUs (`make gpu`): streams, staging, shared memory and NCCL against the CPU and the simulator."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from decoupled.messages import Up
from decoupled.runtime.contract import Actor, Edge, Graph, Outcome, Want
from decoupled.runtime.threads import Threads
from decoupled.testing import OPTIMIZERS, Case, Run, compare, train
from decoupled.trainer import Trainer
from decoupled.transport import cuda, shared_device
from decoupled.transport.endpoint import Endpoint
from decoupled.transport.rendezvous import MeetingOutlet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

CASE = Case(widths=(4, 5, 3, 4, 5, 3), cuts=(1, 2, 4), sizes=(6,) * 7 + (5,))
METHODS = ("greedy_local", "pipedream", "backprop")
GPU = ["cuda:0"]
EDGE = Edge("block0", "up", "block1", "up", 3)


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on(runtime: Any, method: str, devices: list[str]) -> Run:
    return train(CASE, method, optimizer=OPTIMIZERS["momentum"], epochs=2, runtime=runtime, devices=devices)


def weights(run: Run) -> list[list[torch.Tensor]]:
    return [[vector.cpu() for vector in block] for block in run.weights]


# --- one GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("deterministic")
def test_threads_on_one_gpu_equal_the_cpu_and_themselves(method: str) -> None:
    first, second = (on("threads", method, GPU) for _ in range(2))
    compare(weights(first), weights(second), tolerance=0.0)
    compare(weights(first), weights(on("simulated", method, ["cpu"])), tolerance=1e-9)


class Producer(Actor):
    """Computes `count` tensors, each of its own number, slowly enough to be overtaken, and lets go of them."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.name, self.device, self._count, self._next = "producer", device, count, 0

    def wants(self) -> tuple[Want, ...]:
        return (Want(),) if self._next < self._count else ()

    def handle(self, want: Want, messages: Any) -> Outcome:
        n, self._next = self._next, self._next + 1
        x = torch.zeros(4096, device=self.device)
        for _ in range(20):
            x = x + n / 20
        message = Up(key=n, batch=n, round=0, indices=None, version=0, payload=(x,))
        return Outcome("produce", [("up", message)])


class Consumer(Actor):
    """Holds the largest deviation of what came from what should have come."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.name, self.device, self._count, self._taken = "consumer", device, count, 0
        self.worst = torch.zeros((), device=device)

    def wants(self) -> tuple[Want, ...]:
        return (Want(("up",)),) if self._taken < self._count else ()

    def handle(self, want: Want, messages: Any) -> Outcome:
        self._taken += 1
        (x,) = messages[0].payload
        self.worst = torch.maximum(self.worst, (x - messages[0].key).abs().max())
        return Outcome("consume")


@pytest.mark.parametrize("target", [0, pytest.param(1, marks=two_gpus)])
def test_tensors_on_the_way_are_not_overwritten(target: int) -> None:
    count, devices = 3000, [torch.device("cuda", n) for n in (0, target)]
    producer, consumer = Producer(count, devices[0]), Consumer(count, devices[1])
    with closing(Threads()) as runtime:
        runtime.run(Graph([producer, consumer], [Edge("producer", "up", "consumer", "up", 4)]))
    assert consumer.worst.item() < count * 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("deterministic")
def test_two_processes_on_one_gpu_equal_threads(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tensors stay on it."""
    from decoupled.runtime.processes import Processes

    rings: list[Any] = []
    offer = shared_device.offer
    monkeypatch.setattr(shared_device, "offer", lambda *given: rings.append(offer(*given)) or rings[-1])
    with closing(Processes(processes=2)) as runtime:
        found = train(CASE, method, optimizer=OPTIMIZERS["momentum"], epochs=2, runtime=runtime, devices=GPU)
        assert rings
        assert all(rings)
        assert found.history[-1]["loss"] == on("threads", method, GPU).history[-1]["loss"]


@contextmanager
def edge(bulk: str, source: torch.device, target: torch.device) -> Iterator[tuple[Any, Any]]:
    with closing(Endpoint(b"t", "127.0.0.1")) as a, closing(Endpoint(b"t", "127.0.0.1")) as b:
        b.expect(EDGE, target)
        out = a.connect(EDGE, b.address, 60.0, bulk=bulk, device=source)
        yield out, b.accept(EDGE, 60.0, device=target)


def carry(out: Any, inlet: Any, device: torch.device, target: torch.device) -> list[torch.Tensor]:
    """Send tensors of many shapes, computed just before on a stream of their own."""
    found: list[torch.Tensor] = []
    with cuda.lane(device):
        for n, shape in enumerate([(1,), (), (1000, 1000), (3, 5), (0,), (64, 32, 7)] * 3):
            x = torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(n)).cumsum(0) * 2
            out.send(Up(key=n, batch=n, round=0, indices=torch.arange(3), version=0, payload=(x,)))
            message, receive = cuda.hand_over(inlet.receive().message, target)
            if receive is not None:
                receive()
            inlet.taken()
            assert isinstance(message, Up)
            assert message.payload[0].device == target
            found.append(message.payload[0].cpu())
    return found


def test_staging_through_pinned_memory_changes_nothing() -> None:
    """In one process a GPU's memory cannot be shared with itself, so all goes through the host's."""
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    results = []
    for target in (gpu, cpu):
        with edge("auto", gpu, target) as (out, inlet):
            assert not isinstance(out, MeetingOutlet)  # the same GPU, or none
            results.append(carry(out, inlet, gpu, target))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- two GPUs --------------------------------------------------------------------------------------------------------


@two_gpus
def test_nccl_equals_staging() -> None:
    first, second = (torch.device("cuda", n) for n in (0, 1))
    results = []
    for bulk in ("auto", "shared_memory", "gloo"):
        with edge(bulk, first, second) as (out, inlet):
            assert isinstance(out, MeetingOutlet) == (bulk == "auto")
            results.append(carry(out, inlet, first, second))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))


@two_gpus
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_on_two_gpus_equal_the_cpu(method: str) -> None:
    from decoupled.runtime.processes import Processes

    with closing(Processes(processes=2)) as runtime:
        found = train(CASE, method, epochs=2, runtime=runtime, devices=["cuda:0", "cuda:1"])
        assert found.history[-1]["loss"] == pytest.approx(train(CASE, method, epochs=2).history[-1]["loss"], rel=1e-9)


# --- costs -----------------------------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(2048, 2048), nn.ReLU()) for _ in range(8)), nn.Linear(2048, 10))


def seconds(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


def test_one_block_costs_little_more_than_a_plain_loop() -> None:
    batches = [(torch.randn(1024, 2048), torch.randint(10, (1024,))) for _ in range(30)]
    model = net().cuda()
    optimizer = sgd(model.parameters())

    def plain() -> None:
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.cuda()), y.cuda()).backward()
            optimizer.step()

    loss = nn.functional.cross_entropy
    with Trainer(net(), "backprop", blocks=1, loss=loss, optimizer=sgd, runtime="threads", devices=GPU) as trainer:
        times = [(seconds(plain), seconds(lambda: trainer.fit(batches))) for _ in range(6)][1:]
    assert statistics.median(ours / theirs for theirs, ours in times) < 1.5  # smoke: benchmarks measure


def test_local_losses_in_flight_need_less_than_twice_the_memory_of_backprop() -> None:
    batches = [(torch.randn(4096, 2048), torch.randint(10, (4096,))) for _ in range(4)]
    peaks = {}
    for method in ("backprop", "greedy_local"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        loss = nn.functional.cross_entropy
        with Trainer(net(), method, blocks=[2, 4, 6], loss=loss, optimizer=sgd, runtime="threads", devices=GPU) as t:
            t.fit(batches)
        peaks[method] = torch.cuda.max_memory_allocated()
    # Smoke: in flight, each block holds a batch of its own, and two wait on every edge; benchmarks measure.
    assert peaks["greedy_local"] < 2 * peaks["backprop"]
