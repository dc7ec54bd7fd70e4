"""The edges of one process that lead to or come from others: opened when first used, kept from run to run.

    outlet     in the thread of the edge's source
    inlet      a thread of its own: receive -> mailbox of the present run

`Begin` marks on every edge where a run begins, so what an earlier one has left on the way is told apart. After a
failure all channels are closed; the next run opens new ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from decoupled.errors import ProtocolError
from decoupled.messages import Message
from decoupled.runtime.contract import Edge
from decoupled.runtime.local import LocalRun
from decoupled.transport import cuda
from decoupled.transport.codec import register
from decoupled.transport.contract import Closed, Inlet, Outlet
from decoupled.transport.endpoint import Address, Endpoint

VERDICT = 1.0  # seconds in which the control line may tell more of a lost process than a broken edge does


@register
@dataclass(frozen=True, slots=True)
class Begin(Message):
    """What follows on this edge belongs to the run whose number is the key."""


class Channels:
    """Channels of one process.

    Args:
        rank: of this process. places: actor -> rank.
        endpoint: where edges are opened. addresses, offsets: of all ranks; offsets are to rank 0's clock, in seconds.
        timeout: seconds an edge may take to open.

    Attributes:
        run: the present run.
        lost: waits so many seconds for the news that a process is lost.
    """

    def __init__(
        self, rank: int, places: Mapping[str, int], endpoint: Endpoint, addresses: Sequence[Address],
        offsets: Sequence[float], timeout: float,
    ) -> None:  # fmt: skip
        self._rank, self._places, self.endpoint = rank, places, endpoint
        self._addresses, self._offsets, self._timeout = addresses, offsets, timeout
        self._outlets: dict[Edge, Outlet] = {}
        self._inlets: dict[Edge, Inlet] = {}
        self.run: LocalRun | None = None
        self.lost: Callable[[float], bool] = lambda timeout: False

    def open(self, edges: Sequence[Edge], number: int, devices: Mapping[str, torch.device | None]) -> Exception | None:
        """Open this process's ends of the edges that are new in run `number`; `devices`: actor -> where it computes.

        Returns:
            What went wrong (it is for all ranks to hear), or None.
        """
        places, rank = self._places, self._rank
        new = [edge for edge in edges if edge not in self._outlets and edge not in self._inlets]
        going = [edge for edge in new if places[edge.source] == rank != places[edge.target]]
        if astray := [edge for edge in new if edge.drops and places[edge.source] != places[edge.target]]:
            return ProtocolError(f"edge {astray[0]} drops messages and leads to another process; put an actor between")
        coming = [edge for edge in new if places[edge.target] == rank != places[edge.source]]
        try:
            for edge in coming:
                self.endpoint.expect(edge, devices[edge.target], number)
            for edge in going:
                target, device = places[edge.target], devices[edge.source]
                self._outlets[edge] = self.endpoint.connect(
                    edge, self._addresses[target], self._timeout, f"rank {target}", number, device=device
                )
            for edge in coming:
                name, device = f"rank {places[edge.source]}", devices[edge.target]
                inlet = self._inlets[edge] = self.endpoint.accept(edge, self._timeout, name, number, device)
                threading.Thread(
                    target=self._receive, args=(edge, inlet, device), name=f"receive {edge}", daemon=True
                ).start()
        except Exception as error:
            return error
        return None

    def outlets(self, edges: Sequence[Edge]) -> dict[Edge, Outlet]:
        """Those of these edges that lead to another process."""
        return {edge: self._outlets[edge] for edge in edges if edge in self._outlets}

    def begin(self, edges: Sequence[Edge], number: int) -> None:
        """Mark the beginning of run `number` on them."""
        for outlet in self.outlets(edges).values():
            outlet.send(Begin(number))

    def close(self) -> None:
        """Close all; they are opened again when they are needed."""
        for channel in (*self._outlets.values(), *self._inlets.values()):
            channel.close()
        self._outlets.clear()
        self._inlets.clear()

    def _receive(self, edge: Edge, inlet: Inlet, device: torch.device | None) -> None:
        number: object = None
        skew = self._offsets[self._places[edge.source]] - self._offsets[self._rank]
        try:
            with cuda.lane(device):  # what arrives on a GPU is allocated on a stream of this thread's own
                while True:
                    message, sent = inlet.receive()
                    if isinstance(message, Begin):
                        number = message.key
                        inlet.taken()
                    elif self.run is None or self.run.number != number:
                        inlet.taken()
                    else:
                        self.run.arrive(edge, message, sent + skew, inlet)
        except Closed:
            pass
        except Exception as error:
            if self.run is not None and not self.lost(VERDICT):
                self.run.fail(error)
