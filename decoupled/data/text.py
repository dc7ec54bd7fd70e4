"""Text as bytes, for language models: the source of Python's standard library, which every machine has, or any file.

Nothing is decoded and nothing is downloaded: a token is one byte, and there are 256. A text is cut into windows that
share one byte, so that every byte but the first is predicted once::

    text      d e f   f ( x ) : ...          window of length 4
    inputs    d e f _                        targets   e f _ f
            inputs  f ( x )                  targets   ( x ) :
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from decoupled.data.dataset import Dataset, Split, permutation
from decoupled.errors import UserError
from decoupled.specs import positive

_BYTES = 256
# Not part of every installation, or not part of the standard library.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3"}


def python_source(
    *,
    path: str | Path | None = None,
    length: int = 128,
    validation: int = 500,
    test: int = 500,
    split_seed: int = 0,
    limit: int | None = None,
) -> Dataset:
    """Load the source text of the running Python's standard library, as bytes.

    Files are divided by the hash of their name: of 20, one is for validation and one for testing. So no file is in two
    splits, and a file stays where it is in other versions of Python. The text differs between versions: `description`
    says which it was, with size and SHA-256. Tests and packages that some installations lack are left out.

    Args:
        path: another folder whose ``*.py`` files are read instead.
        length: bytes in a sequence.
        validation, test: at most so many sequences in these splits.
        split_seed: decides which of them, and which training sequences `limit` keeps.
        limit: train on at most so many sequences.

    Returns:
        Sequences (length,) of 256 tokens; targets are the next byte at every position.

    Raises:
        UserError: no such folder or file, a text too small for the splits, or a size below 1.
    """
    folder = Path(path if path is not None else sysconfig.get_path("stdlib"))
    names = sorted(
        name
        for name in (file.relative_to(folder).as_posix() for file in folder.rglob("*.py"))
        if not _LEFT_OUT & set(name.split("/")[:-1])
    )
    if not names:
        raise UserError(f"there are no .py files in {folder}; give the option path a folder with Python source")
    parts: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    whole = hashlib.sha256()
    for name in names:
        content = _content(folder / name)
        whole.update(content)
        place = hashlib.sha256(name.encode()).digest()[0] % 20
        parts["test" if place == 0 else "validation" if place == 1 else "train"].append(content)
    texts = {part: b"".join(contents) for part, contents in parts.items()}
    what = f"source of Python {platform.python_version()}'s standard library" if path is None else f"source in {folder}"
    return _dataset(
        "python_source", f"{what}, {len(names)} files", texts, whole.hexdigest(),
        length, {"validation": validation, "test": test, "train": limit}, split_seed,
    )  # fmt: skip


def text(
    *,
    path: str | Path | None = None,
    length: int = 128,
    validation: int = 500,
    test: int = 500,
    split_seed: int = 0,
    limit: int | None = None,
) -> Dataset:
    """Load a file as bytes: the first 90 % are for training, then 5 % each for validation and testing.

    The arguments, what is returned and what is raised are as in `python_source`; `path` is the file and must be given.
    """
    if path is None:
        raise UserError("dataset 'text' needs a file; write {name: text, path: FILE}")
    content = _content(Path(path))
    one, two = len(content) * 90 // 100, len(content) * 95 // 100
    texts = {"train": content[:one], "validation": content[one:two], "test": content[two:]}
    return _dataset(
        "text", f"file {Path(path).name}", texts, hashlib.sha256(content).hexdigest(),
        length, {"validation": validation, "test": test, "train": limit}, split_seed,
    )  # fmt: skip


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"text file {path} does not exist; check the path") from None
    except OSError as error:
        raise UserError(f"text file {path} cannot be read ({error.strerror}); check what it is") from error


def _dataset(
    name: str,
    what: str,
    texts: Mapping[str, bytes],
    sha256: str,
    length: int,
    limits: Mapping[str, int | None],
    seed: int,
) -> Dataset:
    """Cut the texts of the splits into sequences; keep as many as `limits` allow."""
    sizes = {"limit" if part == "train" else part: size for part, size in limits.items()}
    positive(f"dataset {name!r}", length=length, **{option: size for option, size in sizes.items() if size is not None})
    made = {part: _windows(name, part, content, length, limits[part], seed) for part, content in texts.items()}
    parts = " / ".join(f"{part} {len(content)}" for part, content in texts.items())
    return Dataset(
        name=name,
        inputs=(length,),
        classes=_BYTES,
        train=made["train"],
        validation=made["validation"],
        test=made["test"],
        description=f"{what}, {sum(map(len, texts.values()))} bytes ({parts}), sha256 {sha256}",
    )


def _windows(name: str, part: str, content: bytes, length: int, limit: int | None, seed: int) -> Split:
    count = (len(content) - 1) // length
    if count < 1:
        raise UserError(
            f"dataset {name!r}: the {part} split has {len(content)} bytes, too few for one sequence of {length} and "
            "its next byte; give a longer text or a shorter length"
        )
    tokens = torch.from_numpy(np.frombuffer(content, dtype=np.uint8).astype(np.int64))
    windows = tokens.unfold(0, length + 1, length)
    if limit is not None and limit < count:
        windows = windows[torch.from_numpy(np.sort(permutation(count, seed)[:limit]))]
    return Split(windows[:, :-1], windows[:, 1:])
