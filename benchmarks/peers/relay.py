"""A line with a delay, for kernels without netem: two TUN interfaces, and a process that holds every packet back.

    interface a --read--> [packet, due time] ... --write when due--> interface b        and the same from b to a

``python relay.py A B`` makes the interfaces and says ``ready``; each line on its standard
input is the delay in ms from then on, the end of the input ends it. Segments stay as large as TCP made them (up to
64 KiB, the header of virtio travels with them), so a packet costs little.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from contextlib import suppress

_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_TUN, _NO_PROTOCOL, _HEADER = 0x0001, 0x1000, 0x4000  # IFF_TUN, IFF_NO_PI, IFF_VNET_HDR
_CHECKSUM, _LARGE_4 = 0x01, 0x02  # TUN_F_CSUM, TUN_F_TSO4
_LARGEST = 1 << 17  # bytes of a packet, amply
_HELD = 20_000  # packets per direction; what comes on top is lost, as on a real line
_AT_ONCE = 64  # packets read before it is looked whether others are due


def open_interface(name: str) -> int:
    """Make a TUN interface; the descriptor reads and writes its packets."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TUN | _NO_PROTOCOL | _HEADER))
    fcntl.ioctl(descriptor, _TUNSETOFFLOAD, _CHECKSUM | _LARGE_4)
    return descriptor


def relay(ends: tuple[int, int], control: int) -> None:
    """Carry packets between `ends` until `control` ends."""
    delay, held = 0.0, (deque[tuple[float, bytes]](), deque[tuple[float, bytes]]())
    while True:
        due = min((queue[0][0] for queue in held if queue), default=None)
        timeout = None if due is None else max(0.0, due - time.monotonic())
        ready, _, _ = select.select([*ends, control], [], [], timeout)
        if control in ready:
            words = os.read(control, 4096).split()
            if not words:
                return
            delay = float(words[-1]) / 1e3
        for source, queue in zip(ends, held, strict=True):
            if source in ready:
                _read(source, queue, delay)
        for target, queue in zip(reversed(ends), held, strict=True):
            while queue and queue[0][0] <= time.monotonic():
                with suppress(OSError):  # the interface is down, or full
                    os.write(target, queue.popleft()[1])


def _read(source: int, queue: deque[tuple[float, bytes]], delay: float) -> None:
    with suppress(OSError):  # nothing more to read, or the interface is down
        for _ in range(_AT_ONCE):
            packet = os.read(source, _LARGEST)
            if len(queue) < _HELD:
                queue.append((time.monotonic() + delay, packet))


def main(names: list[str]) -> int:
    """Serve until standard input ends."""
    try:
        ends = open_interface(names[0]), open_interface(names[1])
    except OSError as error:
        print(error, flush=True)
        return 1
    with suppress(OSError):  # packets must not wait for a core
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    print("ready", flush=True)
    relay(ends, sys.stdin.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
