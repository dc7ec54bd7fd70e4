"""Streams: the only module that knows them. Between CPU actors nothing here does anything.

    lane(device)                  the actor's thread computes on its device, on a stream of its own
    hand_over(message, device)    sender's thread: copies start on a copy stream of the target device at once, behind
                                  what the sender has queued; nobody waits on the host
    (what it returns)             receiver's thread: its stream waits for the copy, and the allocator learns that the
                                  tensor is used there

Blocks that share a GPU have a stream each, so a tensor is handed over by an event even where it is not copied.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from decoupled.messages import Boundary, Data, Message

_own = threading.local()
_copy_streams: dict[torch.device, torch.cuda.Stream] = {}


@contextmanager
def lane(device: torch.device | None) -> Iterator[None]:
    """Compute on `device`, on this thread's own stream; what was queued before is waited for, and at the end all."""
    if device is None or device.type != "cuda":
        yield
        return
    streams = _own.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    stream = streams[device]
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
    stream.synchronize()


def hand_over(message: Message, device: torch.device | None) -> tuple[Message, Callable[[], None] | None]:
    """Bring the tensors of `message` to `device` (None: leave them where they are).

    Returns:
        The message, and what the receiver's thread must call before it uses it (None: nothing).
    """
    if not torch.cuda.is_initialized():
        return message, None
    tensors = _tensors(message)
    target = device or next((t.device for t in tensors.values() if t.is_cuda), None)
    if target is None or target.type != "cuda":
        moved = {name: t.to(target) for name, t in tensors.items() if target is not None and t.is_cuda}
        return (_with(message, moved) if moved else message), None
    copying = _copy_stream(target)
    for source in {t.device for t in tensors.values() if t.is_cuda}:
        copying.wait_stream(torch.cuda.current_stream(source))
    with torch.cuda.device(target), torch.cuda.stream(copying):
        moved = {name: t.to(target, non_blocking=t.is_cuda or t.is_pinned()) for name, t in tensors.items()}
        done = copying.record_event()
    for t in tensors.values():
        if t.is_cuda:
            t.record_stream(copying)

    def receive() -> None:
        here = torch.cuda.current_stream(target)
        here.wait_event(done)
        for t in moved.values():
            t.record_stream(here)

    return _with(message, moved), receive


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _copy_streams:
        _copy_streams[device] = torch.cuda.Stream(device)
    return _copy_streams[device]


def _tensors(message: Message) -> dict[Any, Tensor]:
    """The tensors that are computed with; sample indices stay on the CPU, where per-sample state is addressed."""
    if isinstance(message, Boundary):
        return dict(enumerate(message.payload))
    if isinstance(message, Data):
        return {n: t for n, t in (("inputs", message.inputs), ("targets", message.targets)) if t is not None}
    return {}


def _with(message: Message, moved: dict[Any, Tensor]) -> Message:
    if isinstance(message, Boundary):
        return replace(message, payload=tuple(moved.get(i, t) for i, t in enumerate(message.payload)))
    return replace(message, **moved)
