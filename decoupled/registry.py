"""Names of methods. A method is a function that returns a `Method` (or what trains other things than networks cut into
blocks, by its annotation); its keyword arguments are its options.

    @register("gpipe")
    def gpipe(microbatches: int = 4) -> Method: ...

    make({"name": "gpipe", "microbatches": 8})
    make({"name": "pipedream", "corrections": ["linear_prediction", {"name": "clip", "limit": 1.0}]})

Families live in `decoupled/methods/<family>/method.py` and are found by looking there; other packages announce a module
in the entry-point group `decoupled.methods`. Nothing is listed anywhere else.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar, overload

from decoupled import compensation, correction, prediction  # noqa: F401  (they name corrections)
from decoupled.card import Card
from decoupled.errors import UserError, nearest, unknown
from decoupled.method import Method, corrected
from decoupled.specs import parse, typed

T = TypeVar("T")
GROUP = "decoupled.methods"
_registry: dict[str, _Entry] = {}
_found = False


@dataclass(frozen=True)
class _Entry:
    make: Callable[..., Any]
    family: str
    card: Path

    def makes(self, kind: type) -> bool:
        """Whether it returns a `kind`, as it is annotated."""
        made = typing.get_type_hints(self.make).get("return", Method)
        return isinstance(made, type) and issubclass(made, kind)

    def options(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.make).parameters)


def register(name: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Give the decorated function the method name `name`; its card is `<name>.md` beside its module.

    Raises:
        ValueError: the name is taken by another function.
    """

    def add(make: Callable[..., T]) -> Callable[..., T]:
        taken = _registry.get(name)
        if taken is not None and (taken.make.__module__, taken.make.__qualname__) != (
            make.__module__,
            make.__qualname__,
        ):
            raise ValueError(f"method {name!r} is registered already, by {taken.make.__module__}; choose another name")
        module = Path(inspect.getfile(make))
        _registry[name] = _Entry(make, module.parent.name, module.with_name(f"{name}.md"))
        return make

    return add


def methods(kind: type = Method) -> list[str]:
    """Names of the methods that make a `kind`, sorted; `object`: of all."""
    return sorted(name for name, entry in _all().items() if entry.makes(kind))


def family(name: str) -> str:
    """The family a method belongs to (the folder it is in)."""
    return _entry(name).family


def options(name: str) -> dict[str, Any]:
    """The options of a method with their defaults."""
    return {key: parameter.default for key, parameter in _entry(name).options().items()}


@overload
def make(spec: str | Mapping[str, Any]) -> Method: ...
@overload
def make(spec: str | Mapping[str, Any], kind: type[T]) -> T: ...


def make(spec: str | Mapping[str, Any], kind: type = Method) -> Any:
    """Build a method from a name, or from a mapping with `name` and options (an OmegaConf node is one).

    A `Method` takes `corrections`: a list of names, or mappings with name and options, see `decoupled.correction`.

    Raises:
        UserError: unknown name or option (with the nearest one), an option of the wrong type, corrections that do
            not go with the method, or a method that makes no `kind`.
    """
    name, given = parse("method", spec)
    more = given.pop("corrections", [])
    if isinstance(more, str | Mapping) or not isinstance(more, Sequence):
        raise UserError(f"method {name!r}: corrections must be a list, got {more!r}; write [{{name: ..., ...}}]")
    entry = _entry(name)
    known = entry.options()
    hints = typing.get_type_hints(entry.make)
    for key, value in given.items():
        if key not in known:
            raise UserError(
                f"method {name!r} has no option {key!r}.{nearest(key, known)} Options: {', '.join(known) or 'none'}."
            )
        given[key] = typed(f"method {name!r}: option {key!r}", value, hints.get(key, object))
    method = replace(entry.make(**given), name=name)
    if not isinstance(method, kind):
        raise UserError(f"method {name!r} trains {method.trains}")
    if more and not isinstance(method, Method):
        raise UserError(f"method {name!r} takes no corrections; leave them out")
    return corrected(method, [correction.make(one) for one in more]) if more else method


def card(spec: str | Mapping[str, Any]) -> Card:
    """The card of a method; with a mapping as `make` takes it, the facts are those with these options.

    Raises:
        UserError: as `make`, or a method without a card.
    """
    name, given = parse("method", spec)
    entry = _entry(name)
    if not entry.card.is_file():
        raise UserError(f"method {name!r} has no card; write {entry.card.name} beside its module")
    method: Any = make(spec, object)
    return Card(name, entry.family, entry.card.read_text(encoding="utf-8"), method, options(name) | given)


def _entry(name: str) -> _Entry:
    known = _all()
    if name not in known:
        raise unknown("method", name, known)
    return known[name]


def _all() -> dict[str, _Entry]:
    global _found
    if not _found:
        package = importlib.import_module("decoupled.methods")
        for module in pkgutil.iter_modules(package.__path__):
            if module.ispkg:
                importlib.import_module(f"decoupled.methods.{module.name}.method")
        for point in entry_points(group=GROUP):
            point.load()
        _found = True  # only now: what failed is an error the next time too
    return _registry
