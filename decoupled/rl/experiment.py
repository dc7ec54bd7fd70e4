"""One training run in an environment as a record, for `decoupled compare`.

Every method gets the same environment, seeds, steps, learning rate and batch size. After every epoch (steps / epochs
environment steps) the policy is evaluated, in an actor of its own: that time is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from decoupled import costs, registry
from decoupled.config import RECIPES, CompareConfig, Recipe, Task, TrainConfig, baseline
from decoupled.errors import UserError
from decoupled.experiment import optimizer_for
from decoupled.observe.recorder import Recorder
from decoupled.records import complete
from decoupled.rl.agent import Spaces
from decoupled.rl.environments import labelled, spaces
from decoupled.rl.roles import Roles
from decoupled.rl.trainer import RLTrainer
from decoupled.specs import label, positive, refuse_ignored
from decoupled.steps import MakeOptimizer

EPISODES = 10  # of an evaluation
# What says nothing of policies.
IGNORED = ("data", "model", "blocks", "precision", "on_nonfinite", "cutoffs", "claims", "schedule", "augment")
NOTHING = {"accuracy": math.nan, "loss": math.nan}  # a policy has neither


@dataclass
class RLSetting:
    """An environment made ready."""

    task: Task
    spaces: Spaces

    trains: ClassVar[type] = Roles
    controls: ClassVar[Mapping[str, str]] = {}
    baseline: ClassVar[str | None] = None

    @classmethod
    def prepare(cls, task: Task) -> RLSetting:
        """Look at the environment."""
        return cls(task, spaces(task.env))

    def __post_init__(self) -> None:
        task = self.task
        positive("env", steps=task.steps, epochs=task.recipe.epochs)
        if task.task is not None:
            raise UserError("env= and task= are different things to train; leave one out")
        refuse_ignored(task, "policies", IGNORED, RECIPES["env"])
        if task.steps < task.recipe.epochs:
            raise UserError(f"steps={task.steps} cannot be cut into {task.recipe.epochs} epochs; raise steps")
        optimizer_for(task.recipe)
        if task.recipe.optimizer in ("soap", "muon"):
            raise UserError(
                f"optimizer={task.recipe.optimizer} is for networks: policies stack the weights of several in one "
                "tensor, which it would take for one matrix; use adam, adamw or sgd"
            )
        for spec in methods(task):
            if task.steps <= (warmup := registry.make(spec, Roles).warmup):
                raise UserError(
                    f"{label(spec)}: all of steps={task.steps} are random (warmup={warmup}): raise steps, or lower "
                    "warmup"
                )

    @property
    def cuts(self) -> list[int]:
        """There are no blocks."""
        return []

    @property
    def summary(self) -> str:
        """The environment in one line."""
        s, a, _ = self.spaces
        return f"{labelled(self.task.env)}, {s} observations, {a} actions, {self.task.steps} environment steps"

    @property
    def samples(self) -> int:
        """Environment steps of one run."""
        return self.task.steps

    @property
    def epoch(self) -> int:
        """Environment steps between two evaluations."""
        return math.ceil(self.task.steps / self.task.recipe.epochs)

    def spec(self, spec: str | Mapping[str, Any]) -> Mapping[str, Any]:
        """A method with the number of actors that the task asks for, where the method itself does not say."""
        named = {"name": spec} if isinstance(spec, str) else dict(spec)
        return named if self.task.actors is None else {"actors": self.task.actors} | named

    def trainer(self, spec: str | Mapping[str, Any], seed: int, **more: Any) -> RLTrainer:
        """A trainer for one run."""
        recipe = self.task.recipe
        return RLTrainer(
            self.task.env, self.spec(spec), optimizer=fused(recipe), batch_size=recipe.batch_size, seed=seed,
            runtime=self.task.runtime, **more,
        )  # fmt: skip

    def run_method(
        self, spec: str | Mapping[str, Any], seed: int, advance: Callable[[int], None]
    ) -> tuple[dict[str, Any], Recorder]:
        """Train once; returns its record and the recorded first operations."""
        recorder, curve = Recorder(label(spec), limit=36), []
        with self.trainer(spec, seed, on_steps=advance, observers=[recorder]) as trainer:
            seconds = 0.0
            while trainer.steps < self.task.steps:
                found = trainer.fit(min(self.epoch, self.task.steps - trainer.steps))
                seconds += found["seconds"]
                curve.append(point(found, trainer.evaluate(EPISODES), seconds))
            final, roles = trainer.evaluate(2 * EPISODES), trainer.statistics()
            steps, startup = trainer.steps, trainer.runtime.startup_seconds
            parameters = sum(p.numel() for p in trainer.agent.shared.parameters())  # no slow copies
            updates = trainer.updates
        busy = [role.busy_seconds / max(1e-12, role.busy_seconds + role.wait_seconds) for role in roles]
        sent = {role.role: role.bytes_sent for role in roles}
        name = spec if isinstance(spec, str) else str(spec["name"])
        record = {
            "method": name, "label": label(spec), "family": registry.family(name), "kind": "method",
            "config": {"method": self.spec(spec), "options": registry.options(name)}, "startup_seconds": startup,
            "utilisation": busy, "peak_held_bytes": [], "updates": [updates], "staleness": [],
            "bytes_up_per_sample": [sum(n for role, n in sent.items() if role.startswith("actor")) / steps],
            "bytes_down_per_sample": [sent["learner"] / steps], "parameters": parameters, "auxiliary_parameters": 0,
            "metric": "return", "test_score": final["return"], "measures": measures(curve, final),
            "timeline": [{"actor": s.track, "op": s.name, "start": s.start, "end": s.end} for s in recorder.spans],
            **costs.UNCOUNTED,
        }  # fmt: skip
        done = complete(record, self.task.recipe.epochs, seed, NOTHING, curve, steps, seconds)
        return done | {"test_accuracy": None, "test_loss": None}, recorder

    def run_control(self, control: str, seed: int, advance: Callable[[int], None]) -> dict[str, Any]:
        """There are none."""
        raise AssertionError(control)


def methods(task: Task) -> list[str | Mapping[str, Any]]:
    """What is to be trained."""
    if not isinstance(task, CompareConfig):
        return [task.method] if isinstance(task, TrainConfig) else []
    given = task.methods if isinstance(task.methods, list) else [task.methods]
    found = given or list(registry.methods(Roles))
    return found if task.baseline in map(label, found) else [baseline(task), *found]


def point(found: Mapping[str, Any], held_out: Mapping[str, float], seconds: float) -> dict[str, Any]:
    """One point of a learning curve."""
    return {
        "epoch": found["epoch"], "samples": found["steps"], "updates": found["updates"], "seconds": seconds,
        "train_loss": found["error"], "validation_accuracy": None, "validation_loss": None,
        "validation_score": held_out["return"], "validation_spread": held_out["spread"],
        **{name: found[name] for name in ("ratio", "drift", "age", "lag", "auxiliary", "srank", "train_return")},
    }  # fmt: skip


def measures(curve: list[dict[str, Any]], final: Mapping[str, float]) -> dict[str, float]:
    """What a table of these methods has beyond what all have; only what there is."""
    last = curve[-1]
    learned = [one for one in curve if one["age"] is not None]
    best = max(one["validation_score"] for one in curve)
    found = {"Return at the end": final["return"], "Best return": best, "Updates per step": last["ratio"]}
    if learned:
        found["Age, steps"] = sum(one["age"] for one in learned) / len(learned)
        found["Lag, updates"] = sum(one["lag"] for one in learned) / len(learned)
    if last["srank"]:
        found["Effective rank"] = sum(last["srank"]) / len(last["srank"])
    if last["auxiliary"] is not None:
        found["Auxiliary loss"] = last["auxiliary"]
    return found


def fused(recipe: Recipe) -> MakeOptimizer:
    """The optimizer of a recipe, with all parameters in one call where it can."""
    plain = optimizer_for(recipe)
    if recipe.optimizer not in ("adam", "adamw"):
        return plain
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return lambda parameters: kind(parameters, recipe.lr, weight_decay=recipe.weight_decay, fused=True)
