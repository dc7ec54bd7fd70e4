"""One episode of a policy as a GIF; where nothing can be drawn, a line that says why."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from decoupled.errors import first_line
from decoupled.rl.agent import Agent
from decoupled.rl.environments import Spec, maker

MOST = 200  # frames


def write_gif(spec: Spec, agent: Agent, path: Path, seed: int = 0, size: int = 240) -> str:
    """Play one episode (without a time limit: its first `MOST` steps) with the best known actions and draw it.

    Returns:
        A line for the user.
    """
    if "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # without a screen
    try:
        from PIL import Image

        frames = [Image.fromarray(frame) for frame in _frames(spec, agent, seed)]
    except Exception as error:  # graphics fail in as many ways as there are drivers
        return f"no rollout: this machine cannot draw it ({type(error).__name__}: {first_line(error)})"
    for frame in frames:
        frame.thumbnail((size, size))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50, loop=0)
    return f"rollout: {path} ({len(frames)} frames)"


def _frames(spec: Spec, agent: Agent, seed: int) -> list[Any]:
    env = maker(spec, render_mode="rgb_array")()
    try:
        obs, _ = env.reset(seed=seed)
        low, high = env.action_space.low, env.action_space.high
        frames, over = [], False
        limit = getattr(env.spec, "max_episode_steps", None) or MOST
        every = max(1, limit // MOST)
        step = 0
        while not over and step < limit:
            if step % every == 0:
                frames.append(np.asarray(env.render()))
            with torch.no_grad():
                action = agent.act(torch.from_numpy(np.asarray(obs, np.float32)[None]), None)[0].numpy()
            obs, _, terminated, truncated, _ = env.step(low + (action + 1) * (0.5 * (high - low)))
            over, step = terminated or truncated, step + 1
        return frames
    finally:
        env.close()
