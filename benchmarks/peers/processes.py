"""This library's contestants with one process per block, on one host or two."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch.nn import functional as F

from decoupled import Trainer, registry
from decoupled.benchmarks.peers.setting import Run, Setting, sgd
from decoupled.benchmarks.peers.slowed import Slowed
from decoupled.method import Method
from decoupled.order import free
from decoupled.runtime.processes import Processes


def build(setting: Setting, rank: int, method: Any, credit: int = 0, slow: bool = False) -> dict[str, Run]:
    """One trainer with two blocks, open for the whole benchmark; a run is one call of `fit`.

    Args:
        method: name, or mapping with options.
        credit: not 0: in the order ``free(credit)`` instead of the method's own.
        slow: let the upper block take twice its time, see `slowed`.
    """
    _launch(rank)
    point = registry.make(method)
    lower, upper = setting.halves()
    trainer = Trainer(
        [lower, Slowed(upper) if slow else upper],
        freed(point, credit) if credit else point,
        loss=F.cross_entropy,
        optimizer=sgd,
        runtime=Processes(intra_op=1),
    )

    def run(batches: int) -> None:
        trainer.fit(setting.batches(batches) if rank == 0 else ())

    return {"run": run}


def _launch(rank: int) -> None:
    """Tell the runtime what torchrun would: who this is, and where all meet."""
    port = [_port()]
    dist.broadcast_object_list(port)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.update(MASTER_PORT=str(port[0]), RANK=str(rank), WORLD_SIZE=str(dist.get_world_size()))


def _port() -> int:
    """One that is free, and below those that the system gives out: the next connection would take such a one again."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port
    raise OSError("no free port between 20000 and 32000")


def freed(method: Method, credit: int) -> Method:
    """`method` in the order that arrivals decide, at most `credit` passes of a block unanswered."""
    facts = replace(method.facts, in_flight=lambda k, K: credit)  # how many messages its edges hold follows from this
    return replace(method, order=free(credit), facts=facts)
