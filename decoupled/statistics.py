"""What a worker counts, and the frozen record a user gets."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

RECENT = 1 << 16  # version triples kept per block


@dataclass
class Counters:
    """Running counts of one worker."""

    samples: int = 0
    updates: int = 0
    skipped: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    busy_seconds: float = 0.0
    wait_seconds: float = 0.0
    loss_sum: float = 0.0
    loss_samples: int = 0
    minibatch: tuple[int, float, float, int] = (-1, 0.0, 0.0, 0)  # number; sums of share * loss, share, samples
    staleness: Counter[int] = field(default_factory=Counter)
    versions: deque[tuple[int, int, int]] = field(default_factory=lambda: deque(maxlen=RECENT))

    def loss(self, value: float, samples: int, share: float, batch: int) -> None:
        """The own objective of one pass was `value`; the mean over those of a minibatch is weighted by `share`."""
        if batch != self.minibatch[0]:
            self._add()
            self.minibatch = (batch, 0.0, 0.0, 0)
        _, total, shares, count = self.minibatch
        self.minibatch = (batch, total + share * value, shares + share, count + samples)

    def _add(self) -> None:
        _, total, shares, samples = self.minibatch
        if samples:
            self.loss_sum += total / shares * samples
            self.loss_samples += samples
        self.minibatch = (-1, 0.0, 0.0, 0)

    def version(self, n: int, forward: int, backward: int) -> None:
        """Pass `n` ran forward with weight version `forward` and met version `backward` in its backward."""
        self.versions.append((n, forward, backward))
        self.staleness[backward - forward] += 1

    def take_loss(self) -> float:
        """Mean objective per sample since the last call (NaN if there was none)."""
        self._add()
        mean = self.loss_sum / self.loss_samples if self.loss_samples else float("nan")
        self.loss_sum, self.loss_samples = 0.0, 0
        return mean

    def record(self, **more: Any) -> BlockStatistics:
        """The counts as a record; `more`: what the worker's parts know."""
        return BlockStatistics(
            samples=self.samples, updates=self.updates, skipped=self.skipped, versions=list(self.versions),
            staleness=dict(sorted(self.staleness.items())), busy_seconds=self.busy_seconds,
            wait_seconds=self.wait_seconds, bytes_up=self.bytes_up, bytes_down=self.bytes_down, **more,
        )  # fmt: skip


@dataclass(frozen=True)
class BlockStatistics:
    """One block since the trainer was made; also readable as a mapping: `statistics()[0]["updates"]`.

    Attributes:
        block: its number.
        device: where it lives.
        samples: samples that went forward.
        updates: optimizer steps.
        skipped: passes dropped because the own objective was not finite.
        versions: the latest (pass, weight version in the forward, weight version at the backward).
        staleness: updates between forward and backward -> number of passes.
        busy_seconds, wait_seconds: in operations; waiting for messages or for room (virtual in `simulated`).
        bytes_up, bytes_down: payload bytes sent to the block above and to the block below.
        peak_held_bytes: most bytes kept for passes in flight: inputs, saved activations, frozen weight copies.
        correction_bytes: kept by corrections for good: averages and last changes of weights. Not in `peak_held_bytes`.
        peak_in_flight: most passes kept at once.
        parameters: number of weights of the block.
        auxiliary_parameters: number of weights of its coupling halves (heads; dropped when the network is used).
        edge: what the method measures about the edge above, by name, in the latest epoch (residuals); often empty.
        overflows: gradients that were not finite although the loss was, so that a step was skipped (loss scaling).
        loss_scale: of the own objective, at the end; 1 if none is scaled.
        reused, dropped: batches that its intake gave it once more, and that it replaced unused (0 without an intake).
    """

    block: int
    device: str
    samples: int
    updates: int
    skipped: int
    versions: list[tuple[int, int, int]]
    staleness: dict[int, int]
    busy_seconds: float
    wait_seconds: float
    bytes_up: int
    bytes_down: int
    peak_held_bytes: int
    peak_in_flight: int
    parameters: int
    auxiliary_parameters: int
    edge: dict[str, float] = field(default_factory=dict)
    overflows: int = 0
    loss_scale: float = 1.0
    reused: int = 0
    dropped: int = 0
    correction_bytes: int = 0

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)
