"""Larger networks for deep RL: wide DenseNets, features learned apart, and acting apart from learning.

    name        algorithm   networks            features   replay        actors
    sac         SAC         MLP 2 x 256         none       uniform       one loop
    td3         TD3         MLP 2 x 256         none       uniform       one loop
    larger_rl   either      DenseNet 2 x 256    OFENet     prioritized   two

    actors --transitions, initial priorities--> replay --batches--> learner: OFENet by its own loss, then actor, critics
       ^                                           ^--new priorities---|
       +-----------weights and BatchNorm statistics--------------------+

`decoupled.rl` has the roles; a method is an algorithm with its networks, and how the roles are spread.

Source: Training Larger Networks for Deep Reinforcement Learning, Ota, Jha, Kanezaki 2021 (arXiv 2102.07920).
"""

from __future__ import annotations

from functools import partial

from decoupled.errors import unknown
from decoupled.methods.larger_rl.base import Shape
from decoupled.methods.larger_rl.sac import SAC
from decoupled.methods.larger_rl.td3 import TD3
from decoupled.registry import register
from decoupled.rl.roles import MakeAgent, Roles


@register("sac")
def sac(
    units: int = 256, layers: int = 2, connection: str = "mlp", temperature: float = 0.0, form: str = "q",
    reward_scale: float = 1.0, warmup: int = 1000, actors: int = 0, envs: int = 1, ratio: float = 1.0,
    gamma: float = 0.99,
) -> Roles:  # fmt: skip
    """SAC with plain networks; temperature 0 is automatic, form "q" or "v"."""
    agent = partial(
        SAC, shape=Shape(connection, units, layers, "relu"), temperature=temperature, form=form, scale=reward_scale
    )
    return Roles(agent, actors=actors, envs=envs, ratio=ratio, warmup=warmup, gamma=gamma)


@register("td3")
def td3(
    units: int = 256, layers: int = 2, connection: str = "mlp", reward_scale: float = 1.0, warmup: int = 1000,
    actors: int = 0, envs: int = 1, ratio: float = 1.0, gamma: float = 0.99,
) -> Roles:  # fmt: skip
    """TD3 with plain networks."""
    agent = partial(TD3, shape=Shape(connection, units, layers, "relu"), scale=reward_scale)
    return Roles(agent, actors=actors, envs=envs, ratio=ratio, warmup=warmup, gamma=gamma)


@register("larger_rl")
def larger_rl(
    algorithm: str = "sac", connection: str = "densenet", units: int = 256, layers: int = 2, activation: str = "swish",
    ofenet: str = "batch", ofe_units: int = 240, ofe_layers: int = 8, temperature: float = 0.0, form: str = "q",
    reward_scale: float = 1.0, prioritized: bool = True, alpha: float = 0.6, beta: float = 0.4, n_step: int = 1,
    gamma: float = 0.99, warmup: int = 10_000, pretrain: int = 10_000, actors: int = 2, envs: int = 1,
    ratio: float = 1.0, capacity: int = 1_000_000, push: int = 100,
) -> Roles:  # fmt: skip
    """Wide networks on OFENet's features, prioritized replay, `actors` beside the learner (0: one loop).

    `ofenet` is its norm ("batch", "layer", "none") or "off"; for the others see `Roles`, `Shape`, `SAC`.
    """
    shape = Shape(connection, units, layers, activation, ofenet, ofe_units, ofe_layers)
    algorithms: dict[str, MakeAgent] = {
        "sac": partial(SAC, shape=shape, temperature=temperature, form=form, scale=reward_scale),
        "td3": partial(TD3, shape=shape, scale=reward_scale),
    }
    if algorithm not in algorithms:
        raise unknown("algorithm", algorithm, algorithms)
    return Roles(
        algorithms[algorithm], actors=actors, envs=envs, ratio=ratio, n_step=n_step, gamma=gamma, warmup=warmup,
        pretrain=pretrain if ofenet != "off" else 0, capacity=capacity, prioritized=prioritized, alpha=alpha, beta=beta,
        push=push,
    )  # fmt: skip
