"""List reduction (Gaunt et al. 2017, AMPNet): read an operation and a list of digits, give the result modulo 10.

::

    max-min 3 9 4      ->  9 - 3              = 6
    even-odd 1 8       ->  mean(1) - mean(8)  = -7 -> 3 (modulo 10)

Fixed here, because the paper leaves it open: the length of the list is uniform on 1 ... 9, halves are rounded to even,
the modulus of a negative number is that of Python, and a mean of no digits (even-odd of one digit) counts as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from decoupled.data.structured import instances
from decoupled.data.structured.draw import Draw
from decoupled.data.structured.instances import Structured, in_order
from decoupled.specs import positive

LONGEST = 9  # digits after the operation: at most ten tokens in all


def _mean(digits: Sequence[int]) -> Fraction:
    return Fraction(sum(digits), len(digits)) if digits else Fraction(0)


OPERATIONS: dict[str, Callable[[Sequence[int]], Fraction | int]] = {
    "mean": _mean,
    "even-odd": lambda digits: _mean(digits[0::2]) - _mean(digits[1::2]),
    "max-min": lambda digits: max(digits) - min(digits),
    "len": len,
}
TOKENS = (*map(str, range(10)), *OPERATIONS)  # digit d is token d, the operations follow


def reduced(tokens: Sequence[int]) -> int:
    """Return the class of a sequence of token numbers: operation first, then digits."""
    return round(OPERATIONS[TOKENS[tokens[0]]](tokens[1:])) % 10


def list_reduction(
    *, train: int = 100_000, validation: int = 10_000, test: int = 10_000, seed: int = 0
) -> Structured[instances.Sequence]:
    """Generate sequences of an operation and 1 to 9 digits whose class is the reduced list.

    Args:
        train, validation, test: sequences of each split, drawn independently; short ones occur in several splits.
        seed: all of them depend on it and on the sizes only.

    Returns:
        Sequences of 2 to 10 tokens (14 different ones), 10 classes.

    Raises:
        UserError: a size below 1 or a negative seed.
    """
    positive("dataset 'list_reduction'", train=train, validation=validation, test=test)
    draw = Draw(seed)

    def sequence() -> instances.Sequence:
        operation = 10 + draw.below(len(OPERATIONS))
        tokens = (operation, *(draw.below(10) for _ in range(1 + draw.below(LONGEST))))
        return instances.Sequence(tokens, reduced(tokens))

    parts = {
        part: [sequence() for _ in range(size)]
        for part, size in (("train", train), ("validation", validation), ("test", test))
    }
    return Structured("list_reduction", *in_order(parts), classes=10, tokens=TOKENS, source=f"generated, seed {seed}")
