"""What torchrun has told this process: complete, and free of contradictions."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

from decoupled.doctor.finding import Finding, ok, problem

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
REMEDY = "unset them all, or start with torchrun, which sets them"


def torchrun() -> Iterator[Finding]:
    """The variables of torchrun are all there, or none is."""
    names = (*NUMBERS, "MASTER_ADDR")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not given:
        yield ok("torchrun", "not started by it: one process")
        return
    if missing := [name for name in names if name not in given]:
        yield problem("torchrun", f"{', '.join(given)} set, but not {', '.join(missing)}", REMEDY)
        return
    if wrong := [f"{name}={given[name]!r}" for name in NUMBERS if not given[name].isdecimal()]:
        yield problem("torchrun", f"{', '.join(wrong)}: no number", REMEDY)
        return
    rank, world, local, per_host, port = (int(given[name]) for name in NUMBERS)
    rules = {
        f"RANK={rank} is not below WORLD_SIZE={world}": rank < world,
        f"LOCAL_RANK={local} is not below LOCAL_WORLD_SIZE={per_host}": local < per_host,
        f"LOCAL_WORLD_SIZE={per_host} is more than WORLD_SIZE={world}": per_host <= world,
        f"LOCAL_RANK={local} is more than RANK={rank}": local <= rank,
        f"MASTER_PORT={port} is no port": 0 < port < 1 << 16,
    }
    if broken := [rule for rule, holds in rules.items() if not holds]:
        yield problem("torchrun", "; ".join(broken), REMEDY)
        return
    address = given["MASTER_ADDR"]
    try:
        found = socket.getaddrinfo(address, port)[0][4][0]
    except OSError as error:
        remedy = "give torchrun an address of the first host (--master-addr or --rdzv-endpoint)"
        yield problem("torchrun", f"MASTER_ADDR={address} does not resolve ({error.strerror})", remedy)
        return
    if several_hosts() and str(found).startswith("127."):
        remedy = "give torchrun an address of the first host that the others can reach"
        yield problem("torchrun", f"{world} ranks on several hosts, but MASTER_ADDR={address} is this host", remedy)
        return
    yield ok("torchrun", f"rank {rank} of {world}, {per_host} on this host, meeting at {address}:{port}")


def local_ranks() -> int:
    """Processes of this run on this host."""
    return _number("LOCAL_WORLD_SIZE")


def several_hosts() -> bool:
    """Whether this run has processes on other hosts."""
    return _number("WORLD_SIZE") > local_ranks()


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return max(1, int(text)) if text.isdecimal() else 1
