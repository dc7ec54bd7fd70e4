"""Streams, against a model of them: who runs after whom, and whether memory can be given away too early.

Nothing here runs on a GPU. The model keeps, for every stream, what has surely happened before its next operation, and
for every tensor the stream that owns its memory and those it was recorded on - the rules that PyTorch documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch

from decoupled.messages import Data, Probe, Up
from decoupled.transport import cuda

ZERO, ONE, CPU = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")


class Stream:
    def __init__(self, device: torch.device) -> None:
        self.device, self.done = device, set[str]()

    def record_event(self) -> set[str]:
        return set(self.done)

    def wait_event(self, event: set[str]) -> None:
        self.done |= event

    def wait_stream(self, other: Stream) -> None:
        self.done |= other.done

    def synchronize(self) -> None:
        pass


class Model:
    """The current stream of every device."""

    def __init__(self) -> None:
        self.current = {d: Stream(d) for d in (ZERO, ONE)}
        self.default = dict(self.current)

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.current[stream.device] = self.current[stream.device], stream
        try:
            yield
        finally:
            self.current[stream.device] = before

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    def computes(self, name: str, device: torch.device) -> FakeTensor:
        stream = self.current[device]
        stream.done.add(name)
        return FakeTensor(self, device, name, stream)


class FakeTensor:
    """`streams`: those that may use its memory without any danger when it is freed."""

    grad_fn, requires_grad = None, False

    def __init__(self, model: Model, device: torch.device, name: str, owner: Stream | None) -> None:
        self.model, self.device, self.name, self.streams = model, device, name, {owner}

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def is_pinned(self) -> bool:
        return False

    def record_stream(self, stream: Stream) -> None:
        assert stream.device == self.device
        self.streams.add(stream)

    def to(self, device: torch.device, non_blocking: bool = False) -> FakeTensor:
        """As ATen does it: between GPUs on the source's current stream, with a barrier of both before and after."""
        assert self.is_cuda or not non_blocking, "pageable memory"
        name = f"copy of {self.name}"
        if not self.is_cuda or device.type != "cuda":
            end = self.model.current[device if device.type == "cuda" else self.device]
            assert not self.is_cuda or self.name in end.done
            end.done.add(name)
            return FakeTensor(self.model, device, name, end if device.type == "cuda" else None)
        source, target = self.model.current[self.device], self.model.current[device]
        assert self.name in source.done, "copied before it was computed"
        self.used_on = source
        source.done |= target.done | {name}
        target.done |= source.done
        return FakeTensor(self.model, device, name, target)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    model = Model()
    for name, value in {
        "is_initialized": lambda: True,
        "current_stream": lambda device: model.current[device],
        "default_stream": lambda device: model.default[device],
        "Stream": Stream,
        "stream": model.use,
        "device": model.device,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(cuda, "_own", type("Own", (), {})())
    monkeypatch.setattr(cuda, "Tensor", (torch.Tensor, FakeTensor))
    return model


def sends(model: Model, tensor: Any, target: torch.device | None) -> tuple[Any, Callable[[], None] | None]:
    message = Up(key=0, batch=0, round=0, indices=None, version=0, payload=(tensor,))
    found, receive = cuda.hand_over(message, target)
    assert isinstance(found, Up)
    return found.payload[0], receive


@pytest.mark.parametrize("target", [ZERO, ONE, None])
def test_a_receiver_runs_behind_the_sender_and_memory_is_held_for_it(model: Model, target: torch.device | None) -> None:
    with model.use(sender := Stream(ZERO)):
        sent = model.computes("x", ZERO)
        found, receive = sends(model, sent, target)
    at = target or ZERO
    with model.use(receiver := Stream(at)):
        assert receive is not None
        assert found.name not in receiver.done
        receive()
        assert {"x", found.name} <= receiver.done
        assert found.device == at
        assert receiver in found.streams
        if at == ONE:
            assert sent.used_on is not sender  # the sender's own work goes on meanwhile
            assert sent.used_on in sent.streams
            assert "copy of x" not in sender.done


def test_every_tensor_of_any_message_is_handed_over(model: Model) -> None:
    """A probe on its way up was read before it had been computed."""
    host: Any = FakeTensor(model, CPU, "h", None)
    with model.use(Stream(ZERO)):
        x: Any = model.computes("x", ZERO)
        message, receive = cuda.hand_over(Probe(0, batch=0, x=x, targets=host, indices=torch.arange(3)), ZERO)
    assert isinstance(message, Probe)
    with model.use(receiver := Stream(ZERO)):
        assert receive is not None
        receive()
        assert receiver.done == {"x", "copy of h"}
        assert receiver in x.streams
    assert (message.x, message.targets.device) == (x, ZERO)
    assert message.indices is not None
    assert message.indices.device == CPU


def test_messages_of_one_sender_do_not_wait_for_another(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for target in (ZERO, ONE):
        with model.use(Stream(ZERO)):
            sends(model, model.computes("slow", ZERO), target)
        monkeypatch.setattr(cuda, "_own", type("Own", (), {})())  # another thread
        with model.use(Stream(ZERO)):
            _, receive = sends(model, model.computes("quick", ZERO), target)
        with model.use(receiver := Stream(target)):
            assert receive is not None
            receive()
            assert "quick" in receiver.done
            assert "slow" not in receiver.done


def test_what_has_no_device_leaves_tensors_where_they_are(model: Model) -> None:
    host, gpu = FakeTensor(model, CPU, "h", None), model.computes("x", ONE)
    message = Up(key=0, batch=0, round=0, indices=None, version=0, payload=(host, gpu))  # type: ignore[arg-type]
    found, receive = cuda.hand_over(message, None)
    assert found is message
    assert receive is not None
    assert cuda.hand_over(Data(0, batch=0, inputs=host), None)[1] is None  # type: ignore[arg-type]


def test_data_from_the_host_is_copied_without_waiting_for_computation(model: Model) -> None:
    model.computes("busy", ZERO)
    message, receive = cuda.hand_over(Data(0, batch=0, inputs=FakeTensor(model, CPU, "h", None)), ZERO)  # type: ignore[arg-type]
    with model.use(receiver := Stream(ZERO)):
        assert receive is not None
        receive()
        assert receiver.done == {"copy of h"}
        assert receiver in message.inputs.streams  # type: ignore[union-attr]


def test_to_the_host_behind_the_computation(model: Model) -> None:
    found, receive = sends(model, model.computes("x", ZERO), CPU)
    assert (found.device, receive) == (CPU, None)


def test_a_lane_begins_behind_the_default_stream_and_is_waited_for(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[Stream] = []
    monkeypatch.setattr(Stream, "synchronize", lambda stream: waited.append(stream))
    model.default[ZERO].done.add("parameters")
    with cuda.lane(ZERO):
        own = model.current[ZERO]
        assert own is not model.default[ZERO]
        assert "parameters" in own.done
        assert waited == []
    assert waited == [own]
    with suppress(KeyError), cuda.lane(ZERO):
        assert model.current[ZERO] is own
        raise KeyError
    assert waited == [own, own]
