"""The network: interfaces, what this host's name stands for, and Gloo between two processes.

Gloo tells its peers to call the address that the host's name resolves to, or that of GLOO_SOCKET_IFNAME. Debian and
Ubuntu resolve the name to 127.0.1.1, an address that means another host to every other host.
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

from decoupled.doctor.finding import Finding, ok, problem, warning
from decoupled.doctor.launch import several_hosts
from decoupled.doctor.process import child

START = 60.0  # seconds for a process to import torch, on a busy machine
LIMIT = 10.0  # seconds for two of them to exchange four messages, from then on
VARIABLE = "GLOO_SOCKET_IFNAME"
IPV6 = Path("/proc/net/if_inet6")
SIOCGIFADDR = 0x8915


def interfaces() -> Iterator[Finding]:
    """The network interfaces and their addresses."""
    found = {name: texts for name, texts in addresses().items() if texts}
    says = ", ".join(f"{name} {' '.join(texts)}" for name, texts in found.items())
    if not found:
        yield problem("interfaces", "none has an address, not even loopback", "bring one up (ip link set lo up)")
    elif not outside(found):
        says += ": this host cannot be reached from others"
        yield warning("interfaces", says, "nothing for one host; for several, connect it")
    else:
        yield ok("interfaces", says)


def host_name() -> Iterator[Finding]:
    """Gloo will name an address that its peers can call."""
    found, several = addresses(), several_hosts()
    chosen = os.environ.get(VARIABLE)
    if chosen:
        yield _chosen(chosen, found, several)
        return
    name, others = socket.gethostname(), outside(found)
    serious = problem if several else warning
    interface = next(iter(others), "NAME")
    remedy = f"export {VARIABLE}={interface} NCCL_SOCKET_IFNAME={interface}, or mend /etc/hosts"
    try:
        meant = str(socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0])
    except OSError as error:
        yield serious("host name", f"{name} does not resolve ({error.strerror})", remedy)
        return
    says = f"{name} is {meant}"
    if not ip_address(meant).is_loopback and not any(meant in texts for texts in found.values()):
        yield problem("host name", f"{says}, which is no address of this host: Gloo cannot use it", remedy)
    elif ip_address(meant).is_loopback and (others or several):
        says += ", which means another host to every other host"
        yield serious("host name", says, f"{'' if several else 'nothing for one host; for several, '}{remedy}")
    else:
        yield ok("host name", says)


def _chosen(chosen: str, found: dict[str, list[str]], several: bool) -> Finding:
    says, names = f"{VARIABLE}={chosen}", chosen.split(",")
    known = ", ".join(name for name, texts in found.items() if texts)
    if missing := [name for name in names if not found.get(name)]:
        state = "has no address" if missing[0] in found else "is no interface"
        return problem("host name", f"{says}: {missing[0]} {state}", f"set it to one of {known}, or unset it")
    if several and not any(name in outside(found) for name in names):
        return problem("host name", f"{says}: other hosts cannot call loopback", f"set it to another of {known}")
    return ok("host name", f"{says}: {' '.join(text for name in names for text in found[name])}")


def gloo() -> Iterator[Finding]:
    """Two processes exchange 1 MiB on loopback, and on the interface that Gloo takes by itself."""
    with tempfile.TemporaryDirectory(prefix="decoupled-doctor-") as folder:
        store = str(Path(folder, "store"))
        with child(START + LIMIT, "gloo", "0", store) as one, child(START + LIMIT, "gloo", "1", store) as two:
            pipes = filter(None, (one.stdout, two.stdout))
            up = all(select.select([pipe], [], [], START)[0] for pipe in pipes)  # has said a word, or ended
            try:
                lines, errors = one.communicate(timeout=LIMIT if up else 0.0)
                how = f"process ended with {one.returncode}: {_reason(errors)}" if errors else "no answer"
            except subprocess.TimeoutExpired as late:
                lines = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
                how = f"no answer within {LIMIT if up else START:g} s"
    stages = [json.loads(line) for line in lines.splitlines()]
    done = {stage["stage"]: stage for stage in stages if "right" in stage}
    if len(done) == 2 and all(stage["right"] for stage in done.values()):
        times = ", ".join(f"{name} {stage['seconds'] * 1e3:.1f} ms" for name, stage in done.items())
        yield ok("gloo", f"1 MiB there and back between two processes: {times}")
        return
    wrong = next((name for name, stage in done.items() if not stage["right"]), None)
    at = wrong or (stages[-1]["stage"] if stages else "start")
    how = "other bytes arrived than were sent" if wrong else how
    remedy = {
        "start": f"check that `python -c 'import torch.distributed'` takes less than {START:g} s",
        "loopback": "check the firewall and the limits of the container: two processes cannot talk on 127.0.0.1",
        "interface": f"export {VARIABLE}={next(iter(outside(addresses())), 'lo')} (on one host: lo)",
    }
    yield problem("gloo", f"two processes, {at}: {how}", remedy[at])


def addresses() -> dict[str, list[str]]:
    """Addresses by interface; IPv6 addresses of one link only are left out."""
    found: dict[str, list[str]] = {name: [] for _, name in socket.if_nameindex()}
    for name in found:
        if address := _ipv4(name):
            found[name].append(address)
    try:
        lines = IPV6.read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    for line in lines:
        digits, *_, name = line.split()
        address = ip_address(int(digits, 16).to_bytes(16, "big"))
        if not address.is_link_local and name in found:
            found[name].append(str(address))
    return found


def outside(found: dict[str, list[str]]) -> dict[str, list[str]]:
    """The interfaces with an address that is not loopback."""
    return {name: texts for name, texts in found.items() if any(not ip_address(text).is_loopback for text in texts)}


def _reason(errors: str) -> str:
    """The last line of a traceback, without the place in Gloo's source."""
    return re.sub(r"\[enforce fail at [^]]*\] ([^.]*\. )?", "", errors.strip().splitlines()[-1])


def _ipv4(name: str) -> str | None:
    try:
        import fcntl  # not on every system

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            answer = fcntl.ioctl(asking, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])
    except (OSError, ImportError):
        return None
