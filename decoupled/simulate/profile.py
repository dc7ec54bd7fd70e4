"""A profile: block times, message sizes and memory of a run that `decoupled train --out DIR` measured.

    DIR/events.jsonl.gz   operations: the mean of each kind at each block, over the later half of those recorded
    DIR/blocks.json       statistics: bytes sent and held, weights
    DIR/config.yaml       method, batch size

Times are those of a minibatch on one device per block. On a GPU an operation is recorded when it has been queued, not
when it is done: profiles are for runs on CPUs. Of a method that replays, the replay is taken out of the backward, and
what one sends in several streams is divided by them, so that another method can be simulated from the profile; what its
graphs take has to be measured with graphs, or given.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf

from decoupled import registry
from decoupled.errors import UserError, first_line
from decoupled.method import Method
from decoupled.observe.events import Events, Operation, Transfer, read
from decoupled.simulate.planned import Planned

STATISTICS = "blocks.json"


@dataclass(frozen=True)
class Profile:
    """Per minibatch and block: seconds, and bytes; `latency`: seconds per message."""

    method: Any
    batch_size: int
    forward: list[float]
    backward: list[float]
    step: list[float]
    latency: float
    activation: list[float]
    weights: list[float]
    graph: list[float]

    @property
    def blocks(self) -> int:
        return len(self.forward)


def load_profile(directory: Path) -> Profile:
    """Read what a run has measured.

    Raises:
        UserError: it is not there, damaged, or of a run that recorded no operations.
    """
    if not directory.is_dir():
        raise UserError(f"profile {directory} does not exist; write one with `decoupled train ... --out {directory}`")
    events = read(directory)
    try:
        blocks = json.loads((directory / STATISTICS).read_text(encoding="utf-8"))
        config: Any = OmegaConf.to_container(OmegaConf.load(directory / "config.yaml"))
        size = int(config["recipe"]["batch_size"])
        return _profile(registry.make(config["method"]), config["method"], events, blocks, size)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"profile {directory} cannot be used ({first_line(error)}); train again with --out") from error


def _profile(method: Method, spec: Any, events: Events, blocks: list[dict[str, Any]], size: int) -> Profile:
    from decoupled.simulate import Load, simulate, tensors_up  # which takes profiles

    K, share = len(blocks), method.feed.share
    rows = [Planned(method, k, K).upper.streams for k in range(K)]
    tensors = tensors_up(method, rows)
    seconds: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for operation in events.of(Operation):
        seconds[operation.actor, operation.name[0]].append(operation.end - operation.start)

    def mean(k: int, kinds: str) -> float:
        found = [seconds[f"block{k}", kind] for kind in kinds if seconds[f"block{k}", kind]]
        return sum(fmean(times[len(times) // 2 :]) for times in found)

    forward = [mean(k, "F") / (share * rows[k]) for k in range(K)]
    if not min(forward):
        raise UserError("the run has recorded no operations of a block; train again, with --events")
    backward = [max(0.0, mean(k, "BIW") / (share * rows[k]) - method.replays(k, K) * forward[k]) for k in range(K)]
    copies = simulate(method, K, 4 * K, load=Load(activation=0, graph=0, weights=1)).held
    weights = [4.0 * block["parameters"] for block in blocks]
    kept = [
        max(0.0, block["peak_held_bytes"] - copies[k] * weights[k])
        / max(1, block["peak_in_flight"])
        / (share * rows[k])
        for k, block in enumerate(blocks)
    ]
    up = [block["bytes_up"] / block["samples"] * size / max(1, tensors[k]) for k, block in enumerate(blocks)]
    under_way = sorted(t.arrived - t.sent for t in events.of(Transfer) if t.kind in ("Up", "Down"))
    return Profile(
        method=spec, batch_size=size, forward=forward, backward=backward, step=[mean(k, "S") for k in range(K)],
        latency=under_way[len(under_way) // 10] if under_way else 0.0,  # the slow ones have waited for room
        activation=up, weights=weights, graph=[kept[k] if method.keeps(k, K) == "graph" else 0.0 for k in range(K)],
    )  # fmt: skip
