"""A ring in the memory of a GPU that two processes share (CUDA IPC): tensors never leave the GPU.

    source   cuMemAlloc, handle  --- "ring" --->   target   opens the handle: the same memory
             copies in: its stream, then the host waits, then PART;  copies out: the same, then RELEASE

No tensor of a training is ever shared, only the ring: it belongs to the source, which gives it back when the target has
closed the edge, as CUDA wants it (what a process that is killed has mapped is the driver's business). PyTorch's
allocator, whose expandable segments cannot be shared that way, is not asked.
The driver is called directly: PyTorch's own sharing leaves a file in /dev/shm behind a process that is killed.

What the driver is like: one process cannot open its own handle; a handle stands for the whole 2 MiB pages that an
allocation is in; containers that do not share the host's process namespace cannot open each other's. Whoever cannot
says so, and the edge goes through the host's memory.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import torch
from torch import Tensor

from decoupled.errors import ProtocolError
from decoupled.transport import cuda
from decoupled.transport.collective import connection
from decoupled.transport.handshake import Conversation, Wish
from decoupled.transport.ring import Ring

_PAGE = 1 << 21
_LARGER = 4  # than the host's ring: it copies faster than two processes agree
_LAZY_PEER_ACCESS = 1  # the only flag that cuIpcOpenMemHandle knows, and it must be given


class DeviceRing(Ring):
    """One end's view.

    Args:
        memory: (bytes,) uint8, shared.
        edge: for errors.
    """

    inline = 1 << 62  # what is in CPU memory goes behind the header

    def __init__(self, memory: Tensor, edge: str) -> None:
        super().__init__(len(memory), max(1, len(memory) // 2), edge)  # both ends can copy at once
        self._memory: Tensor | None = memory
        self.device = memory.device
        self._side = cuda.Side(memory.device)

    def free(self) -> None:
        self._memory = None

    def _copy(self, piece: Tensor, position: int, inwards: bool) -> None:
        assert self._memory is not None
        here = self._memory[position : position + len(piece)]
        target, source = (here, piece) if inwards else (piece, here)
        try:
            with self._side.behind():
                target.copy_(source)
            self._side.finish()
        except RuntimeError as error:  # of this process's own work, perhaps: the other one has not gone
            raise ProtocolError(f"edge {self._edge}: {self.device} cannot copy: {error}") from error


def offer(talk: Conversation, wish: Wish, device: torch.device) -> DeviceRing | None:
    """The source's end, if the target can have the other one."""
    try:
        memory, handle = _allocate(_LARGER * wish.ring, device)
    except OSError:
        memory, handle = None, b""
    talk.say(ring=handle.hex())
    mapped = talk.hear().get("mapped")
    return DeviceRing(memory, wish.edge) if mapped is True and memory is not None else None


def take(talk: Conversation, wish: Wish, device: torch.device) -> DeviceRing | None:
    """The target's end of what the source offers."""
    words = talk.hear().get("ring")
    if type(words) is not str or len(words) not in (0, 2 * ctypes.sizeof(_Handle)):
        raise ProtocolError("no ring arrived while an edge was being opened")
    try:
        memory = _open(bytes.fromhex(words), _LARGER * wish.ring, device)
    except (OSError, ValueError):
        memory = None
    talk.say(mapped=memory is not None)
    return None if memory is None else DeviceRing(memory, wish.edge)


class _Handle(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_byte * 64),)


class _Memory:
    """Memory of a GPU that PyTorch has not allocated; given back when no tensor shows it any more."""

    def __init__(self, device: torch.device, address: int, size: int, give_back: str) -> None:
        self._device, self._address, self._give_back = device, address, give_back
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 2}

    def __del__(self) -> None:
        with contextlib.suppress(Exception), _context(self._device):  # the interpreter may be ending
            _driver(self._give_back, ctypes.c_uint64(self._address))


def _allocate(size: int, device: torch.device) -> tuple[Tensor, bytes]:
    address, handle = ctypes.c_uint64(), _Handle()
    with _context(device):
        _driver("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(-(-size // _PAGE) * _PAGE))
        memory = _Memory(device, address.value, size, "cuMemFree_v2")
        _driver("cuIpcGetMemHandle", ctypes.byref(handle), address)
        return torch.as_tensor(memory, device=device), bytes(handle)


def _open(handle: bytes, size: int, device: torch.device) -> Tensor:
    address, flags = ctypes.c_uint64(), ctypes.c_uint(_LAZY_PEER_ACCESS)
    with _context(device):
        _driver("cuIpcOpenMemHandle_v2", ctypes.byref(address), _Handle.from_buffer_copy(handle), flags)
        return torch.as_tensor(_Memory(device, address.value, size, "cuIpcCloseMemHandle"), device=device)


@contextlib.contextmanager
def _context(device: torch.device) -> Any:
    """With PyTorch's context of that GPU as this thread's."""
    with connection("CUDA"), torch.cuda.device(device):
        torch.cuda.current_stream(device).synchronize()
        yield


def _driver(name: str, *arguments: Any) -> None:
    """Call a function of the CUDA driver.

    Raises:
        OSError: it fails, or there is no driver.
    """
    if status := getattr(ctypes.CDLL("libcuda.so.1"), name)(*arguments):
        raise OSError(f"{name}: error {status} of the CUDA driver")
