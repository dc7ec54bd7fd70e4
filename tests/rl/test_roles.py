"""The roles on the runtimes: what is held, what is the same, what stops."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decoupled import registry
from decoupled.errors import OperationError, UserError
from decoupled.rl import RLTrainer, Roles, environments
from decoupled.rl.environments import Environments, spaces
from decoupled.rl.pace import Pace
from decoupled.rl.srank import srank
from decoupled.rl.steps import batch_of
from decoupled.rl.testing import Line
from decoupled.runtime.contract import Edge, Observer

OFE = {"ofe_units": 8, "ofe_layers": 2, "units": 8}


def plain() -> str:
    """The method with the fewest options that runs in one loop."""
    names = [name for name in registry.methods(Roles) if registry.options(name)["actors"] == 0]
    return min(names, key=lambda name: len(registry.options(name)))


def whole() -> str:
    """The method with all the parts."""
    return max(registry.methods(Roles), key=lambda name: len(registry.options(name)))


def make(actors: int = 0, runtime: Any = "threads", name: str | None = None, env: Any = None, **more: Any) -> RLTrainer:
    options: dict[str, Any] = {"name": name or whole(), "actors": actors, "warmup": 40, "envs": 2}
    options |= {"pretrain": 3, "push": 5, **OFE} if options["name"] == whole() else {"units": 8}
    seed, observers = more.pop("seed", 0), more.pop("observers", ())
    return RLTrainer(
        env or Line(), options | more, batch_size=8, runtime=runtime, seed=seed, observers=observers
    )  # fmt: skip


def weights(trainer: RLTrainer) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in trainer.agent.networks.state_dict().values()])


@pytest.mark.parametrize(("envs", "chunk"), [(1, 8), (4, 8), (3, 5)])
def test_acting_ends_less_than_a_message_beyond_its_lead(envs, chunk):
    pace = Pace(1.0, 100, 0, lead=4)
    pace.goal = 10**6
    while pace.grant(envs, chunk):
        pass
    assert 100 + pace.lead < pace.granted < 100 + pace.lead + chunk * envs


@given(
    st.floats(0.1, 4), st.integers(1, 60), st.integers(0, 5), st.integers(1, 4), st.integers(1, 5), st.integers(1, 300)
)
def test_pace_ends_with_what_the_steps_allow(
    ratio: float, warmup: int, pretrain: int, envs: int, chunk: int, goal: int
) -> None:
    """Neither waits for the other for ever, neither runs ahead of what is promised, and the counts are exact."""
    pace = Pace(ratio, warmup, pretrain, 2 * chunk * envs)
    pace.goal, under_way = goal, 0
    while not pace.finished:
        moved = False
        while kind := pace.due():
            moved = True
            if kind == "pretrain":
                pace.pretrained += 1
            else:
                pace.updates += 1
                pace.answered += 1
        assert pace.updates <= ratio * (pace.steps - warmup) + 1e-6 or not pace.updates
        if go := pace.grant(envs, chunk):
            moved, under_way = True, go[0] * envs
            pace.steps += under_way
            assert go[1] == (pace.steps - under_way < warmup)
            ahead = max(0, pace.granted - warmup) - pace.answered / ratio
            assert ahead < pace.lead + chunk * envs
        assert moved
    assert goal <= pace.steps < goal + envs
    assert pace.updates == int(max(0.0, ratio * (pace.steps - warmup)) + 1e-9)


@pytest.mark.parametrize("actors", [0, 1, 2])
@pytest.mark.parametrize("ratio", [0.25, 1.0, 2.0])
def test_the_ratio_is_held_whoever_runs_apart(actors: int, ratio: float) -> None:
    with make(actors, ratio=ratio, name=plain()) as trainer:
        found = trainer.fit(100)
        assert (trainer.steps, trainer.updates) == (100, int(60 * ratio))
        assert found["ratio"] == pytest.approx(ratio)
        most = trainer.roles.lead + trainer.roles.chunk * 2 * max(1, actors) + 2
        assert found["drift"] <= ratio * most + 1


def test_one_loop_gives_the_same_bits_on_every_runtime() -> None:
    found = {}
    for runtime in ("simulated", "threads", "processes"):
        with make(0, runtime) as trainer:
            trainer.fit(60)
            found[runtime] = weights(trainer), trainer.evaluate(2)
    first = found["simulated"]
    for state, score in found.values():
        assert torch.equal(state, first[0])
        assert score == first[1]


@pytest.mark.slow
def test_actors_apart_are_deterministic_on_the_simulator_and_learn_from_others_than_one_loop() -> None:
    states = []
    for actors in (2, 2, 0):
        with make(actors, "simulated") as trainer:
            trainer.fit(80)
            states.append(weights(trainer))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    ("runtime", "n_step"),
    [("threads", 1), ("threads", 3), pytest.param("processes", 3, marks=pytest.mark.slow)],
)
def test_actors_apart_run_and_stop(runtime: str, n_step: int) -> None:
    seen: set[str] = set()

    class Seen(Observer):
        def delivery(self, edge: Edge, message: Any, sent: float, arrived: float) -> None:
            seen.add(str(edge))

    with make(2, runtime, n_step=n_step, observers=[Seen()]) as trainer:
        first = trainer.fit(70)
        second = trainer.fit(30)
        assert (trainer.steps, trainer.updates) == (100, 60)
        assert first["age"] > 0 and second["lag"] > 0 and second["train_return"] < 0
        assert first["auxiliary"] > 0 and len(second["srank"]) == 2
        assert trainer.evaluate(3)["length"] == 10
        roles = {role.role: role for role in trainer.statistics()}
        assert set(roles) == {"learner", "replay", "actor0", "actor1"}
        assert all(role.busy_seconds > 0 and role.bytes_sent > 0 for role in roles.values())
        assert (roles["actor1"].rank > 0) == (runtime == "processes")
    assert "replay.drawn->learner.drawn" in seen and "learner.weights->actor1.weights" in seen


@pytest.mark.parametrize("actors", [0, 2])
def test_the_first_failure_names_the_role(actors: int) -> None:
    with make(actors, env=Line(fail_at=5)) as trainer:
        with pytest.raises(OperationError, match="the line broke") as caught:
            trainer.fit(100)
        assert caught.value.actor.startswith("actor" if actors else "learner")


def test_actors_get_the_learners_statistics_of_batchnorm() -> None:
    with make(1, push=1, name=whole()) as trainer:
        trainer.fit(60)
        learner = trainer.agent.shared.state_dict()
        copy = trainer._own_acting()["actor0"].agent.shared.state_dict()
        moved = [name for name in learner if name.endswith("running_mean")]
        assert moved
        for name in moved:
            assert learner[name].abs().max() > 0
            assert copy[name].abs().max() > 0


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("name", registry.methods(Roles))
def test_one_loop_resumes_bit_for_bit(name: str, n_step: int) -> None:
    more = {"n_step": n_step} if name == whole() else {}
    with make(0, name=name, **more) as first:
        first.fit(50)
        state = first.state_dict()
        first.fit(27)
        with make(0, name=name, seed=5, **more) as second:
            second.load_state_dict(state)
            assert second.state_dict()["acting"].keys() == state["acting"].keys()
            second.fit(27)
            assert torch.equal(weights(first), weights(second))
            assert second.evaluate(2)["return"] != 0
            assert (second.steps, second.epoch) == (first.steps, 2)


@pytest.mark.slow
def test_actors_apart_resume_too() -> None:
    states = []
    for _ in range(2):
        with make(2, "simulated") as first:
            first.fit(60)
            with make(2, "simulated", seed=1) as second:
                second.load_state_dict(first.state_dict())
                second.fit(20)
                states.append(weights(second))
    assert torch.equal(*states)


def test_a_state_of_something_else_is_refused() -> None:
    with make(0, name=plain()) as one, make(0, name=whole()) as other:
        one.fit(50)
        with pytest.raises(UserError, match="this trainer runs"):
            other.load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("then", "now", "text"),
    [
        ({"capacity": 60}, {"capacity": 80}, "capacity=60, this trainer has capacity=80: go on with capacity=60, or"),
        ({"prioritized": False}, {"prioritized": True}, "prioritized=False, this trainer has prioritized=True"),
        ({}, {"alpha": 0.5}, "alpha=0.6, this trainer has alpha=0.5"),
        ({"n_step": 2}, {"n_step": 3}, "n_step=2, this trainer has n_step=3"),
        ({}, {"gamma": 0.9}, "gamma=0.99, this trainer has gamma=0.9"),
        ({}, {"envs": 1}, "envs=2, this trainer has envs=1"),
        ({}, {"actors": 1}, "actors=0, this trainer has actors=1"),
        ({}, {"temperature": 0.2}, "temperature=0.0, this trainer has temperature=0.2"),
        ({}, {"algorithm": "td3"}, "algorithm=sac, this trainer has algorithm=td3"),
        ({}, {"activation": "relu"}, "activation=swish, this trainer has activation=relu"),
    ],
)
def test_a_state_of_other_options_is_refused(then: dict[str, Any], now: dict[str, Any], text: str) -> None:
    with make(0, "simulated", **then) as one, make(now.pop("actors", 0), "simulated", **now) as other:
        before = weights(other)
        with pytest.raises(UserError, match="was saved with") as caught:
            other.load_state_dict(one.state_dict())
        assert text in str(caught.value) and "\n" not in str(caught.value)
        assert torch.equal(before, weights(other))


def test_a_state_of_another_optimizer_is_refused() -> None:
    def sgd(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 0.1)

    with make(0, name=plain()) as one, RLTrainer(Line(), {"name": plain(), "actors": 0}, optimizer=sgd) as other:
        with pytest.raises(UserError, match=r"optimizers=\['Adam'\], this trainer has optimizers=\['SGD'\]"):
            other.load_state_dict(one.state_dict() | {"options": other._options() | {"optimizers": ["Adam"]}})


def test_a_state_of_another_environment_of_the_same_size_is_refused() -> None:
    with make(0, env="Pendulum-v1") as one, make(0, env={"name": "Pendulum-v1", "g": 5}) as other:
        with pytest.raises(UserError, match=r"env=Pendulum-v1, this trainer has env=Pendulum-v1\(g=5\)"):
            other.load_state_dict(one.state_dict())


def test_evaluation_ends_without_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "LONGEST", 7)
    with make(0, name=plain(), env=Line(limit=10**9, edge=10**9)) as trainer:
        assert trainer.evaluate(2)["length"] == 7
    ((_, length),) = environments.play(Environments("Pendulum-v1", 1, 0), lambda obs: np.zeros((1, 1), np.float32))
    assert length == 200  # its own limit counts


@pytest.mark.parametrize("actors", [0, 1])
def test_a_run_that_diverges_is_an_error(actors: int) -> None:
    with make(actors, "simulated", prioritized=False) as trainer:
        trainer.fit(42)
        with torch.no_grad():
            for value in trainer.agent.networks["shared"]["critics"].parameters():  # type: ignore[index]
                value.fill_(torch.nan)
        with pytest.raises(OperationError, match=r"learner, operation S3 .*NonFiniteError: the mean .* in update 3 "):
            trainer.fit(10)
        for value in trainer.agent.shared.parameters():
            value.data.fill_(torch.nan)
        with pytest.raises(OperationError, match=r"evaluator.*the returns add up to nan"):
            trainer.evaluate(2)


def test_features_that_diverge_are_an_error() -> None:
    with make(0, "simulated") as trainer:
        for value in trainer.agent.networks["shared"]["features"].parameters():  # type: ignore[index]
            value.data.fill_(torch.inf)
        with pytest.raises(OperationError, match=r"operation P1 .*the loss of the features is nan in update 1 \(pretr"):
            trainer.fit(50)


def test_environments_come_back_to_where_they_were() -> None:
    first = Environments("Pendulum-v1", 2, 3)
    second = Environments("Pendulum-v1", 2, 8)
    noise = np.random.Generator(np.random.PCG64(0))
    for _ in range(203):
        first.step(first.random_actions(noise))
    second.load_state_dict(first.state_dict())
    np.testing.assert_array_equal(first.obs, second.obs)
    for _ in range(250):
        actions = first.random_actions(noise)
        a, b = first.step(actions), second.step(actions)
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)
    assert first.take_finished()[-2:] == second.take_finished()[-2:]


def test_a_time_limit_is_not_a_terminal_state() -> None:
    envs = Environments(Line(limit=3, edge=1.05), 1, 0)
    seen = set()
    for _ in range(300):
        stepped = envs.step(np.ones((1, 1), np.float32))
        seen.add((bool(stepped.over[0]), bool(stepped.cut[0])))
    assert seen == {(False, False), (True, False), (False, True)}


def test_only_a_terminal_state_has_no_future() -> None:
    discounts = {}
    for edge in (0.9, 10.0):
        with make(0, name=plain(), env=Line(limit=3, edge=edge)) as trainer:
            trainer.fit(40)
            rows = trainer.memory.replay.latest(40)
            discounts[edge] = set(batch_of(rows, trainer.spaces, 1).discount.flatten().tolist())
    assert {edge: sorted(round(x, 6) for x in found) for edge, found in discounts.items()} == {
        0.9: [0.0, 0.99], 10.0: [0.99]
    }  # fmt: skip


def lines(**attributes: Any) -> Any:
    """Makes lines with these attributes."""

    def line() -> Any:
        env = Line()()
        for name, value in attributes.items():
            setattr(env, name, value)
        return env

    return line


@pytest.mark.parametrize(("low", "high", "kind"), [(-np.inf, 1, "float32"), (-1, np.inf, "float32"), (-2, 2, "int32")])
def test_actions_that_are_not_continuous_and_bounded_are_refused(low: float, high: float, kind: str) -> None:
    box = environments.gymnasium().spaces.Box(low, high, (1,), kind)
    with pytest.raises(UserError, match="these methods need continuous ones in a finite box"):
        spaces(lines(action_space=box))


def test_an_environment_of_a_module_that_registers_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
        import gymnasium
        from decoupled.rl.testing import Line
        gymnasium.register("OfModule-v0", entry_point=Line())
    """
    (tmp_path / "line_module.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    assert spaces("line_module:OfModule-v0") == (2, 1, 2)
    with pytest.raises(UserError, match=r"cannot be made: No module named 'no_module'; name one of gymnasium"):
        spaces("no_module:OfModule-v0")


def broken() -> Any:
    raise KeyError("track")


@pytest.mark.parametrize(
    ("env", "text"),
    [
        (broken, r"env 'broken' cannot be made \(KeyError: 'track'\); correct the function that makes it"),
        (lambda: None, r"is made by a function that returns None; let it return a gymnasium.Env"),
        (lambda: 3, r"is made by a function that returns 3; let it return"),
        (lines(observation_space=None), r"has observations None; these methods need vectors"),
        (
            lines(observation_space=environments.gymnasium().spaces.Box(-1, 1, (3,))),
            r"observations of shape \(2,\), and its observation_space has \(3,\); make them agree",
        ),
    ],
)
def test_a_function_that_makes_no_environment_that_works(env: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        make(env=env)


def test_options_of_the_simulated_runtime_are_checked() -> None:
    with pytest.raises(UserError, match="unknown option of runtime 'simulated': 'latencies'"):
        make(runtime={"name": "simulated", "latencies": 3})


class Wrong:
    """A line whose reward (0) or observation (1) is not finite in its third step."""

    def __init__(self, place: int, value: float) -> None:
        self.place, self.value = place, value

    def __call__(self) -> Any:
        gym, wrong = environments.gymnasium(), self

        class Third(gym.Wrapper):
            def step(self, action: Any) -> Any:
                obs, reward, *rest = super().step(action)
                if self.unwrapped.t == 3:
                    obs, reward = (obs, wrong.value) if wrong.place == 0 else (obs * wrong.value, reward)
                return obs, reward, *rest

        return Third(Line()())


@pytest.mark.parametrize("actors", [0, 1])
@pytest.mark.parametrize(("place", "value", "what"), [(0, np.nan, "nan in the reward"), (1, np.nan, "nan in the obs")])
def test_an_environment_that_gives_what_is_not_finite(actors: int, place: int, value: float, what: str) -> None:
    with (
        make(actors, "simulated", env=Wrong(place, value)) as trainer,
        pytest.raises(OperationError, match=rf"environment 0 of 'env' gives {what}.* of step 3 of an episode; correct"),
    ):
        trainer.fit(30)


def test_contact_forces_are_not_to_be_predicted() -> None:
    assert spaces("HalfCheetah-v5") == (17, 6, 17)
    assert spaces("Ant-v5") == (105, 8, 27)


def test_effective_rank_by_hand() -> None:
    torch.manual_seed(0)
    assert srank(torch.outer(torch.randn(50), torch.randn(7))) == 1
    assert srank(torch.eye(10)[:, :7]) == 7
    assert srank(torch.diag(torch.tensor([97.0, 2.5, 0.5]))) == 2
    assert srank(torch.zeros(4, 3)) == srank(torch.full((4, 3), torch.nan)) == 0
    x = torch.randn(30, 60, dtype=torch.float64)
    sigma = torch.linalg.svdvals(x).cumsum(0)
    assert srank(x) == int((sigma < 0.99 * sigma[-1]).sum()) + 1
