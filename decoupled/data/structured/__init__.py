"""Datasets whose instances have a structure of their own: sequences, trees and graphs; see `instances`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from decoupled.data.structured.babi import babi15
from decoupled.data.structured.bracketed import treebank
from decoupled.data.structured.expressions import listops
from decoupled.data.structured.instances import Graph, Sequence, Structured, Tree
from decoupled.data.structured.molecules import g2, qm9
from decoupled.data.structured.reduction import list_reduction
from decoupled.errors import unknown
from decoupled.specs import check_options, parse

__all__ = [
    "Graph", "Sequence", "Structured", "Tree", "babi15", "g2", "list_reduction", "listops", "load", "names", "qm9",
    "treebank",
]  # fmt: skip

_SOURCES: dict[str, Callable[..., Structured[Any]]] = {
    "list_reduction": list_reduction,
    "listops": listops,
    "treebank": treebank,
    "babi15": babi15,
    "g2": g2,
    "qm9": qm9,
}


def names() -> list[str]:
    """Return the names `load` knows."""
    return list(_SOURCES)


def load(spec: str | Mapping[str, Any], **options: Any) -> Structured[Any]:
    """Load the structured dataset a config asks for.

    Args:
        spec: a name (``"listops"``) or a mapping ``{"name": "treebank", "path": DIR}``.
        options: of the source function; they win over those of the mapping.

    Raises:
        UserError: unknown name or option (with the nearest known one), missing or damaged files.
    """
    name, given = parse("dataset", spec)
    if name not in _SOURCES:
        raise unknown("dataset", name, _SOURCES)
    given.update(options)
    check_options("dataset", name, _SOURCES[name], given)
    return _SOURCES[name](**given)
