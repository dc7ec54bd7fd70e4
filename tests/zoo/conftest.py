"""One intra-op thread for all: it decides the order of additions, and runtimes given as objects leave it as it is."""

from collections.abc import Iterator

import pytest

from decoupled.runtime.contract import intra_op_threads


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with intra_op_threads(1):
        yield
