"""Reinforcement learning as roles that run apart: acting, replay, learning, evaluation; knows no algorithm.

agent.py         what an algorithm is: networks, how to act, how to learn     environments.py  gymnasium, many at once
replay.py        replay memory, uniform or prioritized (sum_tree.py)          steps.py         n-step transitions, rows
pace.py          updates per environment step, and how far either runs ahead  roles.py         what a method consists of
acting.py, memory.py, learning.py, loop.py   the actors of the runtime        trainer.py       RLTrainer
experiment.py, train.py                      the commands                     srank.py, render.py
"""

from decoupled.rl.agent import Agent, Batch, Spaces
from decoupled.rl.replay import Replay
from decoupled.rl.roles import Roles
from decoupled.rl.sum_tree import SumTree
from decoupled.rl.trainer import RLTrainer

__all__ = ["Agent", "Batch", "RLTrainer", "Replay", "Roles", "Spaces", "SumTree"]
