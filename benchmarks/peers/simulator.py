"""Cost of a large simulation: ``python -m decoupled.benchmarks.peers.simulator 1024 1024`` prints it as JSON.

`measure` runs that command, in a process of its own so that its peak of memory is its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

METHOD = "pipedream"


@dataclass(frozen=True)
class Simulated:
    """What a simulation of `blocks` x `batches` took: wall seconds, peak of memory, and memory before it began."""

    blocks: int
    batches: int
    seconds: float
    peak_bytes: int
    before_bytes: int


def measure(blocks: int, batches: int, limit: float = 600.0) -> Simulated | str:
    """The cost of one simulation, or why there is none."""
    command = [sys.executable, "-m", "decoupled.benchmarks.peers.simulator", str(blocks), str(batches)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=True)
    except subprocess.TimeoutExpired:
        return f"not finished after {limit:.0f} s"
    except subprocess.CalledProcessError as error:
        return f"failed: {error.stderr.strip().splitlines()[-1] if error.stderr.strip() else error}"
    return Simulated(**json.loads(done.stdout))


def _peak_bytes() -> int:
    """Most memory this process has held. (getrusage would count what the parent held when it started this process.)"""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _main(blocks: int, batches: int) -> None:
    from decoupled.simulate import simulate  # loads torch, which is part of the memory before

    before, start = _peak_bytes(), time.perf_counter()
    simulate(METHOD, blocks=blocks, batches=batches)
    seconds = time.perf_counter() - start
    record = {"seconds": seconds, "peak_bytes": _peak_bytes(), "before_bytes": before}
    print(json.dumps({"blocks": blocks, "batches": batches, **record}))


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]))
