"""Text as bytes: windows that predict every byte once, splits by file, sizes and hash reported, errors in one line."""

import hashlib

import pytest
import torch

from decoupled.data import Loader, load
from decoupled.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A library of 60 files; some of them belong to tests or to installed packages."""
    root = tmp_path_factory.mktemp("library")
    for i in range(60):
        (root / f"module{i}.py").write_bytes(f"x{i} = {i}\n".encode() * 20)
    (root / "bytes.py").write_bytes(b"\xff\x00" * 50)
    for inner in ("site-packages", "test", "package/tests"):
        (root / inner).mkdir(parents=True)
        (root / inner / "other.py").write_text("left_out = True\n")
    return root


def corpus(folder, **options):
    return load({"name": "python_source", "path": str(folder), "length": 8, **options})


def as_bytes(row):
    return bytes(row.tolist())


def test_every_byte_but_the_first_is_predicted_once(tmp_path):
    content = bytes(range(256)) * 4
    (tmp_path / "file").write_bytes(content)
    dataset = load({"name": "text", "path": str(tmp_path / "file"), "length": 5})
    train = content[: len(content) * 90 // 100]
    whole = (len(train) - 1) // 5 * 5
    assert as_bytes(dataset.train.inputs.flatten()) == train[:whole]
    assert as_bytes(dataset.train.targets.flatten()) == train[1 : whole + 1]
    assert (dataset.inputs, dataset.classes) == ((5,), 256)
    assert dataset.train.inputs.dtype == dataset.train.targets.dtype == torch.int64
    assert dataset.description.endswith(f"sha256 {hashlib.sha256(content).hexdigest()}")
    assert "1024 bytes (train 921 / validation 51 / test 52)" in dataset.description


def test_no_file_is_in_two_splits(folder):
    dataset = corpus(folder)
    found = {}
    for part in ("train", "validation", "test"):
        text = b"".join(as_bytes(row) for row in getattr(dataset, part).inputs)
        found[part] = {i for i in range(60) if f"x{i} = {i}\nx{i} = {i}\n".encode() in text}
        assert found[part]
        assert b"left_out" not in text
    assert not any(found[a] & found[b] for a, b in [("train", "validation"), ("train", "test"), ("validation", "test")])
    assert set().union(*found.values()) == set(range(60))


def test_the_description_says_size_and_hash_of_the_text(folder):
    names = sorted(path.name for path in folder.glob("*.py"))
    content = b"".join((folder / name).read_bytes() for name in names)
    description = corpus(folder).description
    assert f"61 files, {len(content)} bytes" in description
    assert hashlib.sha256(content).hexdigest() in description


def test_limit_and_held_out_sizes(folder):
    full, short = corpus(folder), corpus(folder, limit=30, validation=7, test=9)
    assert [len(short.train), len(short.validation), len(short.test)] == [30, 7, 9]
    assert len(full.train) > 30
    rows = {as_bytes(row) for row in full.train.inputs}
    assert all(as_bytes(row) in rows for row in short.train.inputs)
    assert torch.equal(short.train.inputs[:, 1:], short.train.targets[:, :-1])
    again, other = corpus(folder, limit=30), corpus(folder, limit=30, split_seed=1)
    assert torch.equal(short.train.inputs, again.train.inputs)
    assert not torch.equal(short.train.inputs, other.train.inputs)


def test_a_loader_yields_a_target_for_every_position(folder):
    batch = next(iter(Loader(corpus(folder).train, 4, shuffle=True)))
    assert batch.inputs.shape == batch.targets.shape == (4, 8)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])


def test_python_has_a_source_of_its_own():
    dataset = load({"name": "python_source", "limit": 50})
    assert len(dataset.train) == 50
    assert len(dataset.test) == 500
    assert "standard library" in dataset.description
    assert b"self" in b"".join(as_bytes(row) for row in dataset.test.inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "dataset 'python_source': length must be an integer of at least 1, got 0"),
        ({"limit": 0}, "limit must be an integer of at least 1, got 0"),
        ({"length": 100_000}, "split has .* bytes, too few for one sequence of 100000 .* or a shorter length"),
        ({"lenght": 8}, "Did you mean 'length'"),
    ],
)
def test_wrong_sizes_are_refused(folder, options, message):
    with pytest.raises(UserError, match=message) as error:
        corpus(folder, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: {"name": "text"}, r"needs a file; write \{name: text, path: FILE\}"),
        (lambda root: {"name": "text", "path": str(root / "none")}, "none does not exist; check the path"),
        (lambda root: {"name": "text", "path": str(root)}, "cannot be read .* check what it is"),
        (lambda root: {"name": "python_source", "path": str(root / "none")}, r"there are no \.py files in"),
    ],
)
def test_files_that_are_not_there(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        load(make(tmp_path))


def test_a_text_too_small_for_its_splits(tmp_path):
    (tmp_path / "short.txt").write_bytes(b"a" * 100)
    with pytest.raises(UserError, match="the validation split has 5 bytes, too few for one sequence of 8"):
        load({"name": "text", "path": str(tmp_path / "short.txt"), "length": 8})
