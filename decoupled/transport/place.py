"""Where a process is: which host it counts to, and the address under which others reach it.

Two processes are on the same host if they share kernel and network: same boot, same network namespace. Two network
namespaces of one machine are two hosts, which is how the tests get a second one.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import tempfile
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from decoupled.errors import UserError


@dataclass(frozen=True)
class Address:
    """How other processes reach an endpoint: `local` is a Unix socket of `host` (a leading @: without a file)."""

    host: str
    local: str
    hostname: str
    port: int


def host() -> str:
    """A name of this host that no other one has."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        network = os.stat("/proc/self/ns/net")
        return f"{boot}-{network.st_dev}-{network.st_ino}"
    except OSError:  # not Linux
        return f"{socket.gethostname()}-{uuid.getnode()}"


def reachable(hostname: str | None = None, interface: str | None = None) -> str:
    """The IPv4 address others should use.

    Args:
        hostname: a name or address of this host; wins over everything.
        interface: a network interface; by default the first of GLOO_SOCKET_IFNAME, if that is set.

    Raises:
        UserError: there is no such interface or name.
    """
    if hostname:
        return _resolve(hostname)
    interface = interface or os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0].strip()
    if interface:
        return _of_interface(interface)
    with suppress(UserError):
        if not (address := _resolve(socket.gethostname())).startswith("127."):
            return address
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; asks the system which address it would use
        return probe.getsockname()[0]
    return "127.0.0.1"


def dial(address: Address, same_host: bool, timeout: float) -> socket.socket:
    """A socket connected to `address`; an OSError if that takes more than `timeout` seconds."""
    if not same_host:
        return socket.create_connection((address.hostname, address.port), timeout)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(timeout)
        sock.connect(address.local.replace("@", "\0", 1) if address.local.startswith("@") else address.local)
    except OSError:
        sock.close()
        raise
    return sock


def listen_locally() -> tuple[socket.socket, str]:
    """A listening Unix socket and its name: without a file where the system can, so that nothing is left behind."""
    sock = socket.socket(socket.AF_UNIX)
    name = f"decoupled-{uuid.uuid4().hex}"
    if sys.platform == "linux":
        sock.bind(f"\0{name}")
        local = f"@{name}"
    else:
        local = os.path.join(tempfile.gettempdir(), name)
        sock.bind(local)
        os.chmod(local, 0o600)
    sock.listen(128)
    return sock, local


def _resolve(hostname: str) -> str:
    try:
        return str(socket.getaddrinfo(hostname, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UserError(
            f"host {hostname!r} has no IPv4 address ({error}); give a name or address of this host"
        ) from None


def _of_interface(name: str) -> str:
    known = [interface for _, interface in socket.if_nameindex()]
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            answer = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
        return socket.inet_ntoa(answer[20:24])
    except (OSError, ImportError) as error:
        raise UserError(f"interface {name!r} has no IPv4 address ({error}); known: {', '.join(known)}") from None
