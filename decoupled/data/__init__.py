"""Datasets in memory: images or text in three splits, and loaders whose batches are a pure function of a seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from decoupled.data.augment import Augment
from decoupled.data.cifar import cifar10, cifar100
from decoupled.data.dataset import Dataset, Split
from decoupled.data.idx import read_idx
from decoupled.data.loader import Batch, Loader
from decoupled.data.sources import digits, fashion_mnist
from decoupled.data.text import python_source, text
from decoupled.errors import unknown
from decoupled.specs import check_options, parse

__all__ = [
    "Augment", "Batch", "Dataset", "Loader", "Split", "cifar10", "cifar100", "digits", "fashion_mnist", "load", "names",
    "python_source", "read_idx", "text",
]  # fmt: skip

_SOURCES: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "python_source": python_source,
    "text": text,
}


def names() -> list[str]:
    """Return the names `load` knows."""
    return list(_SOURCES)


def load(spec: str | Mapping[str, Any] = "digits", **options: Any) -> Dataset:
    """Load the dataset a config asks for.

    Args:
        spec: a name (``"digits"``) or a mapping ``{"name": "fashion_mnist", "limit": 10000}``.
        options: of the source function, e.g. `split_seed`; they win over those of the mapping.

    Returns:
        The dataset; the same arguments give the same bits.

    Raises:
        UserError: unknown name or option (with the nearest known one), a missing required option, missing or damaged
            files.
    """
    name, given = parse("dataset", spec)
    if name not in _SOURCES:
        raise unknown("dataset", name, _SOURCES)
    given.update(options)
    check_options("dataset", name, _SOURCES[name], given)
    return _SOURCES[name](**given)
