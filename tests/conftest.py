"""Hypothesis: no deadlines (threads share two cores with other jobs); the same examples every time in CI.

Ctrl-C: what a shell starts in the background ignores it, and so would the children that tests send it to.

Where tests run side by side (pytest-xdist), each of them has one thread: two that want all cores wait for each other.

Tests marked `costly` are fast tests of every method as it is by default, and slow ones of its other options.
"""

import os
import signal
from typing import Any

import pytest
import torch
from hypothesis import settings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("costly"):
            given: Any = item.callspec.params
            if set(given["spec"]) != {"name"} or given.get("runtime", "simulated") != "simulated":
                item.add_marker("slow")
