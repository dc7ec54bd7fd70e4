"""Where the samples come from: scikit-learn's embedded digits, and Fashion-MNIST from files.

Nothing is ever downloaded. To add a dataset: write a function with keyword-only options that returns a `Dataset`, and
name it in `decoupled/data/__init__.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from decoupled.data.corrupt import relabel
from decoupled.data.corrupt import rotate as turn
from decoupled.data.dataset import Dataset, assemble, take_apart
from decoupled.data.idx import read_idx
from decoupled.errors import UserError

# The folder of Debian's package dataset-fashion-mnist.
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_PARTS = {"train": "train", "test": "t10k"}


def digits(*, split_seed: int = 0, validation: int = 180, test: int = 360, limit: int | None = None) -> Dataset:
    """Load the 1797 handwritten digits of 8x8 pixels that scikit-learn carries.

    Args:
        split_seed: decides which samples are held out.
        validation: samples of the validation split.
        test: samples of the test split; the remaining 1257 train.
        limit: train on at most so many of them.

    Returns:
        Images (1, 8, 8) of 10 classes; the augmentation shifts by one pixel and does not flip.

    Raises:
        UserError: scikit-learn is missing, or the splits do not fit.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            f"dataset 'digits' comes with scikit-learn, which cannot be imported ({error}); "
            f"pip install 'decoupled-training[bench]'"
        ) from error
    # pyright sees the tuple that return_X_y=True would give.
    images, labels = load_digits(return_X_y=True)
    images, labels = np.asarray(images).reshape(-1, 1, 8, 8), np.asarray(labels)
    parts = take_apart(len(labels), {"test": test, "validation": validation}, split_seed, limit)
    return assemble("digits", 10, {p: images[i] for p, i in parts.items()}, {p: labels[i] for p, i in parts.items()})


def fashion_mnist(
    *,
    path: str | Path | None = None,
    split_seed: int = 0,
    validation: int = 5000,
    limit: int | None = None,
    rotate: float = 0.0,
    label_noise: float = 0.0,
) -> Dataset:
    """Load Fashion-MNIST (Xiao, Rasul and Vollgraf 2017): 70000 grey images of clothes from four IDX files.

    Args:
        path: folder of the files, plain or ``.gz``; without it the first of ``$DECOUPLED_DATA``,
            ``$DECOUPLED_DATA/fashion_mnist`` and the folder of Debian's package that holds one of them.
        split_seed: decides which training samples are held out for validation.
        validation: samples of the validation split, taken from the 60000; the 10000 test images are the published ones.
        limit: train on at most so many of the rest.
        rotate: turn every training image once, by up to so many degrees each way.
        label_noise: share of the training labels that are wrong.

    Returns:
        Images (1, 28, 28) of 10 classes; the augmentation shifts by up to two pixels and flips.

    Raises:
        UserError: no file found, or one that is damaged or does not fit the others.
    """
    folder = _folder(path)
    images, labels = {}, {}
    for part, prefix in _PARTS.items():
        image_file, label_file = (
            _file(folder, f"{prefix}-images-idx3-ubyte"),
            _file(folder, f"{prefix}-labels-idx1-ubyte"),
        )
        images[part], labels[part] = read_idx(image_file, dimensions=3), read_idx(label_file, dimensions=1)
        if images[part].shape[1:] != (28, 28):
            raise UserError(f"{image_file} holds images of {images[part].shape[1:]}, expected (28, 28); check the file")
        if len(images[part]) != len(labels[part]):
            raise UserError(
                f"{image_file} holds {len(images[part])} images but {label_file} {len(labels[part])} labels; "
                f"take both files from the same source"
            )
        images[part] = images[part][:, None]
    parts = take_apart(len(labels["train"]), {"validation": validation}, split_seed, limit)
    train_images, train_labels = images["train"], labels["train"]
    for part, samples in parts.items():
        images[part], labels[part] = train_images[samples], train_labels[samples]
    images["train"] = turn(images["train"], rotate, split_seed)
    labels["train"] = relabel(labels["train"], label_noise, 10, split_seed)
    return assemble("fashion_mnist", 10, images, labels, padding=2, flip=True)


def _folder(path: str | Path | None) -> Path:
    """Return the folder to read Fashion-MNIST from; an explicit path is never replaced by another."""
    root = os.environ.get("DECOUPLED_DATA")
    if path is not None:
        candidates = [Path(path)]
    else:
        candidates = [Path(root), Path(root, "fashion_mnist")] if root else []
        candidates.append(_DEBIAN)
    for folder in candidates:
        if any(folder.glob("t*-idx?-ubyte*")):
            return folder
    raise UserError(
        f"Fashion-MNIST not found in {', '.join(map(str, candidates))}; apt-get install dataset-fashion-mnist, or set "
        f"DECOUPLED_DATA (or the option path) to a folder with train-images-idx3-ubyte.gz and the other three files"
    )


def _file(folder: Path, name: str) -> Path:
    """Return the plain file of that name or its ``.gz``."""
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.exists():
            return candidate
    raise UserError(
        f"Fashion-MNIST file {folder / name}[.gz] is missing while others are there; copy it to that folder"
    )
