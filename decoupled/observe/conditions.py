"""How a comparison was measured, in words: what its runs had in common, and every value of what was swept.

config, points --at--> the configuration of every point --settings, said--> one text per key: "0.1", "0.1 or 0.01"
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from decoupled.observe.points import describe
from decoupled.specs import label

SAID = {
    "suite", "data", "model", "blocks", "runtime", "baseline", "seeds", "seed", "method", "controls", "sweep", "claims",
}  # fmt: skip


def points(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The points of the sweep that have records; one empty point where nothing was swept."""
    every = [record.get("point") or {} for record in results.get("records") or []]
    return list({describe(point): point for point in every}.values()) or [{}]


def at(config: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """A written configuration at one point, as `config.changed` makes it.

    Example:
        >>> at({"model": "mlp", "recipe": {"lr": 0.1}}, {"model.width": 8, "lr": 0.2})
        {'model': {'name': 'mlp', 'width': 8}, 'recipe': {'lr': 0.2}}
    """
    found = deepcopy(dict(config))
    for key, value in point.items():
        _put(found, f"recipe.{key}" if key in (found.get("recipe") or {}) else key, value)
    return found


def _put(node: dict[str, Any], path: str, value: Any) -> None:
    key, dot, rest = path.partition(".")
    old = node.get(key)
    if dot:
        node[key] = old if isinstance(old, dict) else {"name": old}
        _put(node[key], rest, value)
    else:
        node[key] = old | value if isinstance(old, dict) and isinstance(value, dict) else value


def settings(config: Mapping[str, Any], among: Sequence[Mapping[str, Any]] = ({},)) -> dict[str, str]:
    """A config as words, all values that a key has at the points `among`; what the page says elsewhere is left out.

    Example:
        >>> settings({"recipe": {"lr": 0.1, "epochs": 4}}, [{"lr": 0.2}, {"lr": 0.5}])
        {'lr': '0.2 or 0.5', 'epochs': '4'}
    """
    found: dict[str, list[str]] = {}
    for point in among:
        for key, text in _flat(at(config, point)).items():
            found.setdefault(key, []).append(text)
    return {key: _either(texts) for key, texts in found.items()}


def _flat(config: Mapping[str, Any]) -> dict[str, str]:
    """Nested entries side by side, as text."""
    nested = [value for key, value in config.items() if isinstance(value, Mapping) and key not in ("sweep", "claims")]
    flat = {k: v for value in nested for k, v in value.items() if k != "name"}
    said = SAID if config.get("env") else {*SAID, "steps"}
    flat |= {k: v for k, v in config.items() if not isinstance(v, Mapping | list | None) and k not in said}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in flat.items()}


def said(results: Mapping[str, Any]) -> dict[str, str]:
    """Data, model, blocks and runtime of the runs."""
    config, among = results.get("config") or {}, points(results)
    swept = {key.split(".")[0] for point in among for key in point}
    ran = [at(config, point) for point in among]
    found = {key: label(results[key]) for key in ("data", "model", "runtime")}
    if swept & {"data", "task", "env"}:
        found["data"] = _either(label(one.get("env") or one.get("task") or one["data"]) for one in ran)
    found |= {key: _either(label(one[key]) for one in ran) for key in ("model", "runtime") if key in swept}
    counts = {record["blocks"] for record in results.get("records") or [] if record.get("blocks")}
    blocks = _either(map(str, sorted(counts or {results["blocks"]})))
    return found | {"blocks": f"{blocks} block" if blocks == "1" else f"{blocks} blocks"}


def _either(texts: Iterable[str]) -> str:
    """Different texts, joined."""
    return " or ".join(dict.fromkeys(texts))
