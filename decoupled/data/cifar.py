"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from the files of the *binary version*; nothing is downloaded.

::

    cifar10    data_batch_1.bin ... data_batch_5.bin, test_batch.bin    record: label, 3072 pixels
    cifar100   train.bin, test.bin                                      record: coarse label, fine label, 3072 pixels

Pixels are bytes: 1024 red, 1024 green, 1024 blue, each row by row. The Python version is a pickle, which can run code
when it is read, so it is refused.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from decoupled.data.dataset import Dataset, assemble, take_apart
from decoupled.errors import UserError

_PIXELS = 3 * 32 * 32
_FOLDERS = {
    "cifar10": ("cifar-10-batches-bin", "cifar-10-batches-py"),
    "cifar100": ("cifar-100-binary", "cifar-100-python"),
}
_CIFAR10 = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
_CIFAR100 = {"train": ("train.bin",), "test": ("test.bin",)}


def cifar10(
    *, path: str | Path | None = None, split_seed: int = 0, validation: int = 5000, limit: int | None = None
) -> Dataset:
    """Load CIFAR-10: 60000 colour images of 10 classes.

    Args:
        path: folder with the six files, or the folder that holds ``cifar-10-batches-bin``; without it
            ``$DECOUPLED_DATA`` and ``$DECOUPLED_DATA/cifar10`` are tried.
        split_seed: decides which training samples are held out for validation.
        validation: samples of the validation split, taken from the training files; the test file is the published one.
        limit: train on at most so many of the rest.

    Returns:
        Images (3, 32, 32) of 10 classes; the augmentation shifts by up to four pixels and flips.

    Raises:
        UserError: no file found, the Python version found, or a file that is damaged.
    """
    images, labels = _read(_folder("cifar10", _CIFAR10, path), _CIFAR10, (10,), 0)
    return _cifar("cifar10", 10, images, labels, split_seed, validation, limit)


def cifar100(
    *,
    path: str | Path | None = None,
    coarse: bool = False,
    split_seed: int = 0,
    validation: int = 5000,
    limit: int | None = None,
) -> Dataset:
    """Load CIFAR-100: 60000 colour images of 100 classes; with `coarse` their 20 superclasses.

    The other arguments, what is returned and what is raised are as in `cifar10`; the folder is ``cifar-100-binary``.
    """
    folder = _folder("cifar100", _CIFAR100, path)
    images, labels = _read(folder, _CIFAR100, (20, 100), 0 if coarse else 1)
    return _cifar("cifar100", 20 if coarse else 100, images, labels, split_seed, validation, limit)


def _cifar(
    name: str,
    classes: int,
    images: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    seed: int,
    validation: int,
    limit: int | None,
) -> Dataset:
    parts = take_apart(len(labels["train"]), {"validation": validation}, seed, limit)
    train_images, train_labels = images["train"], labels["train"]
    for part, samples in parts.items():
        images[part], labels[part] = train_images[samples], train_labels[samples]
    return assemble(name, classes, images, labels, padding=4, flip=True)


def _folder(name: str, files: dict[str, tuple[str, ...]], path: str | Path | None) -> Path:
    """The folder with the files; an explicit path is never replaced by another."""
    inner, pickled = _FOLDERS[name]
    root = os.environ.get("DECOUPLED_DATA")
    roots = [Path(path)] if path is not None else [Path(root), Path(root, name)] if root else []
    candidates = [folder for base in roots for folder in (base, base / inner)]
    for folder in candidates:
        if (folder / files["test"][0]).is_file():
            return folder
    for folder in [*candidates, *(base / pickled for base in roots)]:
        if (folder / files["test"][0].removesuffix(".bin")).is_file():
            raise UserError(
                f"{folder} holds the Python version of {name}, a pickle, which is not read because it can run code; "
                f"get the binary version ({inner})"
            )
    tried = f"not found in {', '.join(map(str, roots))}" if roots else "has no folder to be read from"
    raise UserError(
        f"{name} {tried}; give the option path, or set DECOUPLED_DATA, to a folder with the files of its binary "
        f"version ({', '.join(files['train'][:1] + files['test'])}, ...); nothing is downloaded"
    )


def _read(
    folder: Path, files: dict[str, tuple[str, ...]], classes: tuple[int, ...], label: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Images (N, 3, 32, 32) and labels (N,) by part; a record starts with one label below each of `classes`."""
    images, labels = {}, {}
    for part, names in files.items():
        records = np.concatenate([_records(folder / name, classes) for name in names])
        images[part] = records[:, len(classes) :].reshape(-1, 3, 32, 32)
        labels[part] = records[:, label]
    return images, labels


def _records(path: Path, classes: tuple[int, ...]) -> np.ndarray:
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except FileNotFoundError:
        raise UserError(f"CIFAR file {path} is missing while others are there; copy it to that folder") from None
    except OSError as error:
        raise UserError(f"CIFAR file {path} cannot be read ({error.strerror}); check its permissions") from error
    size = len(classes) + _PIXELS
    if not len(content) or len(content) % size:
        raise UserError(
            f"CIFAR file {path} has {len(content)} bytes, which is no number of records of {size} bytes; replace the "
            "file by a fresh copy of the binary version"
        )
    records = content.reshape(-1, size)
    for column, limit in enumerate(classes):
        if (highest := int(records[:, column].max())) >= limit:
            raise UserError(
                f"CIFAR file {path} has a label {highest}, but there are {limit} classes; replace the file by a fresh "
                f"copy, and check that it is the set with {limit} classes"
            )
    return records
