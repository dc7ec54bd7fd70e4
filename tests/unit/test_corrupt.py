"""Images turned once, and wrong labels: how many, which, always the same, and the held-out data as they were."""

import gzip
import struct

import numpy as np
import pytest

from decoupled.data import fashion_mnist
from decoupled.data.corrupt import relabel, rotate
from decoupled.errors import UserError


def test_a_share_of_the_labels_becomes_another_class():
    labels = np.tile(np.arange(10, dtype=np.uint8), 1000)
    noisy = relabel(labels, 0.2, 10, 0)
    wrong = noisy != labels
    assert wrong.sum() == 2000
    assert set(np.unique(noisy)) == set(range(10))
    moved = np.bincount((noisy[wrong].astype(int) - labels[wrong]) % 10, minlength=10)
    assert moved[0] == 0
    assert moved[1:].min() > 150
    assert np.array_equal(noisy, relabel(labels, 0.2, 10, 0))
    assert not np.array_equal(noisy, relabel(labels, 0.2, 10, 1))
    assert np.array_equal(relabel(labels, 0.0, 10, 0), labels)


def test_every_image_is_turned_by_its_own_angle():
    bar = np.zeros((50, 1, 9, 9), np.uint8)
    bar[:, :, 4, :] = 200
    turned = rotate(bar, 90, 0)
    assert turned.shape == bar.shape
    assert turned.dtype == bar.dtype
    assert (turned[:, 0, 4, 4] > 150).all()  # the centre stays
    assert len({image.tobytes() for image in turned}) > 45
    assert np.array_equal(turned, rotate(bar, 90, 0))
    assert rotate(bar, 0, 0) is bar


def test_values_that_cannot_be_are_refused():
    with pytest.raises(UserError, match=r"share from 0 to 1, got 1\.5"):
        relabel(np.zeros(3, int), 1.5, 10, 0)
    with pytest.raises(UserError, match="at least 0 degrees"):
        rotate(np.zeros((1, 1, 2, 2)), -1, 0)


def test_only_the_training_part_of_a_data_set_changes(tmp_path):
    draw = np.random.default_rng(0)
    for prefix, count in (("train", 60), ("t10k", 20)):
        images, labels = draw.integers(0, 255, (count, 28, 28), np.uint8), draw.integers(0, 10, count, np.uint8)
        for what, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (tmp_path / f"{prefix}-{what}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    plain = fashion_mnist(path=tmp_path, validation=10)
    changed = fashion_mnist(path=tmp_path, validation=10, rotate=45.0, label_noise=0.2)
    assert int((plain.train.targets != changed.train.targets).sum()) == 10
    assert not plain.train.inputs.equal(changed.train.inputs)
    assert plain.test.targets.equal(changed.test.targets)
    assert plain.validation.targets.equal(changed.validation.targets)
    assert plain.description != changed.description
