"""Records: what every run that is compared says of itself, whatever it trained."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """What a reader needs to know about the machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": device,
        "platform": platform.system(),
    }


def threads() -> str:
    """How many threads PyTorch has for one operation, in words."""
    count = torch.get_num_threads()
    return f"{count} thread" if count == 1 else f"{count} threads"


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def point(held_out: Mapping[str, float], epoch: int, samples: int, seconds: float, loss: float) -> dict[str, Any]:
    """One point of a learning curve."""
    return {
        "epoch": epoch,
        "samples": samples,
        "seconds": seconds,
        "train_loss": loss,
        "validation_accuracy": held_out["accuracy"],
        "validation_loss": held_out["loss"],
    }


def complete(
    record: dict[str, Any],
    epochs: int,
    seed: int,
    final: Mapping[str, float],
    curve: list[dict[str, Any]],
    samples: int,
    seconds: float,
) -> dict[str, Any]:
    """A record of a finished run, with what all of them have."""
    return record | {
        "status": "ok",
        "error": None,
        "seed": seed,
        "test_accuracy": final["accuracy"],
        "test_loss": final["loss"],
        "epochs": epochs,
        "samples": samples,
        "wall_seconds": seconds,
        "samples_per_second": samples / seconds,
        "speedup_over_backprop": None,
        "curve": curve,
        "environment": environment(),
    }
