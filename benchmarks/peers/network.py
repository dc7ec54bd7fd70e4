"""Two hosts on one machine: network namespaces joined by a veth pair whose ends can be shaped (Linux, root, iproute2).

    namespace a                                      namespace b
    lan 10.77.0.1 --tbf (rate)-- veth --(rate) tbf-- lan 10.77.0.2      rate only, or netem (delay) below tbf
    far           --tbf (rate)--relay--(rate) tbf--  far                delay where the kernel has no netem

Rate and delay hold in each direction, so a round trip has twice the delay. Without netem the addresses are routed over
a second pair of interfaces, whose packets `decoupled.benchmarks.peers.relay` holds back; connections survive the
change. So that they get used to the new line at once, TCP is cubic where the kernel has it (bbr takes the shortest
round trip of the last ten seconds for the line's), and what it has learnt of one connection is not kept for the next.
`close` ends every process in the two namespaces and removes all that was made.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from decoupled.benchmarks.peers import relay

INTERFACE, ADDRESSES = "lan", ("10.77.0.1", "10.77.0.2")
_RELAYED = "far"
_BURST, _QUEUE = "128kb", "50ms"  # of tbf: bytes sent at once, longest wait for a token
_HELD = 20_000  # packets that netem may hold
_CLONE_NEWNET = 0x40000000
_CONTROL = ("congctl", "cubic")
_counter = itertools.count()


class Unavailable(RuntimeError):
    """This machine does not let us make namespaces; the message says why in one line."""


@dataclass(frozen=True)
class Link:
    """What the line carries in each direction: `rate` in Mbit/s (None: as fast as it goes), `delay` in ms."""

    rate: float | None = None
    delay: float = 0.0

    def __post_init__(self) -> None:
        if (self.rate is not None and self.rate <= 0) or self.delay < 0:
            raise ValueError(f"a link needs a positive rate and no negative delay, got {self}")

    @classmethod
    def parse(cls, rate: str | None, delay: str | None) -> Link:
        """Read ``"100mbit"`` or ``"1gbit"``, and ``"5ms"``; None: not shaped.

        Raises:
            ValueError: other units, or no number.
        """
        megabits = None if rate is None else _number(rate, {"kbit": 1e-3, "mbit": 1.0, "gbit": 1e3})
        return cls(megabits, 0.0 if delay is None else _number(delay, {"us": 1e-3, "ms": 1.0, "s": 1e3}))

    def __str__(self) -> str:
        return f"{'full speed' if self.rate is None else f'{self.rate:g} Mbit/s'}, {self.delay:g} ms"


def _number(text: str, units: dict[str, float]) -> float:
    match = re.fullmatch(r"([0-9.]+)\s*([a-z]+)", text.strip().lower())
    if match is None or match[2] not in units:
        raise ValueError(f"{text!r} is not a number with one of the units {', '.join(units)}")
    return float(match[1]) * units[match[2]]


class Network:
    """Two namespaces and the line between them; a context manager.

    Attributes:
        namespaces: their names.
        relays: whether delays go through the relay, because the kernel has no netem (known after the first delay).
        control: what a route is told of TCP's congestion control; empty where the kernel does not let us choose.

    Raises:
        Unavailable: no permission, or no iproute2.
    """

    def __init__(self) -> None:
        if not sys.platform.startswith("linux"):
            raise Unavailable("network namespaces need Linux")
        if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
            raise Unavailable(f"{' and '.join(missing)} not found; install iproute2")
        tag = f"decoupled-{os.getpid()}-{next(_counter)}"
        self.namespaces = (f"{tag}a", f"{tag}b")
        self.relays, self.control = False, _CONTROL
        self._relay: subprocess.Popen[str] | None = None
        _remove_orphans()
        try:
            for name in self.namespaces:
                _do("ip", "netns", "add", name)
                _do("ip", "-n", name, "link", "set", "lo", "up")
            a, b = self.namespaces
            _do("ip", "-n", a, "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", b)
            for name, address in zip(self.namespaces, ADDRESSES, strict=True):
                _do("ip", "-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
                _do("ip", "-n", name, "link", "set", INTERFACE, "up")
                self._forget(name, address)
        except BaseException:
            self.close()
            raise

    def command(self, host: int, *words: str) -> list[str]:
        """The command line that runs `words` on host 0 or 1."""
        return ["ip", "netns", "exec", self.namespaces[host], *words]

    def shape(self, link: Link) -> None:
        """Give the line this rate and delay from now on.

        Raises:
            Unavailable: the kernel cannot do it, not even through the relay.
        """
        for name in self.namespaces:
            self._clear(name)
        if not link.delay:
            self._limit(INTERFACE, link.rate)
        elif self.relays or not self._delay_by_netem(link):
            self.relays = True
            self._delay_by_relay(link.delay)
            self._limit(_RELAYED, link.rate)

    def sent(self) -> tuple[int, int]:
        """Bytes that each host has put on the line so far: one header per segment, before the interface cuts it."""
        totals = []
        for name in self.namespaces:
            interfaces = json.loads(_do("ip", "-n", name, "-s", "-j", "link", "show"))
            totals.append(sum(i["stats64"]["tx"]["bytes"] for i in interfaces if i["ifname"] in (INTERFACE, _RELAYED)))
        return totals[0], totals[1]

    def close(self) -> None:
        """End all processes in the namespaces and remove these; idempotent."""
        if self._relay is not None:
            with self._relay as process:  # waits for it and closes its pipes
                process.kill()
            self._relay = None
        for name in self.namespaces:
            _remove(name)

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _forget(self, name: str, address: str) -> None:
        """Have TCP there get used to a changed line, if the kernel lets us."""
        line = ["10.77.0.0/24", "dev", INTERFACE, "proto", "kernel", "scope", "link", "src", address]
        try:
            _do("ip", "-n", name, "route", "replace", *line, *self.control)
        except Unavailable:
            self.control = ()
        words = "echo 1 > /proc/sys/net/ipv4/tcp_no_metrics_save"
        subprocess.run(["ip", "netns", "exec", name, "sh", "-c", words], capture_output=True, check=False)

    def _clear(self, name: str) -> None:
        """Take all shaping away; each of these may have nothing to do."""
        for words in (
            ["tc", "-n", name, "qdisc", "del", "dev", INTERFACE, "root"],
            ["tc", "-n", name, "qdisc", "del", "dev", _RELAYED, "root"],
            ["ip", "-n", name, "route", "flush", "dev", _RELAYED],
        ):
            subprocess.run(words, capture_output=True, check=False)

    def _limit(self, interface: str, rate: float | None) -> None:
        if rate is not None:
            shape = ("tbf", "rate", f"{rate:g}mbit", "burst", _BURST, "latency", _QUEUE)
            for name in self.namespaces:
                _do("tc", "-n", name, "qdisc", "add", "dev", interface, "root", *shape)

    def _delay_by_netem(self, link: Link) -> bool:
        """Whether the kernel has netem; if so the line is shaped, by netem with tbf above it."""
        netem = ("netem", "delay", f"{link.delay:g}ms", "limit", str(_HELD))
        try:
            for name in self.namespaces:
                _do("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", "handle", "1:", *netem)
                if link.rate is not None:
                    tbf = ("tbf", "rate", f"{link.rate:g}mbit", "burst", _BURST, "latency", _QUEUE)
                    _do("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "parent", "1:1", "handle", "10:", *tbf)
        except Unavailable as error:
            if "kind is unknown" in str(error):
                return False
            raise
        return True

    def _delay_by_relay(self, delay: float) -> None:
        if self._relay is None:
            self._start_relay()
        assert self._relay is not None and self._relay.stdin is not None
        self._relay.stdin.write(f"{delay}\n")
        self._relay.stdin.flush()
        for name, here, there in zip(self.namespaces, ADDRESSES, reversed(ADDRESSES), strict=True):
            _do("ip", "-n", name, "route", "replace", f"{there}/32", "dev", _RELAYED, "src", here, *self.control)

    def _start_relay(self) -> None:
        """Start it, and move the interfaces that it makes into the namespaces."""
        ends = [f"dc{os.getpid()}{letter}" for letter in "ab"]
        words = [sys.executable, relay.__file__, *ends]  # by its file: the package would load torch
        self._relay = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self._relay.stdout is not None
        if self._relay.stdout.readline() != "ready\n":
            raise Unavailable("this kernel has neither the netem packet scheduler nor TUN interfaces: no delays here")
        for end, name in zip(ends, self.namespaces, strict=True):
            _do("ip", "link", "set", end, "netns", name)
            _do("ip", "-n", name, "link", "set", end, "name", _RELAYED)
            _do("ip", "-n", name, "link", "set", _RELAYED, "up")


def join(namespace: str) -> None:
    """Move this process to one of the hosts; before any thread or socket exists."""
    library = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as descriptor:
        if library.setns(descriptor.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    os.environ.update(GLOO_SOCKET_IFNAME=INTERFACE, MASTER_ADDR=ADDRESSES[0])


def _do(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise Unavailable(f"`{' '.join(words)}`: {lines[0]}")
    return done.stdout


def _remove(namespace: str) -> None:
    _kill_all(namespace)
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def _remove_orphans() -> None:
    """Remove what a process that was killed outright has left behind; its number is in the name."""
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False)
    for name, owner in re.findall(r"^(decoupled-(\d+)-\d+[ab])\b", done.stdout, re.MULTILINE):
        if not os.path.exists(f"/proc/{owner}"):
            _remove(name)


def _kill_all(namespace: str, grace: float = 3.0) -> None:
    """End whatever runs in the namespace, politely first."""
    deadline = time.monotonic() + grace
    sent = signal.SIGTERM
    while pids := _pids(namespace):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, sent)
        if time.monotonic() > deadline + grace:
            return
        sent = signal.SIGKILL if time.monotonic() > deadline else signal.SIGTERM
        time.sleep(0.1)


def _pids(namespace: str) -> Sequence[int]:
    done = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    return [int(word) for word in done.stdout.split()]
