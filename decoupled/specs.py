"""Specs: a name, or a mapping with a name and options, becomes a call of a function, checked before it is made.

Models and datasets are chosen in a config the same way: ``"mlp"`` or ``{"name": "mlp", "width": 64}``. The options a
function takes are its keyword-only parameters, their types its annotations; nothing is listed twice.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from decoupled.errors import UserError, unknown

if TYPE_CHECKING:
    from decoupled.config import Task


def parse(kind: str, spec: str | Mapping[Any, Any]) -> tuple[str, dict[str, Any]]:
    """Take a spec apart into its name and its options.

    Args:
        kind: what is named, for messages, e.g. ``"model"``.
        spec: the name, or a mapping with the key ``name``; every other key is an option.

    Returns:
        The name and a new dictionary of options.

    Raises:
        UserError: `spec` is neither, or has no name.
    """
    if isinstance(spec, str):
        return spec, {}
    if not isinstance(spec, Mapping):
        raise UserError(
            f"a {kind} must be a name or a mapping with a name, got {spec!r}; write NAME or {{name: NAME, ...}}"
        )
    options = {str(key): value for key, value in spec.items()}
    name = options.pop("name", None)
    if not isinstance(name, str):
        glued = any(":" in str(key) for key in spec)  # YAML reads {name:mlp} as one key
        raise UserError(
            f"the {kind} {dict(spec)!r} has no name; write {{name: NAME, ...}}"
            + glued * ", with a space after each colon"
        )
    return name, options


def label(spec: str | Mapping[Any, Any]) -> str:
    """A spec (of a method, mostly) as a short text, ``overlapping_local(reach=3)``; raises as `parse`."""
    name, options = parse("method", spec)
    text = ", ".join(f"{key}={value}" for key, value in options.items())
    return f"{name}({text})" if text else name


def check_options(kind: str, name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Check that every option is a keyword-only parameter of `function`, and of the type it is annotated with.

    Raises:
        UserError: an option that `function` does not take, with the nearest one that it does, or one of another type.
    """
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    known = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
    for option, value in options.items():
        if option not in known:
            raise unknown(f"option of {kind} {name!r}:", option, known)
        typed(f"{kind} {name!r}: option {option!r}", value, known[option])


def typed(what: str, value: object, wanted: Any) -> object:
    """`value`, which is `what`, as the type it is annotated with; whole numbers may be given where any are wanted.

    Raises:
        UserError: it is of another type, or not a number.
    """
    kinds = _kinds(wanted)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = list(value)  # also what OmegaConf has for one
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        return float(value)
    wrong = isinstance(value, bool) and not {bool, object} & {*kinds}
    if wrong or not isinstance(value, kinds):
        raise UserError(f"{what} must be {getattr(wanted, '__name__', str(wanted))}, got {value!r}")
    if isinstance(value, float) and math.isnan(value):
        raise UserError(f"{what} must be a number, got nan")
    return value


def _kinds(wanted: Any) -> tuple[type, ...]:
    """The types that an annotation allows, whatever they hold; what is no type allows all."""
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return tuple(kind for one in typing.get_args(wanted) for kind in _kinds(one))
    kind = typing.get_origin(wanted) or wanted
    known = isinstance(kind, type) and kind not in (Any, inspect.Parameter.empty)
    return (kind,) if known else (object,)


def positive(where: str, **values: object) -> None:
    """Check that every value is an integer of at least 1.

    Raises:
        UserError: names `where`, the option and its value.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{where}: {name} must be an integer of at least 1, got {value!r}")


def check_seed(seed: Any, negative: bool = True) -> None:
    """Check that a seed is an integer, small enough for those that are derived from it to have 64 bits.

    Raises:
        UserError: it is not, or it is negative and must not be.
    """
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not (1 - 2**32) * negative <= int(seed) < 2**32:
        raise UserError(f"seed must be an integer between {'-2**32' if negative else 0} and 2**32, got {seed!r}")


def refuse_ignored(
    task: Task, what: str, keys: Sequence[str], usual: Mapping[str, Any] = types.MappingProxyType({})
) -> None:
    """Refuse `keys` that would change nothing where `what` are trained.

    Args:
        task: what was asked for. usual: its recipe where nothing is said.

    Raises:
        UserError: names the first one.
    """
    default = type(task)(recipe=type(task.recipe)(**usual))
    for key in keys:
        value, other = (getattr(one, key, getattr(one.recipe, key, None)) for one in (task, default))
        if value != other:
            raise UserError(f"{key}={value} means nothing for {what}; leave it out")
