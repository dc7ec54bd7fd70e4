"""Two hosts for real: torchrun with one node in each of two network namespaces; `python -m` this module.

    namespace a                                        namespace b
    torchrun --nnodes 2 --node-rank 0   <-- veth -->   torchrun --nnodes 2 --node-rank 1

A small training (`decoupled.benchmarks.peers.training`) runs over the line, optionally shaped, and its final state is
compared with the simulator's, tensor by tensor and bit for bit. Everything that is made is removed again. Exit code: 0
all equal, 1 not, 77 where namespaces are not permitted.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from decoupled.benchmarks.page import exit_on_termination
from decoupled.benchmarks.peers import training
from decoupled.benchmarks.peers.network import ADDRESSES, Link, Network, Unavailable

SKIP = 77  # exit code by which test harnesses know a skipped test
_PORT = "29400"
State = Mapping[str, Tensor]


class TorchrunError(RuntimeError):
    """A node did not end well; the message holds the end of what it wrote."""


def train_on_two_hosts(network: Network, methods: Sequence[str], limit: float = 300.0) -> dict[str, State]:
    """Train with each method across the two hosts of `network`.

    Returns:
        method -> final state, see `training.train`.

    Raises:
        TorchrunError: a node failed, or took longer than `limit` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="two-hosts-") as folder:
        logs = [Path(folder) / f"node{rank}.txt" for rank in range(2)]
        nodes: list[subprocess.Popen[bytes]] = []
        try:
            for rank, log in enumerate(logs):
                words = _torchrun(rank, "-m", "decoupled.benchmarks.peers.training", folder, *methods)
                with log.open("wb") as output:  # a session of its own: Ctrl-C is this process's affair
                    command = network.command(rank, *words)
                    nodes.append(subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True))
            deadline = time.monotonic() + limit
            while any(node.poll() is None for node in nodes):
                if any(node.returncode for node in nodes) or time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            codes = [node.poll() for node in nodes]
        finally:
            for node in nodes:
                _end(node)
        if any(codes) or None in codes:
            fates = zip(range(2), codes, logs, strict=True)
            raise TorchrunError("\n".join(f"node {rank}: {_fate(code)}\n{_tail(log)}" for rank, code, log in fates))
        return {method: torch.load(Path(folder) / f"{method}.pt", weights_only=True) for method in methods}


def _torchrun(rank: int, *program: str) -> list[str]:
    """Static rendezvous: the first node's address is known, so nothing has to be elected."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
        *("--node-rank", str(rank), "--master-addr", ADDRESSES[0], "--master-port", _PORT),
        *program,
    ]


def _end(node: subprocess.Popen[bytes], grace: float = 10.0) -> None:
    if node.poll() is None:
        node.terminate()  # torchrun ends its workers
        try:
            node.wait(grace)
        except subprocess.TimeoutExpired:
            node.kill()
    node.wait()


def _fate(code: int | None) -> str:
    return "did not end in time" if code is None else f"exit code {code}"


def _tail(log: Path, lines: int = 15) -> str:
    """The end of what the training wrote, without what torchrun adds."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return "\n".join(re.split(r"\nE\d+ .*failed \(exitcode", text)[0].splitlines()[-lines:])


def differences(found: State, expected: State) -> list[str]:
    """The names of tensors that are missing, added, or not equal bit for bit."""
    return [
        name
        for name in sorted({*found, *expected})
        if name not in found or name not in expected or not _same(found[name], expected[name])
    ]


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal bits: unlike torch.equal, this tells 0.0 from -0.0 and finds NaN equal to itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))


def compare(link: Link, methods: Sequence[str], say: Callable[[str], None]) -> bool:
    """Train over `link` and on the simulator; whether all states are equal bit for bit.

    Raises:
        Unavailable: no namespaces here. TorchrunError: the training failed.
    """
    start = time.monotonic()
    with Network() as network:
        network.shape(link)
        found = train_on_two_hosts(network, methods)
        how = " (delay by relay: this kernel has no netem)" if network.relays else ""
    say(f"trained over {link}{how}: {time.monotonic() - start:.0f} s with start-up")
    equal = True
    for method in methods:
        expected = training.train(method, "simulated")
        assert expected is not None
        wrong = differences(found[method], expected)
        equal &= not wrong
        numbers = sum(tensor.numel() for tensor in expected.values())
        verdict = f"NOT equal: {', '.join(wrong[:5])}" if wrong else "equal bit for bit"
        say(f"{method}: {len(expected)} tensors, {numbers} numbers, two hosts and simulator {verdict}")
    return equal


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, compare, and say what came out."""
    parser = argparse.ArgumentParser(prog="python -m decoupled.benchmarks.two_hosts", description=__doc__)
    parser.add_argument("--rate", help="of the line, each way, e.g. 100mbit (default: as fast as it goes)")
    parser.add_argument("--delay", help="of the line, each way, e.g. 5ms (default: none)")
    parser.add_argument("--methods", nargs="+", default=training.METHODS, help="with a fixed order")
    given = parser.parse_args(arguments)
    try:
        link = Link.parse(given.rate, given.delay)
    except ValueError as error:
        parser.error(str(error))
    exit_on_termination()
    try:
        return 0 if compare(link, given.methods, lambda line: print(line, flush=True)) else 1
    except Unavailable as error:
        print(f"skipped, no network namespaces here: {error}", file=sys.stderr)
        return SKIP
    except TorchrunError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; everything was removed", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
