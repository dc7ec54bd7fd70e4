"""Environments of gymnasium, several at once, with actions in [-1, 1] and a state that can be saved.

The state of an environment is the state of its random generator at its last reset and the actions since: put back by
making them again. That is exact wherever an environment draws from its own generator only, which is gymnasium's rule.

    target   the leading part of an observation that features are trained to predict: all but the external contact
             forces at its end (`cfrc_ext`, by the environment's own `observation_structure`)
"""

from __future__ import annotations

import ast
import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from decoupled.errors import NonFiniteError, UserError, first_line
from decoupled.rl.agent import Spaces
from decoupled.specs import parse, positive

Floats = NDArray[np.float32]
Spec = str | Mapping[str, Any] | Callable[[], Any]  # a name, a mapping with name and options, or what makes one
LONGEST = 10_000  # steps of an episode that is evaluated, in an environment without a time limit
REMEDY = "install it with: pip install -c constraints.txt -e '.[rl]'"


class Stepped(NamedTuple):
    """What a step of all environments led to; `obs` is before any reset."""

    obs: Floats
    reward: NDArray[np.float64]
    over: NDArray[np.bool_]  # terminal
    cut: NDArray[np.bool_]  # broken off, by a time limit


def gymnasium() -> Any:
    """The package.

    Raises:
        UserError: it is missing.
    """
    try:
        import gymnasium
    except ImportError as error:
        raise UserError(f"environments come with gymnasium, which cannot be imported ({error}); {REMEDY}") from None
    return gymnasium


def maker(spec: Spec, **more: Any) -> Callable[[], Any]:
    """A function that makes the environment; `more` are options of `gymnasium.make`.

    Raises:
        UserError: the package is missing, or a time limit that never comes; when called: it cannot be made.
    """
    gym = gymnasium()
    if callable(spec):
        return partial(_called, spec)
    name, options = parse("env", spec)
    if "max_episode_steps" in options:  # gymnasium takes -1 as "no limit": such an episode need not end
        positive(f"env {name!r}", max_episode_steps=options["max_episode_steps"])

    def make() -> Any:
        try:
            module, _, identity = name.rpartition(":")
            if module:  # gymnasium's "module:Id"; only `make` imports the module by itself
                importlib.import_module(module)
            if "mujoco" in str(gym.spec(identity).entry_point):
                _hush()
            return gym.make(name, disable_env_checker=True, **options, **more)
        except Exception as error:  # wrong options fail in as many ways as environments use them
            what = "; check its options"
            if isinstance(error, ModuleNotFoundError) and error.name == "mujoco":
                what = f"; {REMEDY}"
            elif isinstance(error, gym.error.DependencyNotInstalled):
                what = ""  # it says itself what to install
            elif isinstance(error, gym.error.Error | ImportError):
                what = "; name one of gymnasium, e.g. env=Pendulum-v1 or env=HalfCheetah-v5"
            raise UserError(f"env {name!r} cannot be made: {first_line(error)}{what}") from None

    return make


def _called(function: Callable[[], Any]) -> Any:
    """What a user's function makes, if that is an environment."""
    label = labelled(function)
    try:
        env = function()
    except Exception as error:
        cause = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"env {label!r} cannot be made ({cause}); correct the function that makes it") from error
    if not isinstance(env, gymnasium().Env):
        raise UserError(f"env {label!r} is made by a function that returns {env!r}; let it return a gymnasium.Env")
    return env


def _hush() -> None:
    """Keep from the terminal, and from a file, what MuJoCo says is out of date in gymnasium's own files."""
    mujoco: Any = importlib.import_module("mujoco")

    def warned(message: str) -> None:
        if "deprecated" not in message:
            print(f"mujoco: {message}", file=sys.stderr)

    if mujoco.get_mju_user_warning() is None:
        mujoco.set_mju_user_warning(warned)


def spaces(spec: Spec) -> Spaces:
    """Sizes of an environment, which is made for that.

    Raises:
        UserError: it cannot be made or take a step, its spaces are not flat boxes, or observations do not fit.
    """
    gym = gymnasium()
    with warnings.catch_warnings():  # that an old version is out of date; what is wrong with it is an error
        warnings.simplefilter("ignore")
        env = maker(spec)()
    try:
        label = env.spec.id if env.spec else type(env.unwrapped).__name__
        boxes: list[Any] = [getattr(env, name, None) for name in ("action_space", "observation_space")]
        action, observation = boxes
        if not isinstance(action, gym.spaces.Box) or len(action.shape) != 1 or not _continuous(action):
            raise UserError(
                f"env {label!r} has actions {action}; these methods need continuous ones in a finite box, as "
                "Pendulum-v1 or HalfCheetah-v5 have"
            )
        if not isinstance(observation, gym.spaces.Box) or len(observation.shape) != 1:
            raise UserError(f"env {label!r} has observations {observation}; these methods need vectors")
        try:  # some wrong options show themselves only here
            seen = [np.shape(env.reset(seed=0)[0]), np.shape(env.step(action.low)[0])]
        except Exception as error:
            raise UserError(f"env {labelled(spec)!r} fails: {first_line(error)}; check its options") from error
        if other := [shape for shape in seen if shape != observation.shape]:
            raise UserError(
                f"env {label!r} gives observations of shape {other[0]}, and its observation_space has "
                f"{observation.shape}; make them agree"
            )
        (size,) = observation.shape
        structure = getattr(env.unwrapped, "observation_structure", None) or {}
        return Spaces(size, action.shape[0], size - int(structure.get("cfrc_ext", 0)))
    finally:
        env.close()


def _continuous(box: Any) -> bool:
    """Whether actions are finite floating-point numbers."""
    return np.issubdtype(box.dtype, np.floating) and bool(np.isfinite([box.low, box.high]).all())


class Environments:
    """`count` copies of an environment; those whose episode ended are reset at once.

    Args:
        seed: of the first one; the others have the numbers after it.

    Attributes:
        obs: (count, observation) the present ones.
        finished: (return, length) of the episodes that have ended, to be taken away by who reads them.
    """

    def __init__(self, spec: Spec, count: int, seed: int) -> None:
        vector = gymnasium().vector
        made = vector.SyncVectorEnv([maker(spec)] * count, autoreset_mode=vector.AutoresetMode.DISABLED)
        self._vector, self.count, self._label = made, count, labelled(spec)
        self._low, self._high = made.single_action_space.low, made.single_action_space.high
        self._actions: list[list[Floats]] = [[] for _ in range(count)]  # since the last reset
        self._random = [""] * count  # before the last reset
        self._returns, self.finished = np.zeros(count), []
        self.start(seed)

    def start(self, seed: int) -> None:
        """Begin anew, as if just made."""
        for i, env in enumerate(self._vector.envs):
            env.reset(seed=seed + i)
        self.obs, self.finished = self._reset(np.ones(self.count, bool)), []

    @property
    def longest(self) -> int:
        """The time limit of an episode, `LONGEST` if there is none."""
        return getattr(self._vector.envs[0].spec, "max_episode_steps", None) or LONGEST

    def step(self, actions: Floats) -> Stepped:
        """One step of each.

        Raises:
            NonFiniteError: a reward or an observation is not finite, after an action that was.
        """
        for taken, action in zip(self._actions, actions, strict=True):
            taken.append(action)
        obs, reward, over, cut, _ = self._vector.step(self._scaled(actions))
        obs = obs.astype(np.float32)
        self._check(obs, reward, np.isfinite(actions.sum(1)))
        self._returns += reward
        ended = over | cut
        self.obs = obs
        if ended.any():
            for i in np.flatnonzero(ended):
                self.finished.append((float(self._returns[i]), len(self._actions[i])))
            self.obs = self._reset(ended)
        return Stepped(obs, reward, over, cut & ~over)

    def take_finished(self) -> list[tuple[float, int]]:
        """The episodes that have ended since this was last called."""
        found, self.finished = self.finished, []
        return found

    def random_actions(self, random: np.random.Generator) -> Floats:
        """Uniform ones."""
        return random.uniform(-1, 1, (self.count, *self._low.shape)).astype(np.float32)

    def state_dict(self) -> dict[str, Any]:
        """See the module."""
        actions = [torch.from_numpy(np.array(taken, np.float32)) for taken in self._actions]
        return {"random": list(self._random), "actions": actions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Bring every environment to where it was."""
        for env, text in zip(self._vector.envs, state["random"], strict=True):
            env.unwrapped.np_random.bit_generator.state = ast.literal_eval(text)
        self.obs = self._reset(np.ones(self.count, bool))
        taken = [actions.numpy() for actions in state["actions"]]
        for i, actions in enumerate(taken):
            env = self._vector.envs[i]
            for action in actions:
                obs, reward, *_ = env.step(self._scaled(action))
                self.obs[i] = obs
                self._returns[i] += reward
            self._actions[i] = list(actions)

    def close(self) -> None:
        """Close all; idempotent."""
        self._vector.close()

    def _scaled(self, actions: Floats) -> Floats:
        return self._low + (actions + 1) * (0.5 * (self._high - self._low))

    def _reset(self, which: NDArray[np.bool_]) -> Floats:
        for i in np.flatnonzero(which):
            self._random[i] = repr(self._vector.envs[i].unwrapped.np_random.bit_generator.state)
            self._actions[i], self._returns[i] = [], 0.0
        obs, _ = self._vector.reset(options={"reset_mask": which})
        obs = obs.astype(np.float32)
        self._check(obs, np.zeros(self.count), which)
        return obs

    def _check(self, obs: Floats, reward: NDArray[np.float64], which: NDArray[np.bool_]) -> None:
        """Refuse what an environment gives that is not finite: training would take it for a policy that diverges."""
        for what, values in (("reward", reward[:, None]), ("observation", obs)):
            for i in np.flatnonzero(which & ~np.isfinite(values).all(1)):
                wrong, step = values[i][~np.isfinite(values[i])][0], len(self._actions[i])
                raise NonFiniteError(
                    f"environment {i} of {self._label!r} gives {wrong} in the {what} of step {step} of an episode; "
                    "correct the environment"
                )


def play(envs: Environments, act: Callable[[Floats], Floats]) -> list[tuple[float, int]]:
    """One whole episode in each environment: (return, length). After `envs.longest` steps it counts as it is."""
    found: list[tuple[float, int] | None] = [None] * envs.count
    returns, length = np.zeros(envs.count), 0
    while any(one is None for one in found):
        stepped = envs.step(act(envs.obs))
        returns, length = returns + stepped.reward, length + 1
        for i in np.flatnonzero(stepped.over | stepped.cut | (length >= envs.longest)):
            found[i] = found[i] or (float(returns[i]), length)
    return [one for one in found if one is not None]


def labelled(spec: Spec) -> str:
    """A name for messages and tables."""
    if callable(spec):
        return getattr(spec, "__name__", "env")
    name, options = parse("env", spec)
    return name + (f"({', '.join(f'{k}={v}' for k, v in options.items())})" if options else "")
