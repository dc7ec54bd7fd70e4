"""What a structured dataset is made of: sequences, binary trees and graphs, each with what is to be predicted.

::

    Sequence   tokens 7 1 2       -> label
    Tree       ((2 3) 4) -> label           nodes in post-order, the root is the last one
    Graph      kinds 1 0 0, edges 0 -k-> 1  -> target

No two instances need have the same shape, so no tensor holds a split: an instance is plain numbers, and a model makes
tensors of it as it walks along.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from decoupled.errors import UserError


@dataclass(frozen=True, slots=True)
class Sequence:
    """Token numbers in order, and the class of the whole."""

    tokens: tuple[int, ...]
    label: int


@dataclass(frozen=True, slots=True)
class Tree:
    """A binary tree in post-order: children stand before their parent, so one pass from left to right evaluates it.

    Attributes:
        words: token number of every leaf; -1 at inner nodes.
        children: numbers of the left and right child of every inner node; (-1, -1) at leaves.
        labels: class of every node; -1 where there is none.
    """

    words: tuple[int, ...]
    children: tuple[tuple[int, int], ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.words)

    def parents(self) -> list[tuple[int, int]]:
        """Return for every node its parent and its side there (0 left, 1 right); (-1, 0) for the root."""
        above = [(-1, 0)] * len(self)
        for node, pair in enumerate(self.children):
            for side, child in enumerate(pair):
                if child >= 0:
                    above[child] = (node, side)
        return above

    def heights(self) -> list[int]:
        """Return the height of every node above its deepest leaf: leaves are 0, a parent one more than its children."""
        above: list[int] = []
        for left, right in self.children:
            above.append(0 if left < 0 else 1 + max(above[left], above[right]))
        return above


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph whose nodes and directed edges have kinds.

    Attributes:
        kinds: kind of every node.
        edges: (source, kind of edge, target) of every edge.
        target: number of the node that answers the question, or a value to be predicted.
    """

    kinds: tuple[int, ...]
    edges: tuple[tuple[int, int, int], ...]
    target: int | float

    def __len__(self) -> int:
        return len(self.kinds)


T = TypeVar("T", Sequence, Tree, Graph)


@dataclass(frozen=True, eq=False)
class Structured(Generic[T]):
    """A dataset of structured instances in three splits.

    Attributes:
        name: the name `load` knows it by.
        train, validation, test: the instances; validation and test are held out.
        classes: number of classes; 0 where the target is a value or a node of the instance.
        tokens: what the token numbers (of a sequence, or of the leaves of a tree) or the kinds of nodes stand for.
        relations: what the kinds of edges stand for.
        unit: what one unit of a target value is, as (number, name): a standard deviation in the unit of the source.
        source: where the instances come from.

    Raises:
        UserError: a split has no instances.
    """

    name: str
    train: list[T]
    validation: list[T]
    test: list[T]
    classes: int
    tokens: tuple[str, ...]
    relations: tuple[str, ...] = ()
    unit: tuple[float, str] | None = None
    source: str = ""
    _digest: list[str] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        for part, instances in self.parts():
            if not instances:
                raise UserError(f"dataset {self.name!r}: the {part} split has no instances; make it at least one large")

    def parts(self) -> Iterator[tuple[str, list[T]]]:
        """Yield the name and the instances of every split."""
        yield from (("train", self.train), ("validation", self.validation), ("test", self.test))

    @property
    def digest(self) -> str:
        """SHA-256 of all instances in order; computed once."""
        if not self._digest:
            whole = hashlib.sha256()
            for _, instances in self.parts():
                whole.update("".join(map(repr, instances)).encode())
            self._digest.append(whole.hexdigest())
        return self._digest[0]

    @property
    def description(self) -> str:
        """Source, sizes and hash in one line."""
        sizes = ", ".join(f"{part} {len(instances)}" for part, instances in self.parts())
        return f"{self.source}; {sizes}; sha256 {self.digest}"


def in_order(parts: Mapping[str, list[T]]) -> tuple[list[T], list[T], list[T]]:
    """Return train, validation and test of `parts`."""
    return parts["train"], parts["validation"], parts["test"]


def divide(distinct: Iterable[T], **sizes: int) -> dict[str, list[T]]:
    """Take `sizes` instances after each other from `distinct`, by part name.

    Raises:
        UserError: there are not enough of them.
    """
    source = iter(distinct)
    parts = {part: [instance for _, instance in zip(range(size), source, strict=False)] for part, size in sizes.items()}
    if any(len(parts[part]) < size for part, size in sizes.items()):
        raise UserError(
            f"there are only {sum(map(len, parts.values()))} instances, but {sum(sizes.values())} are asked for; "
            "make the splits smaller"
        )
    return parts
