"""ListOps (Nangia and Bowman 2018): nested prefix expressions over digits, as binary trees.

::

    [MAX 2 9 [MIN 4 7 ] ]    ->    ((((MAX 2) 9) (((MIN 4) 7) ])) ])    ->    9

An operation takes its arguments one at a time from the left, and the closing bracket is a leaf of its own, as in the
published generator: with probability 1/4 (and below the greatest depth) a node is an operation with 2 to 5 arguments,
otherwise a digit; the operations are MIN, MAX, MED (median, rounded down) and SM (sum modulo 10); no expression occurs
twice. Expressions of one digit are left out here: the recipe gives ten of them.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence

from decoupled.data.structured.draw import Draw
from decoupled.data.structured.instances import Structured, Tree, divide, in_order
from decoupled.errors import UserError
from decoupled.specs import positive

OPERATIONS: dict[str, Callable[[Sequence[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
TOKENS = (*map(str, range(10)), *OPERATIONS, "]")
_END = len(TOKENS) - 1

Expression = tuple[int, tuple["Expression | int", ...]]  # token number of the operation, arguments


def listops(
    *,
    train: int = 90_000,
    validation: int = 5_000,
    test: int = 5_000,
    seed: int = 0,
    operation: float = 0.25,
    arguments: int = 5,
    depth: int = 20,
    longest: int = 100,
) -> Structured[Tree]:
    """Generate distinct expressions whose class is their value.

    Args:
        train, validation, test: expressions of each split; none is in two of them.
        seed: the expressions depend on it and on the options below; the splits follow each other in the stream.
        operation: probability that a node is an operation.
        arguments: of one operation at most; at least 2.
        depth: of the nesting at most.
        longest: tokens of one expression at most, brackets included; longer ones are dropped.

    Returns:
        Binary trees whose leaves are the 15 tokens, 10 classes at the root.

    Raises:
        UserError: a number out of its range, or fewer expressions exist than are asked for.
    """
    sizes = {"train": train, "validation": validation, "test": test}
    positive("dataset 'listops'", **sizes, depth=depth)
    if not 0 < operation < 1 or arguments < 2 or longest < 4:
        raise UserError(
            f"dataset 'listops': operation must be a probability between 0 and 1, arguments at least 2 and longest at "
            f"least 4, got {operation}, {arguments} and {longest}; leave them out for the published recipe"
        )
    stream = _distinct(Draw(seed), operation, arguments, depth, longest)
    parts = divide((binary(expression) for expression in stream), **sizes)
    return Structured("listops", *in_order(parts), classes=10, tokens=TOKENS, source=f"generated, seed {seed}")


def _distinct(draw: Draw, operation: float, arguments: int, depth: int, longest: int) -> Iterator[Expression]:
    def expression(level: int) -> Expression | int:
        if level >= depth or draw.uniform() > operation:
            return draw.below(10)
        count = 2 + draw.below(arguments - 1)
        inner = tuple(expression(level + 1) for _ in range(count))
        return 10 + draw.below(len(OPERATIONS)), inner

    seen: set[Expression] = set()
    repeated = 0
    while repeated < 100_000:  # in a row: all the short ones are found
        repeated += 1
        drawn = expression(1)
        if isinstance(drawn, tuple) and drawn not in seen and _length(drawn) <= longest:
            seen.add(drawn)
            repeated = 0
            yield drawn


def _length(expression: Expression | int) -> int:
    return 1 if isinstance(expression, int) else 2 + sum(map(_length, expression[1]))


def evaluated(expression: Expression | int) -> int:
    """Return the value of an expression."""
    if isinstance(expression, int):
        return expression
    operation, inner = expression
    return OPERATIONS[TOKENS[operation]]([evaluated(one) for one in inner])


def binary(expression: Expression) -> Tree:
    """Return the binary tree of an expression, labelled at the root with its value."""
    words: list[int] = []
    children: list[tuple[int, int]] = []

    def leaf(word: int) -> int:
        words.append(word)
        children.append((-1, -1))
        return len(words) - 1

    def node(one: Expression | int) -> int:
        if isinstance(one, int):
            return leaf(one)
        left = leaf(one[0])
        # lazily, so that every right child is numbered just before its parent
        for right in itertools.chain(map(node, one[1]), map(leaf, [_END])):
            words.append(-1)
            children.append((left, right))
            left = len(words) - 1
        return left

    root = node(expression)
    return Tree(tuple(words), tuple(children), (*[-1] * root, evaluated(expression)))
