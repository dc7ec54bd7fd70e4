"""Configuration: words and files fill dataclasses; whatever is wrong is one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from decoupled.config import CompareConfig, InfoConfig, SimulateConfig, TrainConfig, plain, read, suites
from decoupled.errors import UserError
from decoupled.specs import label


def test_words_fill_the_dataclass() -> None:
    config = read(
        TrainConfig, ["method={name: overlapping_local, reach: 3}", "lr=0.2", "recipe.epochs=4", "blocks=[2,5]"]
    )
    assert config.method == {"name": "overlapping_local", "reach": 3}
    assert (config.recipe.lr, config.recipe.epochs, config.blocks) == (0.2, 4, [2, 5])


def test_later_wins(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("seeds: 7\nlr: 0.3\n")
    config = read(CompareConfig, ["lr=0.4"], str(file))
    assert (config.seeds, config.recipe.lr, config.baseline) == (7, 0.4, "backprop")
    assert read(CompareConfig, []).seeds == 3


@pytest.mark.parametrize(
    ("words", "optimizer", "lr", "suite"),
    [
        ([], "sgd", 0.1, "quick"),
        (["task=list_reduction"], "adam", 2e-3, "tasks"),
        (["task={name: listops, hidden: 8}", "optimizer=sgd"], "sgd", 2e-3, "tasks"),
        (["env=Pendulum-v1"], "adam", 3e-4, "rl_small"),
        (["env=null", "task=null"], "sgd", 0.1, "quick"),
    ],
)
def test_what_is_trained_decides_what_is_usual(words: list[str], optimizer: str, lr: float, suite: str) -> None:
    recipe = read(TrainConfig, ["method=a", *words]).recipe
    assert (recipe.optimizer, recipe.lr) == (optimizer, lr)
    assert read(CompareConfig, words).suite == suite


def test_what_is_taken_back_is_not_trained(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for line in ("env: Pendulum-v1", "task: list_reduction"):
        file.write_text(f"{line}\n")
        assert read(CompareConfig, [], str(file)).suite != "quick"
        back = read(CompareConfig, [f"{line.split(':')[0]}=null"], str(file))
        assert (back.suite, back.recipe.optimizer) == ("quick", "sgd")


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        (TrainConfig, ["methd=x"], "unknown key 'methd'. Did you mean 'method'"),
        (TrainConfig, ["method=a", "epoch=3"], "unknown key 'epoch'. Did you mean 'epochs'"),
        (TrainConfig, ["method=a", "sigma=3"], "goes inside it: method={name: NAME, sigma: ...}"),
        (TrainConfig, ["method=penalty", "step=0.8"], "goes inside it: method={name: NAME, step: ...}"),
        (
            InfoConfig,
            ["method={name: gpipe}", "microbatches=2"],
            "goes inside it: method={name: NAME, microbatches: ...}",
        ),
        (TrainConfig, ["method=backprop", "recipe=3"], "recipe cannot be 3; write recipe={lr: 0.1, ...}"),
        (SimulateConfig, ["method=a", "slow=[1,2]"], "slow cannot be [1, 2]; write slow={KEY: VALUE, ...}"),
        (TrainConfig, ["blocks=2"], "method is missing; write method="),
        (TrainConfig, ["method=a", "lr=fast"], "'fast'"),
        (TrainConfig, ["fast"], "'fast' is not key=value"),
        (TrainConfig, ["method={name: x"], "cannot read"),
        (SimulateConfig, ["method=a", "slow={one: 2.0}"], "one"),
        (SimulateConfig, ["method=pipedream", "batch=3"], "unknown key 'batch'. Did you mean 'batches'"),
        (InfoConfig, ["method=a", "task=x"], "unknown key 'task'"),
        (CompareConfig, ["suite=quik"], "unknown suite 'quik'. Did you mean 'quick'"),
        (CompareConfig, ["suite=none.yaml"], "none.yaml does not exist"),
    ],
)
def test_errors_are_one_clear_line(kind: type, words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(kind, words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("a: [1,\n")
    with pytest.raises(UserError, match=r"broken\.yaml is not readable YAML"):
        read(TrainConfig, [], str(file))


@pytest.mark.parametrize("suite", suites())
def test_every_suite_reads_and_is_plain(suite: str) -> None:
    config = read(CompareConfig, [f"suite={suite}"])
    assert config.suite == suite
    assert config.task or config.baseline in map(label, config.methods)  # a task is compared with its own control
    assert plain(config)["recipe"]["lr"] == config.recipe.lr
