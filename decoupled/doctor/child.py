"""What the doctor does in another process, because it might crash or block there. Run as a script, with a time limit:

    child.py SECONDS clock               reads a line, answers with its clock, and so on
    child.py SECONDS mapping ADDRESS     receives a shared mapping over a Unix socket, reads it and answers in it
    child.py SECONDS gloo RANK FILE      sends and receives with its twin, on loopback and then as torch would by itself

It is no module of the library (nothing but torch is imported), so that it starts fast. The alarm ends it also while it
is stuck in a system call, and also when its parent has gone.
"""

from __future__ import annotations

import json
import mmap
import signal
import socket
import sys
import time
from datetime import timedelta
from typing import Any

NUMBERS = 1 << 18  # float32 in a message: 1 MiB


def clock() -> None:
    for _ in sys.stdin:
        print(repr(time.perf_counter()), flush=True)


def mapping(address: str) -> None:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(address.replace("@", "\0", 1))
        _, (descriptor, *_), _, _ = socket.recv_fds(peer, 1, 1)
        with mmap.mmap(descriptor, 0) as shared:
            shared[4:8] = shared[:4][::-1]
        peer.send(b"!")


def gloo(rank: int, file: str) -> None:
    import torch
    import torch.distributed

    dist: Any = torch.distributed  # it has no types for process groups
    gloo = dist.ProcessGroupGloo
    store = dist.FileStore(file, 2)
    for stage in ("loopback", "interface"):
        print(json.dumps({"stage": stage}), flush=True)
        there = dist.PrefixStore(stage, store)
        if stage == "loopback":
            options = gloo._Options()
            options._devices = [gloo.create_device(hostname="127.0.0.1")]
            group = gloo(there, rank, 2, options)
        else:
            group = gloo(there, rank, 2, timedelta(minutes=1))
        message = torch.arange(NUMBERS, dtype=torch.float32) if rank == 0 else torch.zeros(NUMBERS)
        began = time.perf_counter()
        for sender in (0, 1):
            if sender == rank:
                group.send([message], 1 - rank, sender).wait()
            else:
                group.recv([message], sender, sender).wait()
        seconds = time.perf_counter() - began
        right = bool(torch.equal(message, torch.arange(NUMBERS, dtype=torch.float32)))
        print(json.dumps({"stage": stage, "right": right, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    limit, task, *arguments = sys.argv[1:]
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, float(limit))  # SIGALRM ends the process
    if task == "clock":
        clock()
    elif task == "mapping":
        mapping(*arguments)
    else:
        gloo(int(arguments[0]), arguments[1])
