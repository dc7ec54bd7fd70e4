"""What the processes of one host share: memory, descriptors, a clock."""

from __future__ import annotations

import mmap
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from decoupled.doctor.finding import Finding, ok, problem, warning
from decoupled.doctor.process import child

LIMIT = 4.0  # seconds for a child
MIB = 1 << 20
SHM = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")
PINGS = 50


def memory() -> Iterator[Finding]:
    """/dev/shm has room."""
    try:
        state = os.statvfs(SHM)
    except OSError:
        yield warning("shared memory", f"no {SHM}", "nothing for one process; on Linux, mount a tmpfs there")
        return
    free, total = (blocks * state.f_frsize / MIB for blocks in (state.f_bavail, state.f_blocks))
    says = f"{SHM}: {free:,.0f} of {total:,.0f} MiB free"
    if not os.access(SHM, os.W_OK):
        yield problem("shared memory", f"{SHM} cannot be written to", f"mount a tmpfs on {SHM}, or change its rights")
    elif free < 256:
        remedy = "remove what is left there, or start the container with --shm-size=1g or --ipc=host"
        yield warning("shared memory", f"{says}: little for data loaders and messages", remedy)
    else:
        yield ok("shared memory", says)


def mapping() -> Iterator[Finding]:
    """A shared mapping (memfd) can be handed to a process that is no relative, over an abstract Unix socket."""
    if not hasattr(os, "memfd_create"):
        yield warning("mapping", "no memfd_create on this system", "nothing for one process; several need Linux")
        return
    try:
        answer = _exchange(f"decoupled-doctor-{os.getpid()}")
    except OSError as error:
        says = f"another process cannot use a shared mapping ({error.strerror or error})"
        yield problem("mapping", says, "allow memfd_create and Unix sockets in the sandbox (seccomp profile)")
        return
    if answer == b"pinggnip":
        yield ok("mapping", "passed to another process, written by both")
    else:
        says = f"what another process wrote does not arrive ({answer!r})"
        yield problem("mapping", says, "use a file system and sandbox with shared memory")


def _exchange(name: str) -> bytes:
    descriptor = os.memfd_create(name)
    try:
        os.ftruncate(descriptor, mmap.PAGESIZE)
        with mmap.mmap(descriptor, 0) as shared, socket.socket(socket.AF_UNIX) as listener:
            shared[:4] = b"ping"
            listener.settimeout(LIMIT)
            listener.bind(f"\0{name}")
            listener.listen(1)
            with child(LIMIT, "mapping", f"@{name}"), listener.accept()[0] as peer:
                peer.settimeout(LIMIT)
                socket.send_fds(peer, [b"!"], [descriptor])
                peer.recv(1)
                return shared[:8]
    finally:
        os.close(descriptor)


def limits() -> Iterator[Finding]:
    """Enough open files, and memory that may be locked where InfiniBand needs it."""
    import resource  # not on every system

    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    says = "no limit on" if files == resource.RLIM_INFINITY else f"{files:,}"
    if files != resource.RLIM_INFINITY and files < 1024:
        highest = "unlimited" if most == resource.RLIM_INFINITY else most
        yield warning("open files", f"{says} at most: few for workers and connections", f"ulimit -n {highest}")
    else:
        yield ok("open files", f"{says} at most" if files != resource.RLIM_INFINITY else says.replace(" on", ""))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    says = "no limit" if locked == resource.RLIM_INFINITY else f"{locked / MIB:,.0f} MiB at most"
    if INFINIBAND.is_dir() and locked != resource.RLIM_INFINITY:
        yield warning(
            "locked memory", f"{says}, and InfiniBand wants more", "ulimit -l unlimited, or NCCL_IB_DISABLE=1"
        )
    else:
        yield ok("locked memory", says)


def clock() -> Iterator[Finding]:
    """perf_counter is fine, and the same for all processes: the timelines of several are drawn on it."""
    info = time.get_clock_info("perf_counter")
    if info.resolution > 1e-5:
        says = f"perf_counter counts in steps of {info.resolution:g} s"
        yield warning("clock", says, "do not trust times of short operations")
    with child(LIMIT, "clock") as other:
        assert other.stdin is not None and other.stdout is not None
        best, offset = float("inf"), 0.0
        for _ in range(PINGS):
            asked = time.perf_counter()
            other.stdin.write("\n")
            other.stdin.flush()
            answer = other.stdout.readline()
            answered = time.perf_counter()
            if answered - asked < best:
                best, offset = answered - asked, float(answer) - (asked + answered) / 2
    if abs(offset) <= best / 2 + 50e-6:
        yield ok("clock", f"the same in another process, as far as {best * 1e6:.0f} us there and back can tell")
    else:
        says = f"another process's clock is {offset:+.6f} s off ({best * 1e6:.0f} us there and back)"
        yield warning("clock", says, "lanes of several processes in a trace are shifted by as much; use another host")
