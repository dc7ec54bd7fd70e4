"""The registry: names, options and their types; methods of other distributions; what happens when one is broken."""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import decoupled
from decoupled import registry
from decoupled.coupling import LocalObjective
from decoupled.errors import UserError
from decoupled.method import Facts, Method, own
from decoupled.order import local
from decoupled.retention import KeepNothing


@pytest.fixture
def registered(monkeypatch):
    """Registrations of the test are forgotten afterwards."""
    registry.methods()
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))


def simple(head: str = "linear", count: int = 2, factor: float = 0.5, flag: bool = False) -> Method:
    return Method(LocalObjective(head), local, Facts(exact=False, reach=own), KeepNothing)


# --- names --------------------------------------------------------------------------------------------------------


def test_methods_are_found_where_they_are_and_stay_callable():
    names = decoupled.methods()
    assert names == sorted(names) == decoupled.methods()
    assert len(names) >= 12
    importlib.import_module("decoupled.methods.synchronous.method")  # must not hide the function of the same name
    assert decoupled.methods() == names


def test_every_method_is_built_from_its_name_and_knows_it():
    for name in registry.methods():
        method = registry.make(name)
        assert method.name == name
        assert str(registry.make({"name": name, **registry.options(name)}).order) == str(method.order)
        assert (Path(registry.__file__).parent / "methods" / registry.family(name) / "method.py").is_file()


def test_an_unknown_name_is_answered_with_the_nearest(registered):
    for call in (registry.make, registry.card, registry.family, registry.options):
        with pytest.raises(UserError, match=r"unknown method 'gpip'\. Did you mean 'gpipe'\? Known: .*backprop, "):
            call("gpip")


def test_a_name_is_given_once(registered):
    registry.register("mine")(simple)
    assert "mine" in registry.methods()

    def other() -> Method:
        return simple()

    with pytest.raises(ValueError, match=r"method 'mine' is registered already, by .*; choose another name"):
        registry.register("mine")(other)
    with pytest.raises(ValueError, match="method 'backprop' is registered already"):
        registry.register("backprop")(simple)
    assert registry.make("mine").order is local
    registry.register("mine")(simple)  # the same function again: a module that was loaded twice


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [("count", 3, 3), ("factor", 0.25, 0.25), ("factor", 1, 1.0), ("flag", True, True), ("head", "mlp", "mlp")],
)
def test_options_arrive_with_the_type_they_are_declared_with(registered, option, value, expected):
    seen = {}

    def spy(head: str = "linear", count: int = 2, factor: float = 0.5, flag: bool = False) -> Method:
        seen.update(locals())
        return simple()

    registry.register("spy")(spy)
    for spec in ({"name": "spy", option: value}, OmegaConf.create({"name": "spy", option: value})):
        registry.make(spec)
        assert seen[option] == expected
        assert type(seen[option]) is type(expected)


@pytest.mark.parametrize(
    ("option", "value"),
    [("count", 3.0), ("count", True), ("count", "3"), ("factor", "0.5"), ("factor", False), ("flag", 1), ("head", 1)],
)
def test_a_value_of_another_type_is_refused(registered, option, value):
    registry.register("spy")(simple)
    with pytest.raises(UserError, match=rf"method 'spy': option '{option}' must be \w+, got {value!r}"):
        registry.make({"name": "spy", option: value})


def test_no_option_is_not_a_number():
    with pytest.raises(UserError, match="method 'fdg': option 'beta' must be a number, got nan"):
        registry.make({"name": "fdg", "beta": float("nan")})


def test_a_list_may_come_from_omegaconf():
    made = registry.make(OmegaConf.create({"name": "dsp", "queue": [3, 1]}))
    assert made.facts.delay(0, 3) == 4


def test_options_with_defaults(registered):
    registry.register("mine")(simple)
    assert registry.options("mine") == {"head": "linear", "count": 2, "factor": 0.5, "flag": False}
    for name in registry.methods():
        for option, default in registry.options(name).items():
            assert default is not inspect.Parameter.empty, f"{name} cannot be built without {option}"


def test_a_spec_is_not_changed():
    spec = {"name": "overlapping_local", "reach": 3}
    registry.make(spec)
    assert spec == {"name": "overlapping_local", "reach": 3}


# --- other distributions ------------------------------------------------------------------------------------------

PLUGIN = '''
"""A method of somebody else."""

from decoupled.coupling import Gradient
from decoupled.method import Facts, Method, top
from decoupled.order import tick
from decoupled.registry import register
from decoupled.retention import KeepInput


@register({name!r})
def stale(extra: int = 1) -> Method:
    facts = Facts(
        exact=False, reach=top, delay=lambda k, K: 2 * (K - 1 - k), in_flight=lambda k, K: 2 * (K - 1 - k) + 1,
        backward_weights="current",
    )
    return Method(Gradient(), tick, facts, KeepInput)
'''

TRAIN = """
import decoupled
from decoupled.testing import Case, compare, reference, train, variants, label

assert "stale_replay" in decoupled.methods(), decoupled.methods()
assert [label(s) for s in variants() if s["name"] == "stale_replay"] == ["stale_replay", "stale_replay,extra=2"]
case = Case(widths=(4, 5, 6, 3), cuts=(1, 2), sizes=(6,) * 8)
run = train(case, {"name": "stale_replay", "extra": 2}, runtime="threads")
compare(run.weights, reference(case, "stale_replay"))
assert [max(s.staleness) for s in run.trainer.statistics()] == [4, 2, 0]
print("trained", decoupled.registry.family("stale_replay"))
"""


def install(folder, distribution, module, text):
    """Build and install a distribution that announces `module` in the entry-point group; returns where it is."""
    source, target = folder / distribution, folder / "site"
    source.mkdir()
    (source / f"{module}.py").write_text(text)
    (source / "pyproject.toml").write_text(
        f"""
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "{distribution}"
version = "1.0"
[project.entry-points."decoupled.methods"]
{module} = "{module}"
[tool.setuptools]
py-modules = ["{module}"]
"""
    )
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return target


def python(code, site):
    path = os.pathsep.join([str(site), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_a_method_of_an_installed_distribution_is_listed_and_trains(tmp_path):
    site = install(tmp_path, "somebodys-methods", "somebodys_methods", PLUGIN.format(name="stale_replay"))
    done = python(TRAIN, site)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("trained")


def test_a_distribution_that_takes_a_name_twice_is_an_error_every_time(tmp_path):
    site = install(tmp_path, "imitation", "imitation", PLUGIN.format(name="backprop"))
    code = """
import decoupled
for attempt in range(3):
    try:
        print(decoupled.methods())
    except ValueError as error:
        print(error)
"""
    done = python(code, site)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all("method 'backprop' is registered already" in line for line in lines)


def test_a_distribution_that_cannot_be_imported_is_an_error_every_time(tmp_path):
    """Not an error the first time and a silently shorter list afterwards."""
    site = install(tmp_path, "broken", "broken", "raise RuntimeError('out of order')")
    code = """
import decoupled
for attempt in range(2):
    try:
        print(len(decoupled.methods()))
    except RuntimeError as error:
        print(error)
"""
    done = python(code, site)
    assert done.stdout.splitlines() == ["out of order"] * 2, done.stderr
