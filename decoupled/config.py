"""Typed configuration of the commands: dataclasses are the single truth, YAML files and key=value words fill them.

Later wins: defaults < suite (compare) < --config file < key=value. Unknown keys are errors with the nearest name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from decoupled import registry
from decoupled.errors import UserError, nearest
from decoupled.specs import label

T = TypeVar("T")
# What `Recipe` says of images suits neither policies nor graphs of nodes: with env= or task=, these are the defaults
RECIPES: dict[str, dict[str, Any]] = {
    "env": {"optimizer": "adam", "lr": 3e-4, "batch_size": 256, "schedule": "constant"},
    "task": {"optimizer": "adam", "lr": 2e-3},
}
USUAL = {"env": "rl_small", "task": "tasks"}  # and these the suites; of networks: quick
SUITES = Path(__file__).resolve().parent / "benchmarks" / "suites"


@dataclass
class Recipe:
    """How to train: the same for every method."""

    optimizer: str = "sgd"  # sgd | adam | adamw | soap | muon
    lr: float = 0.1
    momentum: float = 0.9  # sgd only
    weight_decay: float = 0.0
    schedule: str = "cosine"  # cosine | constant, over the block's own updates
    batch_size: int = 64
    epochs: int = 10
    augment: bool = False  # the data set's own augmentation (crop, flip)


@dataclass
class Task:
    """What to train."""

    data: Any = "digits"  # a name, or {name: fashion_mnist, path: DIR}
    model: Any = "resnet8"  # a name, or {name: mlp, width: 64}
    blocks: Any = 2  # a number (balanced by measured time), or a list of cut indices
    runtime: Any = "threads"  # threads | simulated | processes, or {name: processes, processes: 2, heartbeat: 30}
    task: Any = None  # instead of data and model: a graph's task, by name, or {name: list_reduction, hidden: 64}
    env: Any = None  # instead of data and model: an environment of gymnasium, or {name: HalfCheetah-v5, ...}
    steps: int = 10_000  # with env: environment steps; evaluated after each of `epochs` parts of them
    actors: int | None = None  # with env: that act beside the learner; 0: one loop; default: the method's
    precision: Any = "float32"  # float32 | bf16 | fp16 (autocast), or {name: fp16, scale: 1024}, or one per block
    recipe: Recipe = field(default_factory=Recipe)


@dataclass
class TrainConfig(Task):
    """`decoupled train`."""

    method: Any = MISSING  # a name, or {name: overlapping_local, reach: 2}
    seed: int = 0
    on_nonfinite: str = "stop"  # stop | skip
    resume: str | None = None  # a checkpoint written by an earlier run
    other_method: bool = False  # with resume: of another method (a warm-up), whose own state is left behind
    restarts: int = 0  # how often to begin again, after the last epoch that ended, when a process is lost


@dataclass
class CompareConfig(Task):
    """`decoupled compare`."""

    suite: str = "quick"  # a file of benchmarks/suites, or a path
    methods: Any = field(default_factory=list)  # names or mappings, or one of them; empty: all registered
    controls: bool = True  # plain PyTorch, and earlier blocks frozen at initialisation
    baseline: str = MISSING  # the method that speed-ups are relative to
    seeds: int = 3  # runs per method, seeds 0, 1, ...
    sweep: Any = field(default_factory=dict)  # key -> values, {lr: [0.1, 0.01]}: all methods at all combinations
    cutoffs: Any = field(default_factory=list)  # validation losses: what it costs, and how long it takes, to reach them
    claims: Any = field(default_factory=list)  # orders of methods to be held against the results, see observe.claims


@dataclass
class SimulateConfig:
    """`decoupled simulate`; times and sizes in any units. What may be None comes from the profile, if there is one."""

    method: Any = MISSING  # one, or a list of them
    blocks: int | None = None  # default 4
    batches: int = 64
    forward: Any = None  # per minibatch; this and the next two: a number, or one per block. Default 1
    backward: Any = None  # default 2
    step: Any = None  # default 0
    latency: float | None = None  # per message, one way; default 0
    bandwidth: float = 0.0  # size per time of one direction of a link; 0: no limit
    activation: Any = None  # size of what goes up; this and the next two per minibatch, one number or one per block
    graph: Any = None  # size of what a forward saves; default 1
    weights: Any = None  # size of a block's weights; default 1
    optimizer: float = 1.0  # copies of the weights that the optimizer keeps
    memory: Any = None  # of a device, a number or one per block; default: no limit
    profile: str | None = None  # what `decoupled train --out DIR` wrote: measured times and sizes
    sweep: dict[str, Any] = field(default_factory=dict)  # {latency: [0, 1, 2]}
    jitter: float = 0.0  # relative spread of all durations
    slow: dict[int, float] = field(default_factory=dict)  # block -> factor on its durations
    seed: int = 0
    timeline: int = 5  # passes to draw; 0: none


@dataclass
class FlopsConfig:
    """`decoupled flops`."""

    method: Any = MISSING  # a name, or a mapping with options
    model: Any = "resnet8"  # as for train
    data: Any = "digits"  # as for train: shape, type and classes
    inputs: Any = None  # shape of one sample, e.g. [3072], in place of data
    classes: int = 10  # with inputs
    blocks: Any = 2  # as for train
    skip: bool = True  # leave out input gradients that nobody needs; false: every backward is twice a forward
    update: float = 2.0  # FLOPs per weight and step: 2 SGD, 4 with momentum, 13 Adam


@dataclass
class InfoConfig:
    """`decoupled info`."""

    method: Any = MISSING  # a name, or a mapping with options
    blocks: int = 4  # that the facts are given for


def read(kind: type[T], words: Sequence[str], file: str | None = None) -> T:
    """Build a configuration.

    Args:
        kind: the dataclass.
        words: ``key=value`` or ``recipe.lr=0.1``; the keys of `Recipe` may be written without ``recipe.``.
        file: a YAML file with the same keys.

    Raises:
        UserError: unknown key (with the nearest), wrong type, missing file, unreadable YAML.
    """
    base = OmegaConf.structured(kind)
    parts = [_words(kind, words)]
    if file is not None:
        parts.insert(0, _file(Path(file)))
    if kind is CompareConfig:
        usual = USUAL.get(_trained(parts), "quick")
        suite = next((part["suite"] for part in reversed(parts) if "suite" in part), usual)
        parts.insert(0, _file(_suite(str(suite))) | {"suite": str(suite)})
    if issubclass(kind, Task):
        parts.insert(0, dict(RECIPES.get(_trained(parts), {})))
    method = next((part["method"] for part in reversed(parts) if "method" in part), None)
    for key, value in (pair for part in parts for pair in _nested(kind, part).items()):
        with _explained(kind, key, value, method):
            base = OmegaConf.merge(base, OmegaConf.create({key: value}))
    with _explained(kind):
        return cast(T, OmegaConf.to_object(base))


def changed(config: T, values: Mapping[str, Any]) -> T:
    """A copy of a configuration with other values.

    Args:
        config: a `Task`.
        values: by key; keys of `Recipe` may be written without ``recipe.``, and dots reach into mappings
            (``model.width``). A mapping is merged into what is there.

    Raises:
        UserError: unknown key (with the nearest), or wrong type.

    Example:
        >>> changed(TrainConfig(method="x"), {"lr": 0.2}).recipe.lr
        0.2
    """
    base, recipe = OmegaConf.structured(config), {f.name for f in fields(Recipe)}
    with _explained(type(config)):
        for key, value in values.items():
            whole, dot, _ = key.partition(".")
            if dot and isinstance(name := getattr(config, whole, None), str):
                OmegaConf.update(base, whole, {"name": name})  # a name is short for a mapping
            OmegaConf.update(base, f"recipe.{key}" if key in recipe else key, value, merge=True)
        return cast(T, OmegaConf.to_object(base))


@contextmanager
def _explained(kind: type, at: str = "", value: object = None, method: object = None) -> Iterator[None]:
    """Errors of OmegaConf at key `at` as one line that names the key and the remedy."""
    try:
        yield
    except (ConfigAttributeError, ConfigKeyError) as error:
        key, like = str(error.key), nearest(str(error.key), _known(kind))
        option = key in _options(method)
        inside = f" An option of the method goes inside it: method={{name: NAME, {key}: ...}}." * (
            hasattr(kind, "method") and (option or not like)
        )
        like = "" if option else like
        raise UserError(f"unknown key {key!r}.{like} Known: {', '.join(_known(kind))}.{inside}") from None
    except MissingMandatoryValue as error:
        missing = str(error).split(":")[-1].strip().split()[0]
        raise UserError(f"{missing} is missing; write {missing}=..., e.g. {missing}=NAME (`decoupled list`)") from None
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0] + f" (key {error.full_key or error.key!r})") from None
    except TypeError as error:  # OmegaConf's, a list where a suite or file has a mapping, or the reverse
        if not at:
            raise UserError(f"{str(error).splitlines()[0]}; give a key the kind of value that it has") from None
        form = "{KEY: VALUE, ...}" if isinstance(value, list) else "[VALUE, ...]"
        raise UserError(f"{at} cannot be {value!r}; write {at}={form}") from None


def plain(config: object) -> dict[str, Any]:
    """A configuration as plain data, to be written beside the results."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def suites() -> list[str]:
    """Names of the suites that come with the library."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def suite_methods(name: str) -> list[Any]:
    """The methods that a suite lists; empty: all."""
    listed = _file(_suite(name)).get("methods", [])
    return listed if isinstance(listed, list) else [listed]


def _options(method: object) -> Collection[str]:
    """The options of a method as it is written in a configuration; none if it is not known."""
    name = method.get("name") if isinstance(method, Mapping) else method
    return registry.options(str(name)) if name in registry.methods(object) else ()


def baseline(config: CompareConfig) -> Any:
    """The method that speed-ups are relative to: what the suite lists under this label, else a name."""
    return next((spec for spec in suite_methods(config.suite) if label(spec) == config.baseline), config.baseline)


def _words(kind: type, words: Sequence[str]) -> dict[str, Any]:
    for word in words:
        if "=" not in word or word.startswith("="):
            raise UserError(f"{word!r} is not key=value; known keys: {', '.join(_known(kind))}")
    try:
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist(list(words))))
    except Exception as error:
        raise UserError(f"cannot read {' '.join(words)!r}: {str(error).splitlines()[0]}") from None


def _file(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise UserError(f"the configuration file {path} is a directory; name a YAML file in it")
    if not path.is_file():
        raise UserError(f"the configuration file {path} does not exist")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:
        raise UserError(f"{path} is not readable YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold keys and values")
    return cast(dict[str, Any], content)


def _trained(parts: Sequence[Mapping[str, Any]]) -> str:
    """The key that says what is trained: env, task, or data."""
    last = {key: value for part in parts for key, value in part.items()}
    return next((key for key in RECIPES if last.get(key) is not None), "data")


def _suite(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    if name not in suites():
        raise UserError(
            f"unknown suite {name!r}.{nearest(name, suites())} Known: {', '.join(suites())}, or a file.yaml"
        )
    return SUITES / f"{name}.yaml"


def _nested(kind: type, part: dict[str, Any]) -> dict[str, Any]:
    """Move recipe keys written at the top into `recipe`."""
    if not issubclass(kind, Task):
        return part
    recipe = {f.name for f in fields(Recipe)}
    inner = {key: part[key] for key in part if key in recipe}
    outer = {key: part[key] for key in part if key not in recipe}
    if not isinstance(given := outer.get("recipe", {}), Mapping):
        raise UserError(f"recipe cannot be {given!r}; write recipe={{lr: 0.1, ...}}, or its keys alone: lr=0.1")
    if inner:
        outer["recipe"] = {**outer.get("recipe", {}), **inner}
    return outer


def _known(kind: type) -> list[str]:
    keys = [f.name for f in fields(kind) if f.name != "recipe"]
    return sorted(keys + ([f.name for f in fields(Recipe)] if issubclass(kind, Task) else []))
