"""Streams: the only module that knows them. Between CPU actors nothing here does anything.

    lane(device)                  the actor's thread computes on its device, on a stream of its own
    hand_over(message, device)    sender's thread: an event marks what it has queued; what must move is copied behind
                                  that on copy streams of the sender's own, so nobody waits on the host
    (what it returns)             receiver's thread: its stream waits for the events, and the allocator learns that the
                                  tensors are used there

Blocks that share a GPU have a stream each, so a tensor is handed over by an event even where it is not copied. Copy
streams are not shared between senders: what one has queued would hold up the messages of another.

What the CUDA code relies on (PyTorch's notes "CUDA semantics", and `Tensor.record_stream`): memory belongs to the
stream that was current when it was allocated, and a tensor that another stream uses must be recorded there before its
last reference goes; a copy between two GPUs runs on the current stream of the *source* device, behind and before the
current stream of the target's; `non_blocking` means nothing for pageable memory on the way to a GPU, and on the way
from a GPU nobody may look before the stream has been waited for.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, distributed

from decoupled.messages import Message

Place = tuple[str, int]  # of a tensor in a message: the field, and which of its tuple

_own = threading.local()


def nothing() -> None:
    """What is to be done where nothing is."""


@contextmanager
def lane(device: torch.device | None) -> Iterator[None]:
    """Compute on `device`, on this thread's own stream; what was queued before is waited for, and at the end all."""
    if not _is_gpu(device):
        yield
        return
    stream = _stream("lane", device)
    stream.wait_stream(torch.cuda.default_stream(device))
    try:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            yield
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the error under way says more
            stream.synchronize()
        raise
    stream.synchronize()


def hand_over(message: Message, device: torch.device | None) -> tuple[Message, Callable[[], None] | None]:
    """Bring the tensors of `message` to `device` (None: leave them where they are).

    Returns:
        The message, and what the receiver's thread must call before it uses it (None: nothing).
    """
    if not _is_gpu(device) and not torch.cuda.is_initialized():
        return message, None
    tensors = _tensors(message)
    if device is not None and device.type != "cuda":  # the copy is complete when `to` returns
        moved = {name: t.to(device) for name, t in tensors.items() if t.is_cuda}
        return (_with(message, moved) if moved else message), None
    here = {d: torch.cuda.current_stream(d) for d in {t.device for t in tensors.values() if t.is_cuda}}
    staying = {name: t for name, t in tensors.items() if t.is_cuda and device in (None, t.device)}
    events = [(d, here[d].record_event()) for d in {t.device for t in staying.values()}]
    moved = {name: t for name, t in tensors.items() if device is not None and t.device != device}
    if moved:
        assert device is not None
        moved = _copy(moved, device, here)
        events.append((device, _stream("copy", device).record_event()))
    used = [*staying.values(), *(t for t in moved.values() if t.is_cuda)]
    if not events:
        return message, None

    def receive() -> None:
        for d, event in events:
            torch.cuda.current_stream(d).wait_event(event)
        for t in used:
            t.record_stream(torch.cuda.current_stream(t.device))

    return _with(message, moved) if moved else message, receive


def to_host(tensors: Sequence[Tensor], keep: torch.device | None) -> list[Tensor]:
    """Bring dense tensors to CPU memory (pinned, from CUDA), those on the device `keep` excepted; they have arrived."""
    found: list[Tensor] = []
    waited_for: set[torch.device] = set()
    for t in tensors:
        if t.device == keep or t.device.type == "cpu":
            found.append(t)
        elif t.is_cuda:
            pinned = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, pin_memory=True)
            found.append(pinned.copy_(t, non_blocking=True))
            waited_for.add(t.device)
        else:
            found.append(t.cpu())
    for device in waited_for:
        torch.cuda.current_stream(device).synchronize()
    return found


def computed(device: torch.device | None) -> Callable[[], None]:
    """What waits, in any thread, until all that the present stream has queued on `device` is done."""
    if not _is_gpu(device):
        return nothing
    event = torch.cuda.Event(blocking=True)  # sleeps rather than spins
    event.record(torch.cuda.current_stream(device))
    return lambda: None if event.query() else event.synchronize()


def identity(device: torch.device | None) -> str:
    """The UUID of a GPU that NCCL can use; "" for everything else."""
    if not _is_gpu(device) or not (distributed.is_available() and distributed.is_nccl_available()):
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)


class Side:
    """A stream of transfers that the host waits for. On a CPU: nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if _is_gpu(device) else None

    @contextmanager
    def behind(self) -> Iterator[None]:
        """Queue on it, behind what the caller's stream has queued."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # fresh memory may still be in use there
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    def finish(self) -> None:
        """Wait until all is done: then no stream has to be told of it."""
        if self._stream is not None:
            self._stream.synchronize()


def _is_gpu(device: torch.device | None) -> bool:
    return device is not None and device.type == "cuda"


def _stream(kind: str, device: torch.device | None) -> torch.cuda.Stream:
    """This thread's stream of that kind."""
    streams = _own.__dict__.setdefault("streams", {})
    if (kind, device) not in streams:
        streams[kind, device] = torch.cuda.Stream(device)
    return streams[kind, device]


def _copy(tensors: dict[Place, Tensor], device: torch.device, here: dict[torch.device, Any]) -> dict[Place, Tensor]:
    """Start to copy to `device`, behind the present streams `here`; the copies belong to its copy stream."""
    sources = {t.device for t in tensors.values() if t.is_cuda}
    with contextlib.ExitStack() as current:
        for source in sources:  # where the copies run
            _stream("copy", source).wait_stream(here[source])
            current.enter_context(torch.cuda.stream(_stream("copy", source)))
        current.enter_context(torch.cuda.stream(_stream("copy", device)))  # last: makes its device the current one
        copies = {name: t.to(device, non_blocking=t.is_cuda or t.is_pinned()) for name, t in tensors.items()}
    for t in tensors.values():
        if t.is_cuda:
            t.record_stream(_stream("copy", t.device))
    return copies


def _tensors(message: Message) -> dict[Place, Tensor]:
    """The tensors that are computed with; sample indices stay on the CPU, where per-sample state is addressed."""
    found: dict[Place, Tensor] = {}
    for name in _computed(type(message)):
        value = getattr(message, name)
        for i, t in enumerate(value if type(value) is tuple else (value,)):
            if isinstance(t, Tensor):
                found[name, i] = t
    return found


@functools.cache
def _computed(kind: type[Message]) -> tuple[str, ...]:
    """The fields that can hold such tensors."""
    return tuple(f.name for f in fields(kind) if f.name not in ("key", "indices"))


def _with(message: Message, moved: dict[Place, Tensor]) -> Message:
    changed: dict[str, Any] = {}
    for name in {name for name, _ in moved}:
        value = getattr(message, name)
        several = tuple(moved.get((name, i), t) for i, t in enumerate(value)) if type(value) is tuple else None
        changed[name] = moved[name, 0] if several is None else several
    return replace(message, **changed)
