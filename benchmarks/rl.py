"""Figures of reinforcement learning on the runtime; `python -m` this module.

    pendulum     SAC and TD3 on Pendulum-v1: mean return of 10 evaluation episodes, every 1,000 of 10,000 steps
    auxiliary    OFENet's loss on HalfCheetah-v5 after 10,000 random steps and 10,000 updates: each norm, two units
    asynchrony   an actor and the learner on two workers against one loop, at the same ratio; two loops as the limit
    small        the methods of suite=rl_small, one run after the other: return, effective rank, seconds
    pendulums    the same of suite=rl_pendulums: one update for every step
    paper        updates per second of the paper's sizes on this machine, and what a run would take (extrapolated)

Every part is a section of ``benchmarks/results/rl.md`` with its command, written anew after every run that ends: what
is cut off leaves what it has. The suites are also there for `decoupled compare`, with a report and `--resume`.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from decoupled import registry
from decoupled.benchmarks.page import environment, machine, table, verdict
from decoupled.benchmarks.page import write as keep_notes
from decoupled.benchmarks.speed import RESULTS, Spread
from decoupled.config import CompareConfig, changed, read
from decoupled.rl import RLTrainer, Roles
from decoupled.rl.agent import Batch, Spaces
from decoupled.rl.environments import gymnasium, maker
from decoupled.rl.experiment import RLSetting
from decoupled.rl.statistics import adam
from decoupled.rl.steps import batch_of
from decoupled.runtime.contract import Observer

Keep = Callable[[str], None]  # what the section says so far
NORMS, UNITS = ("batch", "layer", "none"), ("Bullet's", "MuJoCo's")
TITLE = "# Reinforcement learning: roles apart on two workers"


@dataclass(frozen=True)
class Options:
    """The command line; see `--help`."""

    parts: tuple[str, ...] = ()
    seeds: int = 3
    steps: int = 10_000
    updates: int = 10_000
    rounds: int = 5
    envs: tuple[str, ...] = ()
    norms: tuple[str, ...] = NORMS
    units: tuple[str, ...] = UNITS
    out: Path = RESULTS


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m decoupled.benchmarks.rl", description=__doc__)
    add = parser.add_argument
    add("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    for name, text in {
        "seeds": "runs of the parts that learn",
        "steps": "environment steps (pendulum), random steps (auxiliary), steps per round (asynchrony)",
        "updates": "of the features (auxiliary)",
        "rounds": "of the timed part",
    }.items():
        add(f"--{name}", type=int, default=getattr(Options, name), help=f"{text} (default {getattr(Options, name)})")
    add("--envs", nargs="+", default=[], help="of the suites: NAME or NAME:STEPS (default: the suite's own)")
    for name, known, text in (("norms", NORMS, "OFENet's"), ("units", UNITS, "of observations")):
        add(f"--{name}", nargs="+", choices=known, default=known, help=f"{text} (auxiliary; default: all)")
    add("--out", type=Path, default=RESULTS, help="folder of rl.md")
    given = parser.parse_args(arguments)
    if wrong := [part for part in given.parts if part not in PARTS]:
        parser.error(f"unknown part {wrong[0]!r}; choose from {', '.join(PARTS)}")
    given.parts = given.parts or PARTS
    for name in ("parts", "envs", "norms", "units"):
        setattr(given, name, tuple(getattr(given, name)))
    return Options(**vars(given))


def pendulum(options: Options, keep: Keep) -> None:
    rows: list[list[str]] = []
    for name, seed in itertools.product(("sac", "td3"), range(options.seeds)):
        found: list[float] = []
        method = {"name": name, "units": 64, "warmup": 1000}
        with RLTrainer("Pendulum-v1", method, seed=seed, optimizer=fast_adam) as trainer:
            for _ in range(max(1, options.steps // 1000)):
                trainer.fit(min(1000, options.steps))
                found.append(trainer.evaluate(10)["return"])
            steps = trainer.steps
        first = next((f"{1000 * (i + 1):,}" for i, value in enumerate(found) if value >= -200), "never")
        returns = [f"{x:.0f}" for x in found]
        rows.append([name, str(seed), returns[-1], verdict(found[-1] >= -200), first, " ".join(returns)])
        ends: dict[str, list[float]] = {}
        for row in rows:
            ends.setdefault(row[0], []).append(float(row[2]))
        means = ", ".join(f"{one} {statistics.fmean(of):.0f}" for one, of in ends.items())
        keep(
            f"2 x 64 units, SAC with automatic temperature, Adam 1e-3, batch 256, one loop, 1,000 random steps first, "
            f"{steps:,} steps in all; mean return of 10 episodes without exploration, starts of their own each time. "
            f"Must reach -200 within 10,000 steps; means over the seeds at the end: {means}; {len(rows)} of "
            f"{2 * options.seeds} runs.\n\n"
            + table(
                ["method", "seed", "return at the end", "reached", "first at steps", "return every 1,000 steps"], rows
            )
        )


def fast_adam(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Adam with a rate for small networks."""
    return torch.optim.Adam(parameters, 1e-3, fused=True)


def auxiliary(options: Options, keep: Keep) -> None:
    rows: list[list[str]] = []
    for seed, units, norm in itertools.product(range(options.seeds), options.units, options.norms):
        method = {
            "name": "larger_rl", "actors": 0, "units": 32, "ofenet": norm, "warmup": options.steps,
            "pretrain": options.updates,
        }  # fmt: skip
        with RLTrainer(CHEETAHS[units], method, seed=seed) as trainer:
            trainer.fit(options.steps)
            losses = trainer.memory.tally.auxiliary
            used = _errors(trainer, trainer.memory.replay.latest(options.steps))[0].mean().item()
            held_out, variance, speeds = _held_out(trainer)
        every = max(1, len(losses) // 5)
        curve = " ".join(f"{statistics.fmean(losses[i : i + every][-100:]):.4f}" for i in range(0, len(losses), every))
        last = statistics.fmean(losses[-100:])
        share = f"{last / variance:.4f}"
        rows.append(
            [
                f"{units}, {norm}",
                str(seed),
                f"{last:.4f}",
                verdict(last < 0.02),
                share,
                f"{used:.4f}",
                f"{held_out:.4f}",
                f"{speeds:.2f}",
                curve,
            ]
        )
        keep(
            f"HalfCheetah-v5, {options.steps:,} random steps, then {options.updates:,} updates of OFENet alone (8 "
            "blocks, 240 units per stack, batch 256, Adam 3e-4): mean squared error of the next observation over batch "
            "and dimensions. *After*: mean of the last 100 batches; must fall under 0.02. *Share*: of the targets' "
            "variance. *As used*: on the same random steps with the running statistics, which the policy sees features "
            "with, and without the noise of those of a batch. *Held out*: 2,000 more random steps, as used.\n\n"
            "The aim comes from the figures of a port (0.005 where it works, 0.12 where it does not [code: README of "
            "BY571/OFENet]), whose default environment is HalfCheetahBulletEnv-v0 [code: its sac_ofenet.py]. That one "
            "observes speeds of joints times 0.1, of the body times 0.3, positions of joints scaled to their range, "
            "and clips all to 5 [code: pybullet's robot_bases.py and robot_locomotors.py]; MuJoCo's does not scale. "
            "*Bullet's*: MuJoCo's HalfCheetah, all 17 observations, in those units, the body's turning times 0.1; not "
            "the port's task, whose 17 targets are other quantities of another simulator.\n\n"
            + table(
                [
                    "units, norm",
                    "seed",
                    "after",
                    "reached",
                    "share",
                    "as used",
                    "held out",
                    "of it speeds",
                    "after each fifth",
                ],
                sorted(rows),
            )
        )


def bullet_units() -> Any:
    """HalfCheetah-v5 with observations scaled as those of HalfCheetahBulletEnv-v0."""
    gym = gymnasium()
    env = maker("HalfCheetah-v5")()
    low, high = env.unwrapped.model.jnt_range[-6:].T  # of the joints with motors, as all but the three of the body
    offset, scale = np.zeros(17), np.ones(17)
    offset[2:8], scale[2:8] = (low + high) / 2, 2 / (high - low)
    scale[8:10], scale[10:] = 0.3, 0.1  # forwards and upwards; turning
    box = gym.spaces.Box(-5, 5, (17,), np.float64)
    return gym.wrappers.TransformObservation(env, lambda obs: np.clip((obs - offset) * scale, -5, 5), box)


CHEETAHS: dict[str, Any] = dict(zip(UNITS, (bullet_units, "HalfCheetah-v5"), strict=True))


def _held_out(trainer: RLTrainer) -> tuple[float, float, float]:
    """On new random transitions, in inference mode: the loss, the targets' mean variance, the share of speeds in it."""
    errors, after = _errors(trainer, torch.from_numpy(trainer._own_acting()["learner"].make(2000, True).rows))
    return errors.mean().item(), after.var(0).mean().item(), (errors[8:].sum() / errors.sum()).item()


def _errors(trainer: RLTrainer, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared error of every target of these transitions in inference mode, and the targets."""
    batch, net = batch_of(rows, trainer.spaces, 1), cast(Any, trainer.agent.networks.get_submodule("shared.features"))
    with torch.no_grad():
        predicted = net.head(net.pair(net.state(batch.obs), batch.action))
        after = batch.after[:, : net.target]
        return (predicted - after).square().mean(0), after


class Shares(Observer):
    """Seconds per kind of operation: the first letter of its label."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def operation(self, actor: str, operation: str, start: float, end: float) -> None:
        self.seconds[operation[0]] += end - start


def asynchrony(options: Options, keep: Keep) -> None:
    rows: list[list[str]] = []
    for per_update in (4, 32, 64, 96):
        rates: dict[str, list[float]] = {"loop": [], "apart": []}
        shares, steps = Shares(), max(1024, min(options.steps, 256 * per_update))
        common = {"name": "sac", "envs": 8, "ratio": 1 / per_update, "warmup": 512}
        loop = RLTrainer("HalfCheetah-v5", common, observers=[shares])
        apart = RLTrainer("HalfCheetah-v5", common | {"actors": 1}, runtime="processes")
        with loop, apart:
            for trainer in (loop, apart):
                trainer.fit(1024)  # random steps, first updates, processes come up
            shares.seconds.clear()
            for number in range(options.rounds):
                pair = [("loop", loop), ("apart", apart)]
                for name, trainer in pair[:: 1 if number % 2 else -1]:
                    found = trainer.fit(steps)
                    rates[name].append((found["steps_done"] + found["updates_done"]) / found["seconds"])
            waits = {r.role: r.busy_seconds / (r.busy_seconds + r.wait_seconds) for r in apart.statistics()}
        acting, learning = shares.seconds["E"], shares.seconds["S"]
        ratios = Spread.of([a / b for a, b in zip(rates["apart"], rates["loop"], strict=True)])
        limit = (acting + learning) / max(acting, learning)
        rows.append([
            f"1 / {per_update}", f"{256 / per_update:.0f}", Spread.of(rates["loop"]).text(".0f"),
            Spread.of(rates["apart"]).text(".0f"), ratios.text(), f"{limit:.2f}", f"{waits['learner']:.2f}",
            f"{waits['actor0']:.2f}", verdict(ratios.median >= 1.5),
        ])  # fmt: skip
        header = ["updates per step", "uses of a step", "one loop", "apart", "apart / one loop", "limit",
                  "learner busy", "actor busy", ">= 1.5"]  # fmt: skip
        keep(
            "SAC, 2 x 256 units, batch 256, HalfCheetah-v5, 8 environments: environment steps and updates per second "
            "of one actor and the learner in two processes against one loop in one process, one intra-op thread each, "
            f"at the same number of updates per step. {options.rounds} interleaved rounds, ratios within a round. "
            "*Limit*: what the loop's own seconds of acting and learning allow if nothing else cost time; where one of "
            "the two is most of the work, running them apart cannot gain much.\n\n" + table(header, rows)
        )


def paper(options: Options, keep: Keep) -> None:
    rows: list[list[str]] = []
    for title, (name, more) in PAPER.items():
        agent = registry.make({"name": name, **more}, Roles).agent(ANT, adam, 0)
        count, seconds = sum(p.numel() for p in agent.networks["shared"].parameters()), []  # type: ignore[index]
        for _ in range(4):
            start = time.process_time()
            one = _random_batch(256)
            agent.auxiliary(one)
            agent.learn(one, None)
            seconds.append(time.process_time() - start)
        each = statistics.median(seconds[1:])
        rows.append([title, f"{count / 1e6:.1f}", f"{1 / each:.2f}", f"{3e6 * each / 86400:.1f}"])
        keep(
            "Ant-v5 (105 observations, 8 actions), batch 256: one update of features, actor and critics, processor "
            "time of one thread, and the days that the paper's 3 million updates would take the learner: extrapolated, "
            "nothing of the kind was run. `decoupled compare suite=rl_paper` is that setting.\n\n"
            + table(["size", "weights, millions", "updates/s", "days, extrapolated"], rows)
        )


ANT = Spaces(105, 8, 27)
PAPER: dict[str, tuple[str, dict[str, Any]]] = {
    "SAC, MLP 2 x 256": ("sac", {}),
    "SAC, OFENet 6 x 240, DenseNet 2 x 256": ("larger_rl", {"ofe_layers": 6}),
    "SAC, OFENet 6 x 240, DenseNet 2 x 2048": ("larger_rl", {"ofe_layers": 6, "units": 2048}),
    "TD3, OFENet 6 x 240, DenseNet 2 x 2048": ("larger_rl", {"ofe_layers": 6, "units": 2048, "algorithm": "td3"}),
}


def _random_batch(size: int) -> Batch:
    s, a, _ = ANT
    obs, after, action = torch.randn(size, s), torch.randn(size, s), torch.rand(size, a) * 2 - 1
    return Batch(obs, action, torch.randn(size, 1), torch.full((size, 1), 0.99), after, after)


def suite(options: Options, keep: Keep, name: str) -> None:
    """One run after the other, seed by seed; what is cut off leaves the runs that ended."""
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    config = read(CompareConfig, [f"suite={name}"])
    for seed in range(options.seeds):
        for env in options.envs or (config.env,):
            world, _, steps = env.partition(":")
            setting = RLSetting.prepare(changed(config, {"env": world, "steps": int(steps or config.steps)}))
            for spec in config.methods:
                record, _ = setting.run_method(spec, seed, lambda steps: None)
                runs.setdefault(setting.summary, {}).setdefault(record["label"], []).append(record)
                keep(_suite(name, runs, options.seeds))


def _suite(name: str, runs: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], seeds: int) -> str:
    text = (
        f"Suite {name}, {seeds} seed(s) asked for, *seeds* is how many have ended; median (least .. most) of 20 "
        "episodes at the end, others are means. The seconds were not taken on a quiet machine."
    )
    header = ["method", "seeds", "return at the end", "best", "effective rank", "age, steps", "lag, updates", "s",
              "return after each tenth"]  # fmt: skip
    return "\n\n".join(
        [text, *(f"{env}:\n\n{table(header, [_row(*one) for one in of.items()])}" for env, of in runs.items())]
    )


def _row(label: str, records: Sequence[Mapping[str, Any]]) -> list[str]:
    def mean(name: str) -> str:
        return f"{statistics.fmean(r['measures'].get(name, float('nan')) for r in records):.0f}"

    ends = Spread.of([r["measures"]["Return at the end"] for r in records])
    curves = zip(*([p["validation_score"] for p in r["curve"]] for r in records), strict=True)
    return [
        label, str(len(records)), ends.text(".0f"), mean("Best return"), mean("Effective rank"), mean("Age, steps"),
        mean("Lag, updates"), f"{statistics.fmean(r['wall_seconds'] for r in records):.0f}",
        " ".join(f"{statistics.fmean(points):.0f}" for points in curves),
    ]  # fmt: skip


PARTS: dict[str, Callable[[Options, Keep], None]] = {
    "pendulum": pendulum, "auxiliary": auxiliary, "asynchrony": asynchrony,
    "small": partial(suite, name="rl_small"), "pendulums": partial(suite, name="rl_pendulums"), "paper": paper,
}  # fmt: skip


def run(options: Options, words: Sequence[str]) -> None:
    """Run the parts; each rewrites its section of the page as it goes."""
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for part in options.parts:
        started, clock = datetime.datetime.now(datetime.UTC), time.monotonic()
        others = [word for word in words if word not in (*PARTS, "--out", str(options.out))]

        def keep(text: str, part: Any = part, others: Any = others, started: Any = started, clock: Any = clock) -> None:
            facts = environment(machine(started), " ".join(["rl", part, *others]), time.monotonic() - clock)
            write(options.out / "rl.md", part, f"{text}\n\n{facts}")
            print(f"[{time.monotonic() - clock:5.0f} s] {part}: {text.splitlines()[-1]}", flush=True)

        PARTS[part](options, keep)


def write(page: Path, part: str, text: str) -> None:
    """Put a section into the page in place of what it said before."""
    sections = {}
    if page.is_file():
        _, *pieces = re.split(r"^## (\w+)\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        sections = dict(zip(pieces[::2], pieces[1::2], strict=True))
    sections[part] = text
    body = [f"## {name}\n\n{sections[name].strip()}\n" for name in PARTS if name in sections]
    keep_notes(page, "\n".join([f"{TITLE}\n", *body]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    run(parse(words), words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
