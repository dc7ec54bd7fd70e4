"""Tasks by name: a data set, the graph that learns it, and the same model in plain PyTorch.

    @register("list_reduction")
    class ListReduction(Task):
        def __init__(self, *, hidden: int = 128) -> None: ...

    make({"name": "list_reduction", "hidden": 64})

Every module of this folder is looked into when the first name is asked for; nothing is listed anywhere else.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from decoupled.errors import unknown
from decoupled.graph.instance import Task
from decoupled.specs import check_options, parse

Kind = TypeVar("Kind", bound=type[Task])
_TASKS: dict[str, type[Task]] = {}


def register(name: str) -> Callable[[Kind], Kind]:
    """Give the decorated class the task name `name`; the keyword-only parameters of its constructor are its options."""

    def add(kind: Kind) -> Kind:
        if _TASKS.setdefault(name, kind) is not kind:
            raise ValueError(f"task {name!r} is registered already, by {_TASKS[name].__module__}; choose another name")
        kind.name = name
        return kind

    return add


def tasks() -> list[str]:
    """Names of all tasks, sorted."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return sorted(_TASKS)


def make(spec: str | Mapping[str, Any]) -> Task:
    """A task by name, or by a mapping with `name` and options.

    Raises:
        UserError: an unknown task or option, with the nearest one.
    """
    name, options = parse("task", spec)
    if name not in tasks():
        raise unknown("task", name, _TASKS)
    check_options("task", name, _TASKS[name], options)
    return _TASKS[name](**options)
