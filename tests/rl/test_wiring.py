"""What the roles tell one another has its effect: a small run, done once more by hand from its messages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from decoupled import registry
from decoupled.messages import Message
from decoupled.rl import Replay, RLTrainer, Roles
from decoupled.rl.agent import Agent, unpack
from decoupled.rl.memory import Memory
from decoupled.rl.messages import Drawn, Experience, Go, Judged, Weights
from decoupled.rl.replay import EPS
from decoupled.rl.steps import batch_of
from decoupled.rl.testing import Line
from decoupled.runtime.contract import Edge, Observer

WHOLE = max(registry.methods(Roles), key=lambda name: len(registry.options(name)))  # the method with all the parts
SMALL = {"warmup": 40, "pretrain": 3, "push": 5, "units": 8, "ofe_units": 8, "ofe_layers": 2}
ENVS, STEPS = 2, 70


class Tap(Observer):
    """Keeps what arrived, by who took it, and the experience in the order it was sent."""

    def __init__(self) -> None:
        self.at: dict[str, list[Message]] = {"actor0": [], "replay": [], "learner": []}
        self.made: list[Experience] = []

    def taken(self, actor: str, port: str, message: Message, time: float) -> None:
        self.at[actor].append(message)

    def delivery(self, edge: Edge, message: Message, sent: float, arrived: float) -> None:
        if isinstance(message, Experience):
            self.made.append(message)


class Run:
    """One run with an actor apart, its messages, and the agents as they were before it."""

    def __init__(self) -> None:
        self.tap, method = Tap(), {"name": WHOLE, "actors": 1, "envs": ENVS, **SMALL}
        with RLTrainer(Line(), method, batch_size=8, runtime="simulated", observers=[self.tap]) as trainer:
            self.roles, self.spaces, self.trainer = trainer.roles, trainer.spaces, trainer
            self.learner, self.actor = (copy.deepcopy(trainer.agent) for _ in range(2))
            trainer.fit(STEPS)


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


def test_actors_use_the_weights_they_have_for_actions_and_initial_priorities(run: Run) -> None:
    noise, made, by_policy = torch.Generator().manual_seed(100_001), iter(run.tap.made), 0
    for message in run.tap.at["actor0"]:
        if isinstance(message, Weights):
            unpack(run.actor.shared, message.payload[0])
        if not isinstance(message, Go):
            continue
        rows, errors = next(made).payload
        batch = batch_of(rows, run.spaces, 1)
        if not message.random:
            for obs, action in zip(batch.obs.split(ENVS), batch.action.split(ENVS), strict=True):
                torch.testing.assert_close(action, run.actor.act(obs, noise).detach(), rtol=0, atol=0)
            by_policy += len(rows)
        torch.testing.assert_close(errors, run.actor.errors(batch, noise).abs(), rtol=0, atol=0)
    assert by_policy == STEPS - SMALL["warmup"]


def test_the_learner_learns_what_was_drawn_with_its_weights(run: Run) -> None:
    judged = iter(message for message in run.tap.at["replay"] if isinstance(message, Judged))
    learner, varied = run.learner, 0
    for message in run.tap.at["learner"]:
        if not isinstance(message, Drawn):
            continue
        *batch, extra = message.payload
        answer = next(judged)
        assert answer.auxiliary == learner.auxiliary(batch_of(extra, run.spaces, 1))
        if batch:
            rows, weights = batch
            errors = learner.learn(batch_of(rows, run.spaces, 1), weights)
            torch.testing.assert_close(answer.payload[0], errors.abs(), rtol=0, atol=0)
            varied += weights.unique().numel() > 1
    assert varied == STEPS - SMALL["warmup"]
    for name, value in run.trainer.agent.networks.state_dict().items():
        assert torch.equal(value, learner.networks.state_dict()[name]), name


def test_priorities_are_those_of_the_latest_answer(run: Run) -> None:
    drawn = {m.key: m.payload[0] for m in run.tap.at["learner"] if isinstance(m, Drawn)}
    wanted: dict[bytes, float] = {}
    for message in run.tap.at["replay"]:
        if isinstance(message, Experience | Judged) and message.payload:
            rows, errors = (
                message.payload if isinstance(message, Experience) else (drawn[message.key], message.payload[0])
            )
            priorities = (errors.double() + EPS) ** run.roles.alpha
            wanted |= {row.numpy().tobytes(): p.item() for row, p in zip(rows, priorities, strict=True)}
    state = run.trainer.memory.replay.state_dict()
    found = {row.numpy().tobytes(): p.item() for row, p in zip(state["rows"], state["priorities"], strict=True)}
    assert len(found) == STEPS and found == pytest.approx(wanted)


def test_rows_for_the_features_are_drawn_uniformly() -> None:
    replay = Replay(100, 1, prioritized=True)
    replay.add(np.arange(100, dtype=np.float32)[:, None], np.array([1e6] + [0.0] * 99, np.float32), 0)
    memory = Memory(Roles(lambda *_: None), replay, 50, features=True)  # type: ignore[arg-type, return-value]
    rows, _, extra = memory.draw("train")[1].payload
    assert not rows.any() and extra.unique().numel() > 25
    assert memory.draw("pretrain")[1].payload[0].unique().numel() > 25


def test_one_loop_acts_by_the_policy_after_the_warmup() -> None:
    method = {"name": WHOLE, "actors": 0, "envs": ENVS, "prioritized": False, "ratio": 1e-3, **SMALL, "ofenet": "off"}
    with RLTrainer(Line(), method, batch_size=8) as trainer:
        trainer.fit(60)
        assert trainer.updates == 0  # the weights are still the first ones
        batch = batch_of(trainer.memory.replay.latest(60), trainer.spaces, 1)
        noise = torch.Generator().manual_seed(1)
        for obs, action in zip(batch.obs[40:].split(ENVS), batch.action[40:].split(ENVS), strict=True):
            assert torch.equal(action, trainer.agent.act(obs, noise).detach())


def test_evaluation_takes_the_best_known_actions() -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with RLTrainer(noted(seen), {"name": WHOLE, "actors": 0, **SMALL}, batch_size=8) as trainer:
        trainer.fit(50)
        seen.clear()
        trainer.evaluate(3)
        assert len(seen) == 30
        for obs, action in seen:
            torch.testing.assert_close(action, 2 * best(trainer.agent, obs))  # this environment's are in [-2, 2]


def best(agent: Agent, obs: torch.Tensor) -> torch.Tensor:
    return agent.act(obs[None], None)[0].detach()


def noted(seen: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], Any]:
    """The line, which notes what was seen and done."""

    def make() -> Any:
        env = Line()()
        step = env.step

        def noting(action: Any) -> Any:
            seen.append((torch.tensor(env._obs()), torch.tensor(action)))
            return step(action)

        env.step = noting
        return env

    return make
