"""CIFAR from files of the binary version: records read back, published parts kept apart, one line for every mishap."""

import numpy as np
import pytest
import torch

from decoupled.data import load
from decoupled.errors import UserError


def write(path, labels, seed=0):
    """Records with these labels (N, labels per record); returns the pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    np.concatenate([np.asarray(labels, dtype=np.uint8).reshape(len(labels), -1), pixels], axis=1).tofile(path)
    return pixels.reshape(-1, 3, 32, 32)


@pytest.fixture
def ten(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for i in range(1, 6):
        write(folder / f"data_batch_{i}.bin", [i, i + 4, 0, 9], seed=i)
    write(folder / "test_batch.bin", [3, 2, 1])
    return folder


@pytest.fixture
def hundred(tmp_path):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    write(folder / "train.bin", [(i, 5 * i + 4) for i in range(20)])
    write(folder / "test.bin", [(19, 99), (0, 4)])
    return folder


def test_cifar10_labels_and_pixels(ten):
    dataset = load({"name": "cifar10", "path": str(ten), "validation": 4})
    assert [len(p) for p in (dataset.train, dataset.validation, dataset.test)] == [16, 4, 3]
    assert (dataset.name, dataset.inputs, dataset.classes) == ("cifar10", (3, 32, 32), 10)
    assert dataset.test.targets.tolist() == [3, 2, 1]
    counts = torch.bincount(torch.cat([dataset.train.targets, dataset.validation.targets]), minlength=10)
    assert counts.tolist() == [5, 1, 1, 1, 1, 2, 1, 1, 1, 6]
    raw = write(ten / "again.bin", [3, 2, 1]).astype(np.float64)
    mine = dataset.test.inputs.double()
    for channel in range(3):  # standardised is an increasing linear map of the pixels, channel by channel
        slope, offset = np.polyfit(raw[:, channel].ravel(), mine[:, channel].flatten(), 1)
        assert slope > 0
        np.testing.assert_allclose(slope * raw[:, channel] + offset, mine[:, channel], atol=1e-5)
    assert dataset.augment is not None
    assert (dataset.augment.padding, dataset.augment.flip) == (4, True)


def test_cifar100_has_fine_and_coarse_labels(hundred):
    fine, coarse = (load("cifar100", path=hundred, validation=2, coarse=c) for c in (False, True))
    assert (fine.classes, fine.test.targets.tolist()) == (100, [99, 4])
    assert (coarse.classes, coarse.test.targets.tolist()) == (20, [19, 0])
    assert torch.equal(fine.train.targets, 5 * coarse.train.targets + 4)


@pytest.mark.parametrize("below", ["", "cifar10"])
def test_found_below_the_data_variable(ten, below, tmp_path_factory, monkeypatch):
    root = tmp_path_factory.mktemp("data")
    (root / below).mkdir(exist_ok=True)
    ten.rename(root / below / ten.name)
    monkeypatch.setenv("DECOUPLED_DATA", str(root))
    assert len(load("cifar10", validation=2).train) == 18


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "data_batch_3.bin").unlink(), r"data_batch_3\.bin is missing while others are there; copy it"),
        (
            lambda f: (f / "test_batch.bin").write_bytes(b"\0" * 3074),
            "3074 bytes, which is no number of records of 3073",
        ),
        (lambda f: (f / "test_batch.bin").write_bytes(b""), "has 0 bytes, which is no number of records"),
        (lambda f: write(f / "test_batch.bin", [3, 10]), "has a label 10, but there are 10 classes; replace the file"),
        (lambda f: (f / "test_batch.bin").rename(f / "test_batch"), "a pickle, which is not read .* binary version"),
        (lambda f: f.rename(f.with_name("elsewhere")), "cifar10 not found in .* DECOUPLED_DATA.*nothing is downloaded"),
    ],
)
def test_damaged_or_missing_files(ten, change, message):
    change(ten)
    with pytest.raises(UserError, match=message) as error:
        load("cifar10", path=ten, validation=2)
    assert "\n" not in str(error.value)


def test_the_python_version_beside_is_recognised(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "test").write_bytes(b"pickled")
    with pytest.raises(UserError, match=r"holds the Python version of cifar100.*\(cifar-100-binary\)"):
        load("cifar100", path=tmp_path)


def test_no_folder_at_all(monkeypatch):
    monkeypatch.delenv("DECOUPLED_DATA", raising=False)
    with pytest.raises(UserError, match="cifar10 has no folder to be read from; give the option path"):
        load("cifar10")
