"""bAbI task 15, basic deduction (Weston et al. 2015), as graphs (Li et al. 2016): who is afraid of what?

::

    Gertrude is a mouse. Mice are afraid of wolves. ...   What is Gertrude afraid of?   wolf

    [Gertrude] --is--> (mouse) --has_fear--> (wolf)      kinds: asked 1, all others 0; every edge has its reverse
     asked                                   answer      the target is the number of the answer's node

A story has as many people as animals. By the rules of the published generator every person is another animal, and every
animal fears one of the others, drawn independently. The nodes are in random order and have no name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from decoupled.data.structured.draw import Draw
from decoupled.data.structured.instances import Graph, Structured, divide, in_order
from decoupled.errors import UserError
from decoupled.specs import positive

KINDS = ("other", "asked")
RELATIONS = ("is", "has_fear", "is, reversed", "has_fear, reversed")


def babi15(
    *, train: int = 100, validation: int = 500, test: int = 500, seed: int = 0, people: int = 4
) -> Structured[Graph]:
    """Generate graphs of stories, each with one question.

    Args:
        train, validation, test: graphs of each split; no story is in two of them, in whatever order its nodes are.
        seed: the graphs depend on it and on `people` only; the splits follow each other in the stream.
        people: and as many animals; 4 is the published number, more make larger graphs (two nodes per person).

    Returns:
        Graphs of 2 * `people` nodes of 2 kinds and 4 * `people` edges of 4 kinds.

    Raises:
        UserError: a size below 1, fewer than 2 people, or more stories asked for than there are.
    """
    sizes = {"train": train, "validation": validation, "test": test}
    positive("dataset 'babi15'", **sizes)
    if people < 2:
        raise UserError(f"dataset 'babi15': people must be at least 2, got {people}; the published number is 4")
    parts = divide(_distinct(Draw(seed), people), **sizes)
    source = f"task 15 with {people} people and animals, generated, seed {seed}"
    return Structured("babi15", *in_order(parts), classes=0, tokens=KINDS, relations=RELATIONS, source=source)


def _distinct(draw: Draw, people: int) -> Iterator[Graph]:
    seen: set[tuple[int, ...]] = set()
    while len(seen) < math.factorial(people) * (people - 1) ** people * people:
        is_a = draw.shuffled(range(people))  # person -> animal
        fears = [(animal + 1 + draw.below(people - 1)) % people for animal in range(people)]
        for asked in draw.shuffled(range(people)):
            story = (*is_a, *fears, asked)
            if story not in seen:
                seen.add(story)
                yield _graph(is_a, fears, asked, draw.shuffled(range(2 * people)))


def _graph(is_a: list[int], fears: list[int], asked: int, place: list[int]) -> Graph:
    """Build the graph; person p is node place[p], animal a is node place[people + a]."""
    people = len(is_a)
    animals = place[people:]
    facts = [(place[person], 0, animals[animal]) for person, animal in enumerate(is_a)]
    facts += [(animals[animal], 1, animals[feared]) for animal, feared in enumerate(fears)]
    edges = [edge for u, kind, v in facts for edge in ((u, kind, v), (v, kind + 2, u))]
    kinds = tuple(int(node == place[asked]) for node in range(2 * people))
    return Graph(kinds, tuple(edges), animals[fears[is_a[asked]]])
