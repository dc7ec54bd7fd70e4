"""RLTrainer: trains a policy in an environment, with acting, replay, learning and evaluation apart, on any runtime.

    with RLTrainer("Pendulum-v1", {"name": "...", "actors": 2}, runtime="processes") as trainer:
        trainer.fit(10_000)                          environment steps
        print(trainer.evaluate(episodes=10)["return"])

    actor 0..N-1 --experience--> replay --drawn--> learner          replay --go--> actors
         <------------weights------------------------+              learner --judged--> replay

`fit` ends drained: all steps are in the replay and all updates they allow are made. Evaluation is a run of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean, pstdev
from typing import Any

import torch

from decoupled import registry
from decoupled.build import make_runtime
from decoupled.errors import UserError
from decoupled.rl.acting import Acting, ActingActor
from decoupled.rl.agent import Agent
from decoupled.rl.environments import Spec, labelled, spaces
from decoupled.rl.evaluating import Evaluator, Sender
from decoupled.rl.learning import Learning, LearningActor, Loop
from decoupled.rl.memory import Memory, MemoryActor
from decoupled.rl.replay import Replay
from decoupled.rl.roles import Roles
from decoupled.rl.srank import srank
from decoupled.rl.statistics import RoleStatistics, adam, record
from decoupled.rl.steps import batch_of, width
from decoupled.rl.wiring import Elsewhere, costs_of, joined
from decoupled.runtime.contract import Actor, Edge, Graph, Observer, Runtime
from decoupled.specs import check_seed, positive
from decoupled.steps import MakeOptimizer

LEARNER = "learner"
RANK_ROWS = 2048  # transitions that the effective rank is taken over


class RLTrainer:
    """Trains a policy.

    Args:
        env: a name of gymnasium, a mapping with ``name`` and options of `gymnasium.make`, or a function that makes one.
        method: a name, a mapping with name and options, or `Roles`.
        optimizer: parameters -> Optimizer, called once per network that has one. batch_size: transitions per update.
        seed: of weights, environments, exploration and draws.
        runtime: "threads", "simulated", "processes", a mapping with name and options, or a Runtime, which stays open.
        costs: on the simulated runtime, seconds of an environment step ("act"), an update ("update") and an auxiliary
            one ("auxiliary"); default 1 each.
        observers: look on at operations and messages. on_steps: called with environment steps as they come in, and with
            0 at every auxiliary update before the policy's.

    Attributes:
        agent: the algorithm with its networks. memory: replay, pace and tally of the latest `fit`.
        steps, updates: so far. epoch: runs of `fit` so far.

    Raises:
        UserError: an environment that does not exist or does not fit, or an impossible option.
    """

    def __init__(
        self,
        env: Spec,
        method: str | Mapping[str, Any] | Roles,
        *,
        optimizer: MakeOptimizer = adam,
        batch_size: int = 256,
        seed: int = 0,
        runtime: str | Mapping[str, Any] | Runtime = "threads",
        costs: Mapping[str, float] | None = None,
        observers: Sequence[Observer] = (),
        on_steps: Callable[[int], None] = lambda steps: None,
    ) -> None:
        self.roles = roles = method if isinstance(method, Roles) else registry.make(method, Roles)
        roles.check(batch_size)
        check_seed(seed, negative=False)
        self.env, self.spaces, self.seed = env, spaces(env), seed
        self._optimizer, self._batch_size = optimizer, batch_size
        self._observers, self._on_steps = observers, on_steps
        self._names = [LEARNER, *(f"actor{i}" for i in range(roles.actors))]
        self._owns_runtime, self._hosted = not isinstance(runtime, Runtime), False
        self.runtime = make_runtime(runtime, len(self._names), cost=costs_of(costs, roles))
        self._actors: list[Any] = []
        self._restored: Mapping[str, Any] | None = None
        self._busy, self._wait, self._bytes = ({} for _ in range(3))
        self.epoch = 0
        if self.runtime.rank == 0:
            self.agent = self._make_agent()
            replay = Replay(
                roles.capacity, width(self.spaces, roles.n_step), roles.prioritized, roles.alpha, roles.beta, seed
            )
            self.memory = Memory(roles, replay, batch_size, self.agent.has_auxiliary, on_steps)
            self._learning = Learning(self.agent, self.spaces, roles.n_step)

    @property
    def steps(self) -> int:
        """Environment steps so far."""
        return self.memory.pace.steps

    @property
    def updates(self) -> int:
        """Updates of actor and critics so far."""
        return self.memory.pace.updates

    def fit(self, steps: int) -> dict[str, Any]:
        """Make so many environment steps (rounded up to whole steps of every environment) and the updates they allow.

        Returns:
            epoch, steps and updates in all, steps_done and updates_done, seconds and both rates of this run, ratio,
            drift (most updates that it was behind), age and lag (of sampled transitions: environment steps, and
            updates of the policy that made them), error (|td|), auxiliary (loss), train_return, srank of each critic.
            What there was none of is None.

        Raises:
            UserError: no steps. OperationError: a role failed; names it.
        """
        positive("fit", steps=steps)
        restored, self._restored = self._restored, None
        return self._fit(steps, restored)

    def evaluate(self, episodes: int = 10) -> dict[str, float]:
        """Play with the best known actions: mean return, its spread, mean length. Starts differ from time to time."""
        positive("evaluate", episodes=episodes)
        return self._evaluate(episodes, 1_000_000 + 10_000 * self.seed + self.steps)

    def statistics(self) -> list[RoleStatistics]:
        """One frozen record per role."""
        places = self.runtime.places
        return [
            RoleStatistics(name, places.get(name, 0), self._busy[name], self._wait[name], self._bytes.get(name, 0))
            for name in self._busy
        ]

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on from here; bit for bit where one loop does all (actors = 0)."""
        states = {name: one for found in self.runtime.ask(self, "_acting_states") for name, one in found.items()}
        if self._restored is not None:
            states = dict(self._restored)
        return {
            "format": 1, "method": self.roles.name, "seed": self.seed, "epoch": self.epoch, "options": self._options(),
            "agent": self.agent.state_dict(), "memory": self.memory.state_dict(), "acting": states,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned.

        Raises:
            UserError: it is of something else, or of other options than it can go on with.
        """
        needed = {"agent", "memory", "acting", "epoch", "options"}
        if not needed <= set(state) or state.get("method") != self.roles.name:
            raise UserError(
                f"the state is of method {state.get('method')!r}, this trainer runs {self.roles.name!r}; give one that "
                "the same method and version has written"
            )
        for name, now in self._options().items():
            if (before := state["options"].get(name, now if name == "optimizers" else None)) != now:
                raise UserError(
                    f"the state was saved with {name}={before}, this trainer has {name}={now}: go on with "
                    f"{name}={before}, or begin anew"
                )
        try:
            self.agent.load_state_dict(state["agent"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise UserError(f"the state does not fit the networks ({str(error).splitlines()[0]})") from error
        self.memory.load_state_dict(state["memory"])
        self.epoch, self._restored = state["epoch"], state["acting"]

    def close(self) -> None:
        """End environments and workers; idempotent."""
        for actor in self._actors:
            close = getattr(actor, "close", None)
            if close is not None:
                close()
        self.runtime.release(self)
        if self._owns_runtime:
            self.runtime.close()

    def __enter__(self) -> RLTrainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- on several processes, every one of them goes through this -----------------------------------

    def _fit(self, steps: int, restored: Mapping[str, Any] | None) -> dict[str, Any]:
        self._host()
        with self.runtime.call(self, "_fit", steps, restored):
            self._build()
            for name, acting in self._own_acting().items():
                if restored and name in restored:
                    acting.load_state_dict(restored[name])
            before = (self.steps, self.updates) if self.runtime.rank == 0 else (0, 0)
            for actor in self._actors:
                self._begin(actor, before[0] + steps)
            start = time.perf_counter()
            graph = Graph([a for a in self._actors if a.name != "evaluator"], joined(self._names, self.roles))
            timings = self.runtime.run(graph, self._observers)
            seconds = time.perf_counter() - start - timings.setup
            for name in timings.busy:
                self._busy[name] = self._busy.get(name, 0.0) + timings.busy[name]
                self._wait[name] = self._wait.get(name, 0.0) + timings.wait[name]
            for actor in graph.actors:
                self._bytes[actor.name] = self.runtime.agree(getattr(actor, "bytes_sent", 0), of=actor.name)
            self.epoch += 1
            return self.runtime.agree(self._found(before, seconds) if self.runtime.rank == 0 else None)

    def _evaluate(self, episodes: int, seed: int) -> dict[str, float]:
        self._host()
        with self.runtime.call(self, "_evaluate", episodes, seed):
            self._build()
            evaluator = next(actor for actor in self._actors if actor.name == "evaluator")
            evaluator.begin(episodes, seed)
            sender = Sender(self.agent) if self.runtime.owns(LEARNER) else Elsewhere(LEARNER)
            edge = Edge(LEARNER, "weights", "evaluator", "weights", 1)
            # An actor that takes no part but has its place: the evaluator lives beside it.
            idle: list[Actor] = [Elsewhere(name) for name in self._names[1:]]
            self.runtime.run(Graph([sender, evaluator, *idle], [edge]))
            found = self.runtime.agree(evaluator.found, of="evaluator")
            returns = [total for total, _ in found]
            return {
                "return": fmean(returns), "spread": pstdev(returns), "length": fmean(length for _, length in found)
            }  # fmt: skip

    def _found(self, before: tuple[int, int], seconds: float) -> dict[str, Any]:
        memory, ranks = self.memory, None
        if memory.pace.updates:
            rows = memory.replay.latest(min(RANK_ROWS, len(memory.replay)))
            with torch.no_grad():
                features = self.agent.features(batch_of(rows, self.spaces, self.roles.n_step))
            ranks = [srank(one) for one in features]
        return {"epoch": self.epoch, **record(memory.pace, memory.tally, before, seconds), "srank": ranks}

    def _host(self) -> None:
        if not self._hosted:
            self._hosted = True
            make = partial(RLTrainer, self.env, self.roles, optimizer=self._optimizer, batch_size=self._batch_size)
            seed = self.seed
            self.runtime.host(self, lambda runtime: make(seed=seed, runtime=runtime))

    def _build(self) -> None:
        """The actors, those of this process only; placed once."""
        if self._actors:
            return
        self.runtime.place(self._names)
        roles, name = self.roles, self.roles.name
        last = self._names[-1]
        self._actors = [Evaluator(self.env, self._make_agent, last, name)]
        if not self.runtime.owns(LEARNER):
            self._actors += [Elsewhere(LEARNER), Elsewhere("replay", LEARNER)]
        elif roles.actors:
            memory = MemoryActor(self.memory, self._names[1:], roles, LEARNER, name)
            self._actors += [LearningActor(self._learning, roles, name), memory]
        else:
            acting = Acting(self.env, self.spaces, roles, self.agent, self.seed)
            self._actors.append(Loop(acting, self.memory, self._learning, name))
        for i, actor in enumerate(self._names[1:]):
            self._actors.append(ActingActor(actor, partial(self._make_acting, i), name))

    def _begin(self, actor: Any, goal: int) -> None:
        if isinstance(actor, LearningActor):
            actor.begin(self.updates)
        elif isinstance(actor, MemoryActor | Loop):
            actor.begin(goal)
        elif isinstance(actor, ActingActor):
            actor.begin()

    def _own_acting(self) -> dict[str, Acting]:
        """Where this process acts: name of the role -> what it steps."""
        mine = [a for a in self._actors if isinstance(a, Loop | ActingActor) and self.runtime.owns(a.name)]
        return {actor.name: actor.acting for actor in mine}

    def _acting_states(self) -> dict[str, Any]:
        return {name: acting.state_dict() for name, acting in self._own_acting().items()}

    def _options(self) -> dict[str, Any]:
        """What a saved state depends on."""
        names = ("actors", "envs", "capacity", "prioritized", "alpha", "n_step", "gamma")
        own = {name: getattr(self.roles, name) for name in names}
        kinds = sorted({type(optimizer).__name__ for optimizer in self.agent.optimizers.values()})
        return {"env": labelled(self.env), **own, **self.agent.options, "optimizers": kinds}

    def _make_agent(self) -> Agent:
        return self.roles.agent(self.spaces, self._optimizer, self.seed)

    def _make_acting(self, number: int) -> Acting:
        seed = 100_000 * (number + 1) + 1_000 * self.seed
        return Acting(self.env, self.spaces, self.roles, self._make_agent(), seed)
