"""What the Gloo way relies on, measured: if a release of torch changes one of these, it is better to hear it here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import distributed as dist

SOON = 20.0
_Gloo: Any = dist.ProcessGroupGloo


def pair(timeout: float = SOON) -> list[Any]:
    """Two ranks of one group in one process."""
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    groups: list[Any] = [None, None]

    def make(rank: int) -> None:
        options = _Gloo._Options()
        options._devices = [_Gloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=timeout)
        groups[rank] = _Gloo(store, rank, 2, options)

    finish([start(lambda rank=rank: make(rank)) for rank in range(2)])
    return groups


def start(work: Callable[[], Any]) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, errors


def finish(tasks: list[tuple[threading.Thread, list[BaseException]]]) -> list[BaseException]:
    for thread, _ in tasks:
        thread.join(SOON)
        assert not thread.is_alive()
    return [error for _, errors in tasks for error in errors]


def test_nothing_completes_unless_somebody_waits() -> None:
    a, b = pair()
    target = torch.zeros(4)
    received = b.recv([target], 0, 0)
    a.send([torch.ones(4)], 1, 0).wait()
    assert not received.is_completed()
    received.wait()
    assert target.tolist() == [1.0] * 4


def test_transfers_of_one_tag_match_in_order_even_if_begun_before_the_other_side_is_there() -> None:
    a, b = pair()
    works = [a.send([torch.full((n + 1,), float(n))], 1, 0) for n in range(8)]
    targets = [torch.zeros(n + 1) for n in range(8)]
    for work in [b.recv([target], 0, 0) for target in targets]:
        work.wait()
    for work in works:
        work.wait()
    assert [target.tolist() for target in targets] == [[float(n)] * (n + 1) for n in range(8)]


def test_a_wait_with_its_own_time_outlasts_the_groups() -> None:
    a, b = pair(timeout=0.2)
    work = b.recv([torch.zeros(1)], 0, 0)
    task = start(lambda: work.wait(timedelta(days=1)))
    task[0].join(0.6)
    assert task[0].is_alive()
    a.send([torch.ones(1)], 1, 0).wait(timedelta(days=1))
    assert not finish([task])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_wait_that_times_out_wakes_both_ends(rank: int) -> None:
    groups = pair()
    a, b = groups
    long = timedelta(days=1)
    tasks = [
        start(lambda: b.recv([torch.zeros(4)], 0, 0).wait(long)),
        start(lambda: a.send([torch.zeros(1 << 20)], 1, 9).wait(long)),
    ]
    tasks[0][0].join(0.05)
    assert all(thread.is_alive() for thread, _ in tasks)
    with pytest.raises(RuntimeError):
        groups[rank].recv([torch.empty(1)], 1 - rank, 77).wait(timedelta(milliseconds=1))
    assert [type(error) for error in finish(tasks)] == [RuntimeError] * 2
    with pytest.raises(RuntimeError):  # now even beginning fails
        b.recv([torch.empty(1)], 0, 0).wait(long)


def test_a_store_written_in_python_serves_for_the_rendezvous() -> None:
    told: dict[str, Any] = {}
    changed = threading.Condition()

    class Store(dist.Store):  # pyright: ignore[reportPrivateImportUsage]
        def set(self, key: str, value: str | bytes) -> None:
            with changed:
                told[key] = value
                changed.notify_all()

        def get(self, key: str) -> bytes:
            with changed:
                changed.wait_for(lambda: key in told, SOON)
                return told[key]

        def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
            for key in keys:
                self.get(key)

    def make(rank: int) -> None:
        options = _Gloo._Options()
        options._devices = [_Gloo.create_device(hostname="127.0.0.1")]
        stores[rank] = Store()
        groups[rank] = _Gloo(stores[rank], rank, 2, options)

    groups, stores = {}, {}
    assert not finish([start(lambda rank=rank: make(rank)) for rank in range(2)])
    work = groups[1].recv([target := torch.zeros(1)], 0, 0)
    groups[0].send([torch.ones(1)], 1, 0).wait()
    work.wait()
    assert target.item() == 1.0
