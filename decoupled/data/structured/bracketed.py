"""Stanford Sentiment Treebank (Socher et al. 2013) from its files in Penn Treebank style; nothing is downloaded.

::

    train.txt, dev.txt, test.txt, one tree per line:    (3 (2 It) (4 (2 's) (4 good)))

Every node has a class from 0 (very negative) to 4 (very positive). Token 0 stands for all words of the held-out splits
that the training split does not have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from decoupled.data.structured.instances import Structured, Tree, in_order
from decoupled.errors import UserError
from decoupled.specs import positive

_CLASSES = 5
_FILES = {"train": "train.txt", "validation": "dev.txt", "test": "test.txt"}
_LEAF = re.compile(r"[()]|[^\s()]+")

Words = list[str]


def treebank(*, path: str | Path | None = None, limit: int | None = None) -> Structured[Tree]:
    """Load the Stanford Sentiment Treebank.

    Args:
        path: the folder with train.txt, dev.txt and test.txt (``trees`` of the published archive).
        limit: train on at most so many of the first trees.

    Returns:
        Binary trees with a class (0 ... 4) at every node; leaves are words, token 0 the unknown one.

    Raises:
        UserError: no path, a missing file, or a line that is no binary tree of classes 0 to 4.
    """
    if path is None:
        raise UserError("dataset 'treebank' needs its folder; write {name: treebank, path: DIR} with train.txt in DIR")
    if limit is not None:
        positive("dataset 'treebank'", limit=limit)
    numbers: dict[str, int] = {"": 0}
    parts = {}
    for part, name in _FILES.items():
        read = list(_read(Path(path) / name))
        if part == "train":
            read = read[:limit]
            for words, _ in read:
                for word in words:
                    numbers.setdefault(word, len(numbers))
        parts[part] = [
            Tree(tuple(-1 if not word else numbers.get(word, 0) for word in words), shape.children, shape.labels)
            for words, shape in read
        ]
    source = f"Stanford Sentiment Treebank, {Path(path).name}"
    return Structured("treebank", *in_order(parts), classes=_CLASSES, tokens=tuple(numbers), source=source)


def _read(path: Path) -> Iterator[tuple[Words, Tree]]:
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"treebank file {path} does not exist; give the folder with {', '.join(_FILES.values())}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"treebank file {path} cannot be read ({error}); replace it by a fresh copy") from error
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                yield _tree(line)
            except ValueError as error:
                raise UserError(
                    f"{path.name}, line {number}: {error}; write one binary tree of (class word) or (class left right) "
                    "per line"
                ) from None


def _tree(line: str) -> tuple[Words, Tree]:
    """Words by node ("" at inner nodes) and the tree with word numbers still missing."""
    words: Words = []
    children: list[tuple[int, int]] = []
    labels: list[int] = []
    open_: list[list[str | int]] = []  # of every open bracket: its class, then a word or numbers of nodes
    root = False
    for token in _LEAF.findall(line):
        if root:
            raise ValueError(f"{token!r} after the end of the tree")
        if token == "(":
            open_.append([])
        elif not open_:
            raise ValueError(f"{token!r} outside brackets")
        elif token != ")":
            open_[-1].append(token)
        else:
            label, pair, word = _node(open_.pop())
            words.append(word)
            children.append(pair)
            labels.append(label)
            if open_:
                open_[-1].append(len(words) - 1)
            root = not open_
    if not root:
        raise ValueError(f"{len(open_)} brackets are not closed" if open_ else "there is no tree")
    return words, Tree((-1,) * len(words), tuple(children), tuple(labels))


def _node(content: list[str | int]) -> tuple[int, tuple[int, int], str]:
    """Class, children and word of one node."""
    match content:
        case [str(label), str(word)] if word:
            pair = (-1, -1)
        case [str(label), int(left), int(right)]:
            pair, word = (left, right), ""
        case _:
            raise ValueError(f"a node has {len(content)} parts, not a class and a word or two nodes")
    if label not in map(str, range(_CLASSES)):
        raise ValueError(f"{label!r} is no class of 0 ... {_CLASSES - 1}")
    return int(label), pair, word
