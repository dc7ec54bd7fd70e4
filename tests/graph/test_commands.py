"""The commands train and compare a task: same files, same records, with the synchronous model beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled import cli, registry, tasks
from decoupled.errors import UserError
from decoupled.graph import Asynchrony, Instance, NodeGraph, Task
from decoupled.graph.testing import right, rnn, sequences

LENGTHS = [1, 3, 2, 4]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.recurrent, self.out = nn.Embedding(5, 4), nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, batch: Sequence[Instance]) -> tuple[Tensor, float, int]:
        losses, score = [], 0.0
        for instance in batch:
            h = torch.zeros(2, 4)
            for token in instance.messages[:-2]:
                h = torch.tanh(self.recurrent(torch.cat([self.embed(token.payload), h], 1)))
            label = instance.messages[-1].payload
            losses.append(F.cross_entropy(self.out(h), label))
            score += right(self.out(h), label)
        return torch.stack(losses).mean(), score, 2 * len(batch)


class Tiny(Task):
    def graph(self) -> NodeGraph:
        return rnn(5, 4, 3)

    def instances(self, split: str) -> list[Instance]:
        with torch.random.fork_rng():
            torch.manual_seed(len(split))
            return sequences(LENGTHS * 3, 5, 4, 3, rows=2)

    def synchronous(self) -> nn.Module:
        return Model()

    def batches(self, split: str, size: int, order: Sequence[int] | None = None) -> Iterable[list[Instance]]:
        instances = self.instances(split)
        numbers = list(order) if order is not None else list(range(len(instances)))
        return ([instances[n] for n in numbers[i : i + size]] for i in range(0, len(numbers), size))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks.tasks()
    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))
    tasks.register("tiny")(Tiny)


def run(*words: str) -> int:
    return cli.main([*words, "optimizer=sgd", "momentum=0", "--quiet"])


def method() -> str:
    (name,) = registry.methods(Asynchrony)
    return name


def test_train_writes_what_other_runs_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run("train", f"method={method()}", "task=tiny", "epochs=2", "--out", str(out)) == 0
    assert "test accuracy" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "metrics.jsonl", "checkpoint.pt", "events.jsonl.gz", "graph.svg"
    }  # fmt: skip
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["instances"] for record in records] == [12, 12]
    assert set(torch.load(out / "checkpoint.pt")) == {
        "embed.weight", "recurrent.weight", "recurrent.bias", "out.weight", "out.bias"
    }  # fmt: skip
    assert cli.main(["trace", str(out)]) == 0
    table = capsys.readouterr().out
    assert "worker1" in table, table


def test_compare_has_the_same_model_in_plain_pytorch_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "compared"
    words = ["task=tiny", f"methods=[{method()}]", "epochs=2", "seeds=1", "runtime=threads", "batch_size=4"]
    assert run("compare", *words, "--out", str(out)) == 0
    results = json.loads((out / "results.json").read_text())
    ours, control = results["records"]
    assert (ours["method"], control["method"]) == (method(), "synchronous")
    assert results["baseline"] == control["label"] and control["speedup_over_backprop"] == 1.0
    assert ours["parameters"] == control["parameters"] and ours["samples"] == control["samples"] == 48
    assert len(ours["utilisation"]) == len(ours["staleness"]) == 2 and len(ours["curve"]) == 2
    assert ours["test_score"] == ours["test_accuracy"]
    assert (out / "report.html").is_file() and (out / "trace.json").is_file()


def test_a_loss_that_is_not_finite_stops_with_node_and_instance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("task=tiny", "lr=1e30", "runtime=simulated")
    assert run("train", f"method={method()}", *words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(
        r"worker\d, operation F loss .*node 'loss', instance \d+: the loss is \w+; lower the learning", line
    )
    out = tmp_path / "compared"
    assert run("compare", f"methods=[{method()}]", *words, "controls=false", "seeds=1", "--out", str(out)) == 1
    (record,) = json.loads((out / "results.json").read_text())["records"]
    assert record["status"] == "failed" and "NonFiniteError" in record["error"]


def test_wrong_kinds_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    chain = registry.methods()[0]
    for words, text in [
        (("train", f"method={method()}"), "trains graphs of nodes (task=NAME"),
        (("train", f"method={chain}", "task=tiny"), f"method '{chain}' trains networks cut into blocks"),
        (("train", f"method={method()}", "task=tinny"), "unknown task 'tinny'. Did you mean 'tiny'"),
        (("train", f"method={method()}", "task=tiny", "resume=x"), "leave out resume="),
        (("train", f"method={method()}", "task=tiny", "blocks=[1]"), "blocks of a task are workers"),
        *(
            (("train", f"method={method()}", "task=tiny", word), f"{word} means nothing for graphs; leave it out")
            for word in (
                "data=x",
                "model=x",
                "precision=bf16",
                "augment=True",
                "on_nonfinite=skip",
                "steps=5",
                "actors=1",
                "batch_size=3",
            )
        ),
        (("compare", f"methods=[{method()}]", "task=tiny", "sweep.augment=[true]"), "augment=True means nothing for"),
    ]:
        assert run(*words) == 2
        assert text in capsys.readouterr().err
    with pytest.raises(UserError, match="takes no corrections"):
        registry.make({"name": method(), "corrections": ["clip"]}, Asynchrony)
