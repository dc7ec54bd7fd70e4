"""Intake: a buffer between two blocks. The lower one never waits for the upper one, which takes whatever is there.

    block k-1 --up--> [ intake k: at most M batches ] --up--> block k
                            ^------- ready (a Down without payload) ---'

When block k is ready it gets, of the batches used least often, the one that came last (priority LIFO); each `uses`
times at most. A batch that comes when all slots are taken replaces the oldest. Nobody is asked for more: a slow block
drops batches, a fast one uses some again. Once the block below has ended, what was never used is used, then block k
ends. Passes are numbered anew for block k, in the order in which it meets them; `batch` and `indices` stay.

An upper half declares it (`Upper.intake`), and the wiring puts it on the edge. Which batches meet is decided by
arrivals: on the simulator it is a pure function of the timing, on other runtimes no two runs need to be equal.

Source: the replay buffer of decoupled greedy learning, Belilovsky et al. 2020 (arXiv 1901.08164), as its code has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from decoupled.errors import UserError
from decoupled.messages import End, Message
from decoupled.runtime.contract import Actor, Outcome, Want


@dataclass
class _Slot:
    message: Message
    uses: int = 0


class Intake(Actor):
    """The buffer in front of one block.

    Args:
        k: number of the block above the buffer.
        slots: most batches it holds.
        uses: most times one batch is used; 0: any number.

    Attributes:
        reused: times a batch was used again.
        dropped: batches that were replaced before they were used.

    Raises:
        UserError: no slots, or a negative number of uses.
    """

    def __init__(self, k: int, slots: int, uses: int = 0) -> None:
        if slots < 1 or uses < 0:
            raise UserError(f"a buffer needs at least 1 slot and uses of at least 0 (any number), got {slots}, {uses}")
        self.name, self.beside, self.slots, self.uses = f"intake{k}", f"block{k}", slots, uses
        self.reused = self.dropped = 0
        self.begin(0)

    def begin(self, start: int) -> None:
        """Get ready for a run whose first pass has key `start`; what an earlier one has left is forgotten."""
        self._key, self._kept = start, list[_Slot]()  # in the order of arrival
        self._asked, self._ended, self._over = True, False, False

    def wants(self) -> Sequence[Want]:
        if self._over:
            return ()
        arrivals = () if self._ended else (Want(("up",)),)  # first: a block that is ready gets the newest there is
        if not self._asked:
            return (*arrivals, Want(("ready",)))
        return (*arrivals, Want()) if self._ended or self._next() is not None else arrivals

    def handle(self, want: Want, messages: tuple[Message, ...]) -> Outcome:
        if want.ports == ("ready",):
            self._asked = True
        elif messages:
            self._take(messages[0])
        else:
            return Outcome(None, [("up", self._serve())])
        return Outcome()

    def _take(self, message: Message) -> None:
        if isinstance(message, End):
            self._ended = True
            self._kept = [slot for slot in self._kept if not slot.uses]
        elif not getattr(message, "void", False):  # a pass dropped below has nothing to teach
            if len(self._kept) == self.slots:
                self.dropped += not self._kept.pop(0).uses
            self._kept.append(_Slot(message))

    def _next(self) -> _Slot | None:
        """The slot to use next: the latest of those used least."""
        ready = [slot for slot in reversed(self._kept) if not self.uses or slot.uses < self.uses]
        return min(ready, key=lambda slot: slot.uses, default=None)

    def _serve(self) -> Message:
        slot = self._next()
        if slot is None:
            self._over = True
            return End(self._key)
        self.reused += slot.uses > 0
        slot.uses += 1
        if self._ended:
            self._kept.remove(slot)
        message = replace(slot.message, key=self._key)
        self._key, self._asked = self._key + 1, False
        return message
