"""What an operation waits for: a function of its kind and of what the coupling halves around the block declare.

E, F   the data, if a half reads them; F also Up, if the upper half waits for it
A      the answers of both sides, where a half awaits them so
B, I   the next Down of the pass, while any is to come (I: the own objective goes first)
"""

from __future__ import annotations

from decoupled.coupling import Lower, Upper


def needed(
    kind: str, lower: Lower, upper: Upper, replies: int, own_taken: bool = False, data_taken: bool = False
) -> tuple[str, ...]:
    """The ports an operation waits for, from what the halves declare.

    Args:
        kind: of the operation, not S. lower, upper: the halves around the block.
        replies: Down messages of this pass still to come.
        own_taken: the block's own objective has been used. data_taken: the pass has its data.
    """
    up = ("up",) if upper.awaits == kind else ()
    if kind in "EF":
        return (("data",) if (lower.needs_data or upper.needs_data) and not data_taken else ()) + up
    if kind == "A":
        return ((down_port(0),) if lower.awaits == "A" else ()) + up
    own_first = kind == "I" and lower.has_objective and not own_taken
    return (down_port(lower.replies - replies),) if lower.awaits == "B" and replies and not own_first else ()


def down_port(part: int) -> str:
    """The port of the Down with this number within its pass: each has a channel, so that none can overtake another."""
    return f"down{part}" if part else "down"
