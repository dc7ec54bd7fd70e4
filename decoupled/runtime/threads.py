"""Threads: one thread per actor in this process; see `decoupled.runtime.local` for how they take turns.

    caller        runs the actors marked `in_caller` (the source: it iterates the user's data) and re-raises failures
    thread k      its actor, on the actor's device: a CUDA device has a stream per actor

Threads start at the first run, live until `close`, and keep their intra-op thread count (cores / blocks).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from decoupled.errors import UserError
from decoupled.runtime import memory
from decoupled.runtime.contract import Graph, Observer, Runtime, Timings, intra_op_threads
from decoupled.runtime.local import LocalRun, Pools


class Threads(Runtime):
    """Runs each actor in its own thread.

    Args:
        intra_op: torch intra-op threads per worker; default: leave as it is.
        patience: seconds a mailbox waits before it looks whether the whole run has stalled.
        keep_memory: let the process keep the memory it frees (until `close`), see `decoupled.runtime.memory`;
            cutting a model by measured time does, too.
    """

    def __init__(self, *, intra_op: int | None = None, patience: float = 20.0, keep_memory: bool = True) -> None:
        if not isinstance(patience, int | float) or not patience > 0:
            raise UserError(f"patience must be a number of seconds above 0, got {patience!r}")
        self._intra_op, self._patience, self._keep_memory = intra_op, patience, keep_memory
        self._pools = Pools(intra_op)

    def run(self, graph: Graph, observers: Sequence[Observer] = ()) -> Timings:
        if self._keep_memory:
            memory.keep()
        run = LocalRun(graph, observers, self._patience)
        start = time.perf_counter()
        with intra_op_threads(self._intra_op):
            run.run(self._pools)
        return Timings(run.busy, run.wait, time.perf_counter() - start)

    def close(self) -> None:
        self._pools.close()
        if self._keep_memory:
            memory.release()
