"""The structure holds: imports run one way, the core names no method, files stay small, options are frozen."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import decoupled
from decoupled import config, registry

ROOT = Path(__file__).resolve().parent.parent
CORE = sorted(p for p in (ROOT / "decoupled").rglob("*.py") if not {"methods", "benchmarks"} & set(p.parts[:-1]))
METHODS = sorted((ROOT / "methods").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))

# file -> why it may be longer than its budget
LONGER: dict[str, str] = {
    "decoupled/trainer.py": "a third of it is the public docstrings; every method is a few lines",
    "decoupled/runtime/processes.py": "one run, and who follows whom: apart they would share all their state",
}
# an order has the name of the method that made it known
ORDERS = {"decoupled/order.py": {"one_f_one_b"}}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_check() -> None:
    assert len(CORE) > 20
    assert len(METHODS) > 8


def test_the_core_imports_neither_methods_nor_benchmarks() -> None:
    for path in CORE:
        for module in imports(path):
            if (path.name, module) == ("__init__.py", "decoupled.methods"):
                continue  # binds the package before the function of the same name; loads no method
            assert not module.startswith(("decoupled.methods", "decoupled.benchmarks", "methods", "benchmarks")), (
                f"{name(path)} imports {module}"
            )


def test_methods_import_the_core_and_their_own_family_only() -> None:
    for path in METHODS:
        family = path.relative_to(ROOT / "methods").parts[0]
        for module in imports(path):
            if module.startswith("decoupled.methods."):
                assert module.split(".")[2] == family, f"{name(path)} imports {module} of another family"
            assert not module.startswith(("decoupled.benchmarks", "benchmarks")), f"{name(path)} imports {module}"


def test_the_runtimes_know_nothing_about_training() -> None:
    allowed = {"decoupled.errors", "decoupled.messages", "decoupled.runtime", "decoupled.transport"}
    for path in (ROOT / "decoupled" / "runtime").glob("*.py"):
        for module in imports(path):
            if module.startswith("decoupled"):
                assert any(module == a or module.startswith(f"{a}.") for a in allowed), f"{name(path)} imports {module}"


def strings(tree: ast.AST) -> Iterator[ast.Constant]:
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node


def test_the_core_never_names_a_method() -> None:
    for path in CORE:
        known = set(registry.methods(object)) - ORDERS.get(name(path), set())
        for constant in strings(ast.parse(path.read_text(encoding="utf-8"))):
            assert constant.value not in known, f"{name(path)}:{constant.lineno} names the method {constant.value!r}"


def test_generic_tests_never_name_a_method() -> None:
    known = set(registry.methods(object))
    for path in sorted((ROOT / "tests" / "zoo").rglob("*.py")):
        for constant in strings(ast.parse(path.read_text(encoding="utf-8"))):
            assert constant.value not in known, f"{name(path)}:{constant.lineno} names the method {constant.value!r}"


@pytest.mark.parametrize(("files", "budget"), [(CORE, 300), (METHODS, 200)], ids=["core", "methods"])
def test_files_stay_within_their_budget(files: list[Path], budget: int) -> None:
    long = {name(p): n for p in files if (n := p.read_text(encoding="utf-8").count("\n")) > budget}
    assert set(long) <= set(LONGER), f"over the budget of {budget} lines: {long}"


def test_functions_stay_within_their_budget() -> None:
    for path in [*CORE, *METHODS, *BENCHMARKS]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= 60, f"{name(path)}:{node.lineno} {node.name} has {lines} lines"


def test_every_module_says_what_it_is_before_any_code() -> None:
    for path in [*CORE, *METHODS, *BENCHMARKS]:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{name(path)} has no module docstring"


def test_no_test_sleeps() -> None:
    asleep = ROOT / "tests" / "methods" / "test_utilisation.py"  # its blocks are: what they do at once is what it tests
    for path in {*(ROOT / "tests").rglob("*.py")} - {asleep}:
        calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        assert not [c for c in calls if ast.unparse(c.func) in ("time.sleep", "sleep")], f"{name(path)} sleeps"


# The public surface. A change here is a change of the contract: it belongs into the CHANGELOG.
TRAINER = "model method blocks loss optimizer scheduler runtime devices seed on_nonfinite precision observers on_batch"
OPTIONS = {
    "backprop": {},
    "gpipe": {"microbatches": 4, "recompute": False},
    "one_f_one_b": {"microbatches": 4, "recompute": False},
    "zero_bubble": {"microbatches": 4, "recompute": False},
    "ddg": {"recompute": False, "mutated": False},
    "pipedream": {"recompute": False, "vertical_sync": False, "admission": None, "microbatches": 1},
    "pipedream_2bw": {"microbatches": 4, "recompute": False},
    "fdg": {"beta": 0.5, "recompute": False, "mutated": False},
    "adl": {"microbatches": 4, "recompute": False},
    "features_replay": {},
    "dsp": {"queue": 2},
    "pipemare": {"microbatches": 4, "anneal": 1000, "decay": 0.135},
    "pipelined_backprop": {"prediction": "velocity", "spike_compensation": True},
    "spectrain": {"stash": False},
    "xpipe": {"microbatches": 4},
    "pipeoptim": {},
    "async_nesterov": {"gamma": 0.9, "stash": True, "adaptive": False},
    "petra": {"microbatches": 1},
    "dni": {"conditional": False, "hidden": 0, "lr": 3e-5, "inputs": False, "input_lr": 1e-3},
    "dtp": {"step": 0.5, "noise": 0.1, "hidden": 0, "lr": 1e-3, "penultimate": True, "pipelined": False},
    "l_drl": {"step": 0.5, "noise": 0.1, "hidden": 0, "lr": 1e-3, "penultimate": False, "pipelined": False},
    "fa": {"signs": False},
    "dfa": {"recompute": False},
    "drtp": {},
    "greedy_local": {"head": "auto"},
    "chunked_local": {"chunks": 2, "head": "auto"},
    "overlapping_local": {"reach": 2, "head": "auto"},
    "interlocking": {"n": 2, "head": "auto"},
    "dgl": {"head": "mlp_sr"},
    "dgl_async": {"slots": 4, "uses": 4, "head": "mlp_sr"},
    "forward_forward": {"threshold": 1.0},
    "sigprop": {},
    "auglocal": {"depth": 2, "decline": 0.5},
    "momentum_auxiliary": {"momentum": 0.995, "head": "auto"},
    "frozen_below": {"trained": 2},
    "last_block_only": {},
    "predsim": {"mode": "both", "beta": 0.99},
    "infopro": {"lambda1": 1.0, "lambda2": 0.5, "contrast": False, "head": "mlp"},
    "block_admm": {
        "beta": 0.1,
        "eta": 5.0,
        "sigma": 0.5,
        "rounds": 4,
        "sweep": False,
        "step": "gradient",
        "z_steps": 1,
        "output": False,
        "stored": False,
        "memory": 1024.0,
    },
    "penalty": {
        "beta": 0.1,
        "eta": 5.0,
        "stored": True,
        "rounds": 1,
        "sweep": False,
        "step": "gradient",
        "downsample": None,
    },
    "augmented_lagrangian": {
        "beta": 0.1,
        "eta": 5.0,
        "sigma": 0.5,
        "stored": True,
        "rounds": 1,
        "sweep": False,
        "step": "gradient",
        "downsample": None,
    },
    "hybrid": {
        "beta": 0.1,
        "eta": 5.0,
        "sigma": 0.5,
        "serial": 1,
        "parallel": 1,
        "repeat": True,
        "warm": True,
        "sweep": False,
        "downsample": None,
    },
    "auxnet": {"beta": 0.1, "eta": 5.0, "width": 16},
    "uniform": {"boss": "backprop", "fraction": 0.5},
    "autoassist": {"boss": "backprop", "gamma": 0.3, "gate": True, "lag": 0, "unbiased": False},
    "selective_backprop": {"boss": "backprop", "beta": 2.0, "stale": 1},
    "online_batch_selection": {"boss": "backprop", "fraction": 0.5, "pressure": 100.0},
    "rho_loss": {"boss": "backprop", "fraction": 0.5, "holdout": 0.1, "irreducible": None},
    "self_paced": {"boss": "backprop", "pace": 5},
    "screener_net": {"boss": "backprop", "margin": 1.0, "lr": 1e-3},
    "infobatch": {"boss": "backprop", "ratio": 0.5, "full_from": None},
    "sac": {
        "units": 256,
        "layers": 2,
        "connection": "mlp",
        "temperature": 0.0,
        "form": "q",
        "reward_scale": 1.0,
        "warmup": 1000,
        "actors": 0,
        "envs": 1,
        "ratio": 1.0,
        "gamma": 0.99,
    },
    "td3": {
        "units": 256,
        "layers": 2,
        "connection": "mlp",
        "reward_scale": 1.0,
        "warmup": 1000,
        "actors": 0,
        "envs": 1,
        "ratio": 1.0,
        "gamma": 0.99,
    },
    "larger_rl": {
        "algorithm": "sac",
        "connection": "densenet",
        "units": 256,
        "layers": 2,
        "activation": "swish",
        "ofenet": "batch",
        "ofe_units": 240,
        "ofe_layers": 8,
        "temperature": 0.0,
        "form": "q",
        "reward_scale": 1.0,
        "prioritized": True,
        "alpha": 0.6,
        "beta": 0.4,
        "n_step": 1,
        "gamma": 0.99,
        "warmup": 10_000,
        "pretrain": 10_000,
        "actors": 2,
        "envs": 1,
        "ratio": 1.0,
        "capacity": 1_000_000,
        "push": 100,
    },
    "ampnet": {
        "max_active_keys": 4,
        "min_update_frequency": 1,
        "combine": "mean",
        "backward": "activation",
        "replicas": None,
        "backward_first": True,
        "frequencies": None,
        "messages_per_instance": 10_000,
        "batches": None,
    },
}
KEYS = {
    config.Recipe: "optimizer lr momentum weight_decay schedule batch_size epochs augment",
    config.TrainConfig: "data model blocks runtime task env steps actors precision recipe method seed "
    "on_nonfinite resume other_method restarts",
    config.CompareConfig: "data model blocks runtime task env steps actors precision recipe suite methods "
    "controls baseline seeds sweep cutoffs claims",
    config.FlopsConfig: "method model data inputs classes blocks skip update",
    config.SimulateConfig: "method blocks batches forward backward step latency bandwidth activation graph weights "
    "optimizer memory profile sweep jitter slow seed timeline",
}


def test_the_option_surface_is_frozen() -> None:
    assert list(inspect.signature(decoupled.Trainer).parameters) == TRAINER.split()
    assert {name: registry.options(name) for name in registry.methods(object)} == OPTIONS
    for kind, keys in KEYS.items():
        assert [field.name for field in dataclasses.fields(kind)] == keys.split()


def test_public_names() -> None:
    assert decoupled.__all__ == ["OperationError", "Trainer", "UserError", "card", "methods", "split"]
    assert all(inspect.getdoc(getattr(decoupled, public)) for public in decoupled.__all__)
