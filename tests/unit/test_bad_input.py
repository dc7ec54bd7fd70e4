"""What does not fit together is one line with the remedy and exit code 2, through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from decoupled import cli, data
from decoupled.data import Dataset, Split

DIGITS, TEXT = "data={name: digits, limit: 60}", "data={name: text, path: corpus, length: 8, limit: 20}"
MLP, RESNET = "model={name: mlp, width: 8, depth: 3}", "model=resnet8"
TRANSFORMER = "model={name: transformer, width: 8, depth: 2, heads: 2}"
SEQUENCES = r"does not fit a network that ends in (256, 8) per sample, one decision per position; use head 'auto' or"


def with_head(kind: str) -> str:
    return f"method={{name: greedy_local, head: {kind}}}"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "short").write_bytes(b"a hundred and fifty bytes" * 6)
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], *words: str, command: str = "train") -> str:
    capsys.readouterr()
    given = [command, *words, "blocks=2", "batch_size=10"]
    assert cli.main([*given, *(["epochs=1"] if command == "train" else [])]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("decoupled: ")
    return error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([with_head("cnn"), DIGITS, MLP], "head 'cnn' reads images (channels, height, width), here the block ends in"),
        (
            [with_head("sequence"), DIGITS, RESNET],
            "head 'sequence' does not fit a network that ends in (10,)",
        ),
        ([with_head("linear"), TEXT, TRANSFORMER], f"head 'linear' {SEQUENCES}"),
        ([with_head("mlp_sr"), TEXT, TRANSFORMER], f"head 'mlp_sr' {SEQUENCES}"),
        ([with_head("liner"), DIGITS, MLP], "unknown head 'liner'. Did you mean 'linear'?"),
        (["method=dgl_async", TEXT, TRANSFORMER], f"head 'mlp_sr' {SEQUENCES}"),
        (["method=predsim", TEXT, TRANSFORMER], "similarity matching reads features (F,) or images (C, H, W) of one"),
        (["method=infopro", TEXT, TRANSFORMER], "use head 'auto' or 'sequence'"),
        (["method=forward_forward", TEXT, TRANSFORMER], "needs one decision per sample between at least 2 classes"),
    ],
)
def test_heads_that_do_not_fit(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in told(capsys, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model={name: transformer, width: 8, depth: 1, heads: 2, context: 4}", TEXT],
            "a sequence of 8 tokens does not fit the transformer's context of 4; give the model context=8, or the data "
            "length=4",
        ),
        ([TRANSFORMER, DIGITS], "transformer takes sequences of tokens (length,), got inputs of shape (1, 8, 8); use"),
        ([RESNET, TEXT], "resnet takes images (C, H, W), got inputs of shape (8,); use mlp"),
        ([MLP, TEXT], "check model and batches"),
    ],
)
def test_sequences_and_models(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in told(capsys, "method=backprop", *words)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "{name: text, path: short, length: 100}",
            "dataset 'text': the validation split has 7 bytes, too few for one sequence of 100 and its next byte; give "
            "a longer text or a shorter length",
        ),
        ("{name: text, path: nowhere}", "text file nowhere does not exist; check the path"),
        ("{name: text}", "dataset 'text' needs a file; write {name: text, path: FILE}"),
        ("{name: python_source, path: .}", "there are no .py files in .; give the option path a folder with Python"),
        ("{name: digits, validation: 1000, test: 900}", "leave nothing of 1797 samples to train on; hold out fewer"),
    ],
)
def test_a_corpus_too_small_for_its_split(what: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = TRANSFORMER if "digits" not in what else MLP
    assert message in told(capsys, "method=backprop", model, f"data={what}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data={name: digits, limit: abc}"], "dataset 'digits': option 'limit' must be int | None, got 'abc'"),
        (["data={name: digits, limit: 10.5}"], "option 'limit' must be int | None, got 10.5"),
        (["data={name: digits, limit: true}"], "option 'limit' must be int | None, got True"),
        (["data={name: digits, test: abc}"], "option 'test' must be int, got 'abc'"),
        (["data={name: digits, split_seed: abc}"], "option 'split_seed' must be int, got 'abc'"),
        (["data={name: fashion_mnist, rotate: abc}"], "option 'rotate' must be float, got 'abc'"),
        (["data={name: fashion_mnist, path: 3}"], "option 'path' must be str | pathlib.Path | None, got 3"),
        (["data={name: text, path: 3}"], "option 'path' must be str | pathlib.Path | None, got 3"),
        ([DIGITS, "model={name: mlp, batch_norm: abc}"], "model 'mlp': option 'batch_norm' must be bool, got 'abc'"),
        ([DIGITS, MLP, "runtime={name: threads, intra_op: abc}"], "option 'intra_op' must be int | None, got 'abc'"),
        ([DIGITS, MLP, "runtime={name: threads, intra_op: 0}"], "intra_op must be an integer of at least 1, got 0"),
        (["task={name: list_reduction, hidden: abc}"], "task 'list_reduction': option 'hidden' must be int, got 'abc'"),
        (["seed=99999999999999999999999"], "seed must be an integer between -2**32 and 2**32, got 9999"),
    ],
)
def test_options_of_another_type(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in told(capsys, "method=backprop", *words)


def labelled(inputs: torch.Tensor, targets: torch.Tensor) -> Dataset:
    split = Split(inputs, targets)
    return Dataset("odd", tuple(inputs.shape[1:]), 3, split, split, split)


@pytest.mark.parametrize("method", ["backprop", "greedy_local", "dgl_async"])
def test_labels_of_the_wrong_kind_for_the_loss(
    method: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One class per position, and a network that decides once per sample."""
    made = labelled(torch.randn(40, 6), torch.randint(3, (40, 5)))
    monkeypatch.setitem(data._SOURCES, "odd", lambda: made)
    assert (
        "batch 0: the network's output (3,) per sample needs class numbers of shape (batch) and type int64, got int64 "
        "(10, 5); reshape them, or convert with .long()"
    ) in told(capsys, f"method={method}", "data=odd", MLP)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            torch.rand(8),
            r"takes class numbers, or a probability of each of the outputs \(3,\), got float32 \(8,\)",
        ),
        (
            torch.randint(3, (8,), dtype=torch.int32),
            r"class numbers of shape \(batch\) and type int64, got int32",
        ),
        (torch.randint(3, (8, 1)), r"got int64 \(8, 1\); reshape them"),
        (torch.full((8,), 3), "labels go from 3 to 3, but the network has 3 outputs; labels must be 0 to 2"),
    ],
    ids=["floats", "int32", "one too many dimensions", "too large"],
)
def test_labels_of_the_wrong_kind_in_python(targets: torch.Tensor, message: str) -> None:
    from decoupled import Trainer, UserError

    blocks = [torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)]
    given = {"loss": torch.nn.functional.cross_entropy, "optimizer": torch.optim.SGD, "runtime": "simulated"}
    with Trainer(blocks, "backprop", **given) as trainer, pytest.raises(UserError, match=message):
        trainer.fit([(torch.randn(8, 4), targets)])


@pytest.mark.parametrize("targets", [torch.rand(8, 3), torch.randint(3, (8,)), torch.full((8,), -100)])
def test_labels_of_the_right_kind_are_taken(targets: torch.Tensor) -> None:
    from decoupled.source import Source, Whole

    data_ = list(Source([(torch.randn(8, 4), targets)], Whole(), [], output=(3,))._passes)
    assert len(data_) == 1
