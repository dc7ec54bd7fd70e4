"""Datasets and loaders: standardised disjoint splits, batches as a function of the seed, errors that name the file."""

import gzip
import itertools
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoupled import data
from decoupled.data import Augment, Batch, Dataset, Loader, Split, load, read_idx
from decoupled.data import sources as sources_module
from decoupled.errors import UserError


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """Write a small Fashion-MNIST: 40 training and 10 test images, half of the files compressed."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 40), ("t10k", 10)):
        images = rng.integers(0, 256, (count, 28, 28))
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(count) % 10))
    return tmp_path


@pytest.fixture
def numbered() -> Split:
    """Give 23 samples whose value is their position."""
    return Split(torch.arange(23.0).reshape(23, 1, 1, 1).expand(23, 1, 4, 4).contiguous(), torch.arange(23) % 3)


# --- splits -------------------------------------------------------------------------------------------------------


def test_digits_are_divided_without_overlap():
    dataset = load()
    parts = [dataset.train, dataset.validation, dataset.test]
    assert [len(p) for p in parts] == [1257, 180, 360]
    assert (dataset.name, dataset.inputs, dataset.classes) == ("digits", (1, 8, 8), 10)
    # The embedded digits hold no two equal images, so equal rows would be a sample in two splits.
    rows = torch.cat([p.inputs for p in parts]).flatten(1)
    assert len(torch.unique(rows, dim=0)) == 1797


def test_statistics_come_from_the_training_split():
    dataset = load("digits")
    train = dataset.train.inputs.double()
    assert train.mean().item() == pytest.approx(0, abs=1e-5)
    assert train.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert abs(dataset.test.inputs.double().mean().item()) > 1e-5
    assert dataset.train.inputs.dtype == torch.float32


def test_split_seed_decides_the_splits():
    one, same, other = load("digits"), load("digits", split_seed=0), load("digits", split_seed=1)
    assert torch.equal(one.test.inputs, same.test.inputs)
    assert not torch.equal(one.test.targets, other.test.targets)


def test_limit_shortens_training_only():
    full, short = load("digits"), load({"name": "digits", "limit": 100})
    assert len(short.train) == 100
    assert torch.equal(full.test.targets, short.test.targets)
    assert torch.equal(full.train.targets[:100], short.train.targets)


def test_every_split_of_digits_can_be_learned_from_the_training_split():
    """Labels must stay with their images through permutation and standardisation: nearest class mean beats 80 %."""
    dataset = load("digits")
    x, y = dataset.train.inputs.flatten(1), dataset.train.targets
    means = torch.stack([x[y == c].mean(0) for c in range(10)])
    for part in (dataset.validation, dataset.test):
        guess = torch.cdist(part.inputs.flatten(1), means).argmin(1)
        assert (guess == part.targets).float().mean() > 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spec": "digit"}, r"unknown dataset 'digit'. Did you mean 'digits'\?"),
        ({"spec": "fashion-mnist"}, r"Did you mean 'fashion_mnist'\?"),
        ({"spec": "digits", "split_sed": 1}, r"Did you mean 'split_seed'\?"),
        ({"spec": {"name": "digits", "lmit": 1}}, r"Did you mean 'limit'\?"),
        ({"spec": "digits", "test": 1700}, r"test 1700 \+ validation 180 leave nothing of 1797"),
        ({"spec": "digits", "limit": 0}, "limit must be at least 1"),
        ({"spec": "digits", "split_seed": -1}, "must not be negative, got -1"),
    ],
)
def test_wrong_names_and_sizes_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        load(**arguments)


def test_missing_scikit_learn_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"pip install 'decoupled-training\[bench\]'"):
        load("digits")


def test_split_refuses_what_it_cannot_hold():
    with pytest.raises(UserError, match="no samples"):
        Split(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(UserError, match="3 inputs but 2 targets"):
        Split(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UserError, match="int64 labels"):
        Split(torch.zeros(3, 2), torch.zeros(3))


def test_dataset_refuses_labels_outside_the_classes_and_other_shapes():
    good = Split(torch.zeros(3, 2), torch.tensor([0, 1, 2]))
    for labels in ([0, 1, 3], [-1, 1, 2]):
        bad = Split(torch.zeros(3, 2), torch.tensor(labels))
        with pytest.raises(UserError, match=r"validation: labels run from -?\d to \d, outside 0 ... 2"):
            Dataset("toy", (2,), 3, good, bad, good)
    with pytest.raises(UserError, match=r"train: samples have shape \(2,\), expected \(4,\)"):
        Dataset("toy", (4,), 3, good, good, good)


# --- Fashion-MNIST and IDX ----------------------------------------------------------------------------------------


def test_fashion_mnist_from_an_explicit_path(fashion):
    dataset = load("fashion_mnist", path=fashion, validation=8)
    assert [len(p) for p in (dataset.train, dataset.validation, dataset.test)] == [32, 8, 10]
    assert dataset.inputs == (1, 28, 28)
    assert dataset.test.targets.tolist() == list(range(10))
    assert dataset.augment == Augment(padding=2, flip=True, fill=float(dataset.train.inputs.min()))


@pytest.mark.parametrize("below", ["", "fashion_mnist"])
def test_fashion_mnist_from_the_data_variable(fashion, below, tmp_path_factory, monkeypatch):
    root = tmp_path_factory.mktemp("root")
    if below:
        (root / below).symlink_to(fashion)
    monkeypatch.setenv("DECOUPLED_DATA", str(root if below else fashion))
    monkeypatch.setattr(sources_module, "_DEBIAN", root / "nowhere")
    assert len(load("fashion_mnist", validation=8).train) == 32


def test_data_variable_without_the_files_falls_back_to_the_package(fashion, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DECOUPLED_DATA", str(tmp_path_factory.mktemp("other")))
    monkeypatch.setattr(sources_module, "_DEBIAN", fashion)
    assert len(load("fashion_mnist", validation=8).train) == 32


def test_explicit_path_is_never_replaced(fashion, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DECOUPLED_DATA", str(fashion))
    with pytest.raises(
        UserError, match=r"not found in .*; apt-get install dataset-fashion-mnist, or set DECOUPLED_DATA"
    ):
        load("fashion_mnist", path=tmp_path_factory.mktemp("empty"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("t10k-labels-idx1-ubyte", None, "t10k-labels-idx1-ubyte.* is missing"),
        ("t10k-labels-idx1-ubyte", idx_bytes(np.zeros(9)), "10 images but .*t10k-labels-idx1-ubyte 9 labels"),
        ("t10k-labels-idx1-ubyte", idx_bytes(np.full(10, 10)), "labels run from 10 to 10"),
        ("train-labels-idx1-ubyte", idx_bytes(np.zeros((4, 2))), "has 2 dimensions, expected 1"),
        ("t10k-images-idx3-ubyte", idx_bytes(np.zeros((10, 27, 28))), r"images of \(27, 28\), expected \(28, 28\)"),
    ],
)
def test_fashion_mnist_files_that_do_not_fit(fashion, file, content, message):
    (fashion / file).unlink(missing_ok=True)
    if content is not None:
        (fashion / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load("fashion_mnist", path=fashion, validation=8)


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(0, 4), max_size=4), packed=st.booleans(), seed=st.integers(0, 99))
def test_idx_reads_back_what_was_written(tmp_path_factory, shape, packed, seed):
    array = np.random.default_rng(seed).integers(0, 256, tuple(shape)).astype(np.uint8)
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(gzip.compress(idx_bytes(array)) if packed else idx_bytes(array))
    result = read_idx(path, dimensions=len(shape))
    assert result.dtype == np.uint8
    assert np.array_equal(result, array)


GOOD = idx_bytes(np.arange(6).reshape(2, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: 0 bytes"),
        (GOOD[:3], "truncated: 3 bytes"),
        (GOOD[:9], "truncated inside its header of 12 bytes"),
        (GOOD[:-1], "truncated: 5 entries, its header says 2 x 3 = 6"),
        (GOOD + b"x", "too long: 7 entries"),
        (b"\x89PNG" + GOOD, "not an IDX file of unsigned bytes: it begins with 0x89504e47"),
        (b"\0\0\x0d\x02" + GOOD[4:], "not an IDX file of unsigned bytes"),
        (gzip.compress(GOOD, mtime=0)[:-6], "truncated or damaged"),
        (gzip.compress(GOOD, mtime=0)[:10] + b"\xff" * 20, "truncated or damaged"),
    ],
)
def test_idx_errors_name_the_file(tmp_path, content, message):
    path = tmp_path / "broken-file"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_idx_missing_or_a_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        read_idx(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot be read"):
        read_idx(tmp_path)


# --- loader -------------------------------------------------------------------------------------------------------


def as_lists(batches):
    return [b.indices.tolist() for b in batches]


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [5, 5, 5, 5, 3]), (True, [5, 5, 5, 5])])
def test_an_epoch_visits_every_sample_once(numbered, drop_last, sizes):
    loader = Loader(numbered, 5, shuffle=True, drop_last=drop_last)
    batches = list(loader)
    assert [len(b.targets) for b in batches] == sizes
    assert len(loader) == len(sizes)
    seen = torch.cat([b.indices for b in batches]).tolist()
    assert len(set(seen)) == sum(sizes)
    for batch in batches:
        assert isinstance(batch, Batch)
        assert torch.equal(batch.inputs[:, 0, 0, 0].long(), batch.indices)
        assert torch.equal(batch.targets, numbered.targets[batch.indices])


def test_without_shuffle_the_order_is_that_of_the_split(numbered):
    assert torch.cat([b.indices for b in Loader(numbered, 10)]).tolist() == list(range(23))


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_order_is_a_function_of_seed_and_epoch(seed, epoch):
    split = Split(torch.zeros(50, 1), torch.zeros(50, dtype=torch.int64))
    fresh, used = (Loader(split, 8, shuffle=True, seed=seed) for _ in range(2))
    list(used)
    for loader in (fresh, used):
        loader.set_epoch(epoch)
    one, same, following = as_lists(fresh), as_lists(used), as_lists(used)
    assert one == same
    assert following != one
    assert as_lists(Loader(split, 8, shuffle=True, seed=seed + 1)) != as_lists(
        Loader(split, 8, shuffle=True, seed=seed)
    )


def test_epochs_advance_even_when_broken_off(numbered):
    loader = Loader(numbered, 5, shuffle=True, seed=1)
    epochs = [as_lists([next(iter(loader))]) for _ in range(3)]
    for number, epoch in enumerate(epochs):
        loader.set_epoch(number)
        assert as_lists(loader)[:1] == epoch
    assert epochs[0] != epochs[1] != epochs[2]


def test_state_dict_goes_on_where_it_was(numbered):
    loader = Loader(numbered, 5, shuffle=True, seed=1)
    list(loader)
    other = Loader(numbered, 5, shuffle=True, seed=1)
    other.load_state_dict(loader.state_dict())
    assert as_lists(other) == as_lists(loader)


def test_augmentation_is_a_function_of_seed_and_epoch(numbered):
    augment = Augment(padding=1, flip=True)
    split = Split(torch.randn(23, 2, 5, 5, generator=torch.Generator().manual_seed(0)), numbered.targets)

    def inputs(epoch, seed=0):
        loader = Loader(split, 5, seed=seed, augment=augment)
        loader.set_epoch(epoch)
        return [b.inputs for b in loader]

    state = torch.get_rng_state()
    for one, same, next_epoch, other_seed in zip(inputs(2), inputs(2), inputs(3), inputs(2, seed=1), strict=True):
        assert torch.equal(one, same)
        assert not torch.equal(one, next_epoch)
        assert not torch.equal(one, other_seed)
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_of_an_epoch_draw_different_shifts():
    """Twelve equal images in batches of six: equal draws per batch would give two equal batches."""
    image = torch.arange(49.0).reshape(1, 1, 7, 7).expand(12, 1, 7, 7)
    split = Split(image, torch.zeros(12, dtype=torch.int64))
    first, second = Loader(split, 6, augment=Augment(padding=3))
    assert not torch.equal(first.inputs, second.inputs)


def test_a_sample_is_changed_alike_in_any_order_and_batch_and_again_if_an_epoch_repeats_a_draw(numbered):
    split = Split(torch.randn(23, 2, 5, 5, generator=torch.Generator().manual_seed(0)), numbered.targets)

    def images(epoch, batch_size=5, shuffle=True, draw=None):
        loader = Loader(split, batch_size, shuffle=shuffle, augment=Augment(padding=2, flip=True))
        loader.set_epoch(epoch)
        if draw is not None:
            loader.set_draw(draw)
        batches = list(loader)
        indices, inputs = (torch.cat([getattr(b, name) for b in batches]) for name in ("indices", "inputs"))
        return indices, inputs[indices.argsort()]

    (order, first), (again, repeated) = images(3), images(4, draw=3)
    assert not torch.equal(order, again)
    assert torch.equal(first, repeated)
    assert torch.equal(first, images(3, batch_size=7, shuffle=False)[1])
    assert not torch.equal(first, images(4)[1])
    with pytest.raises(UserError, match="epoch must not be negative"):
        Loader(split, 5).set_draw(-1)


def test_a_repeated_draw_holds_for_one_epoch(numbered):
    split = Split(torch.randn(23, 2, 5, 5), numbered.targets)
    loader, other = (Loader(split, 5, augment=Augment(padding=2)) for _ in range(2))
    loader.set_draw(7)
    list(loader)
    other.set_epoch(1)
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(loader, other, strict=True))


def test_augment_crops_and_mirrors_each_image():
    """Every result is one of the 2 x 25 possible crops of its own image, and many of them occur."""
    images = torch.randn(200, 2, 6, 6)
    result = Augment(padding=2, flip=True, fill=-9.0)(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), value=-9.0)
    drawn = []
    for n, down, right, flip in itertools.product(range(200), range(5), range(5), (False, True)):
        crop = padded[n, :, down : down + 6, right : right + 6]
        if torch.equal(result[n], crop.flip(2) if flip else crop):
            drawn.append((n, (down, right, flip)))
    assert [n for n, _ in drawn] == list(range(200))
    assert len({draw for _, draw in drawn}) > 40


def test_digits_are_never_mirrored():
    augment = load("digits").augment
    assert augment is not None
    assert not augment.flip


def test_no_augmentation_leaves_pixels_alone():
    images = torch.randn(3, 1, 4, 4)
    assert torch.equal(Augment()(images, torch.Generator()), images)


def test_loader_refuses_what_would_yield_nothing(numbered):
    with pytest.raises(UserError, match="batch_size must be an integer of at least 1, got 0"):
        Loader(numbered, 0)
    with pytest.raises(UserError, match="drop_last leaves no batch: 23 samples in batches of 24"):
        Loader(numbered, 24, drop_last=True)
    with pytest.raises(UserError, match="seed must not be negative"):
        Loader(numbered, 4, seed=-1)
    with pytest.raises(UserError, match="epoch must not be negative"):
        Loader(numbered, 4).set_epoch(-1)
    with pytest.raises(UserError, match="padding must not be negative"):
        Augment(padding=-1)
    with pytest.raises(UserError, match=r"takes images \(N, C, H, W\)"):
        Augment()(torch.zeros(3, 4), torch.Generator())


def test_names_are_loadable():
    assert data.names() == ["digits", "fashion_mnist", "cifar10", "cifar100", "python_source", "text"]


@pytest.mark.slow
def test_published_fashion_mnist():
    """The real files, where they are installed: counts, balance of the classes and the published pixel statistics."""
    try:
        dataset = load("fashion_mnist")
    except UserError as error:
        pytest.skip(str(error))
    assert [len(p) for p in (dataset.train, dataset.validation, dataset.test)] == [55000, 5000, 10000]
    assert torch.bincount(dataset.test.targets).tolist() == [1000] * 10
    # Black is 0, so the background is -mean / std = -0.2860 / 0.3530 of the whole training set, nearly that of a part.
    assert dataset.train.inputs.min().item() == pytest.approx(-0.2860 / 0.3530, abs=0.01)


def test_numbers_of_numpy_are_numbers():
    given = {"name": "digits", "limit": np.int64(100), "validation": np.int64(50)}
    assert data.load(given).summary == data.load({"name": "digits", "limit": 100, "validation": 50}).summary
