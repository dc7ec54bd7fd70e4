"""Specs: a name, or a mapping with a name and options, becomes a call of a function, checked before it is made.

Models and datasets are chosen in a config the same way: ``"mlp"`` or ``{"name": "mlp", "width": 64}``. The options a
function takes are its keyword-only parameters; nothing is listed twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from decoupled.errors import UserError, unknown


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
    """Check that every option is a keyword-only parameter of `function`.

    Raises:
        UserError: an option that `function` does not take, with the nearest one that it does.
    """
    known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise unknown(f"option of {kind} {name!r}:", option, known)


def positive(where: str, **values: object) -> None:
    """Check that every value is an integer of at least 1.

    Raises:
        UserError: names `where`, the option and its value.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{where}: {name} must be an integer of at least 1, got {value!r}")
