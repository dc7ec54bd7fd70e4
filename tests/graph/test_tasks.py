"""Tasks are found by name, and wrong names and options are refused."""

from __future__ import annotations

import pytest

from decoupled import tasks
from decoupled.errors import UserError
from decoupled.graph import Instance, NodeGraph, Task


class Nothing(Task):
    def __init__(self, *, size: int = 1) -> None:
        self.size = size

    def graph(self) -> NodeGraph:
        return NodeGraph()

    def instances(self, split: str) -> list[Instance]:
        return []


def test_a_task_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks.tasks()
    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))
    tasks.register("nothing")(Nothing)
    made = tasks.make({"name": "nothing", "size": 3})
    assert isinstance(made, Nothing) and made.size == 3 and made.name == "nothing"
    assert "nothing" in tasks.tasks()
    with pytest.raises(UserError, match=r"unknown task 'nothin'. Did you mean 'nothing'"):
        tasks.make("nothin")
    with pytest.raises(UserError, match=r"unknown option of task 'nothing': 'sise'. Did you mean 'size'"):
        tasks.make({"name": "nothing", "sise": 3})
    with pytest.raises(ValueError, match="registered already"):
        tasks.register("nothing")(type("Other", (Nothing,), {}))
