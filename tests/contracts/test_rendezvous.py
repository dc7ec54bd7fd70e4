"""From device to device: what the contract of transports does not see. CPU and Gloo stand in for GPUs and NCCL."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest
import torch

from decoupled.errors import ProtocolError
from decoupled.messages import Data
from decoupled.runtime.contract import Edge
from decoupled.transport import cuda, exchange, rendezvous, shared_device, ways
from decoupled.transport.bulk import Complete
from decoupled.transport.codec import Draft, encode
from decoupled.transport.contract import Closed, Lost, NeverOpened
from decoupled.transport.endpoint import Endpoint
from decoupled.transport.exchange import GLOO, Exchange, Library
from decoupled.transport.frame import Frame
from decoupled.transport.rendezvous import MeetingInlet, MeetingOutlet
from decoupled.transport.shared_device import DeviceRing
from decoupled.transport.shared_memory import HostRing

EDGE = Edge("block0", "up", "block1", "up", 2)
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
CPU = torch.device("cpu")
SOON = 20.0
Patch = pytest.MonkeyPatch


@pytest.fixture
def pair() -> Iterator[tuple[Endpoint, Endpoint]]:
    with closing(Endpoint(b"t", "127.0.0.1")) as a, closing(Endpoint(b"t", "127.0.0.1")) as b:
        yield a, b


def open_(pair: tuple[Endpoint, Endpoint]) -> tuple[MeetingOutlet, MeetingInlet]:
    out = pair[0].connect(EDGE, pair[1].address, SOON, "rank 1", bulk="rendezvous")
    inlet = pair[1].accept(EDGE, SOON, "rank 0")
    assert isinstance(out, MeetingOutlet)
    assert isinstance(inlet, MeetingInlet)
    return out, inlet


def data(number: int, size: int = 10) -> Data:
    return Data(number, batch=number, inputs=torch.full((size,), float(number)))


class Background:
    """A call in a thread of its own."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._found: Any = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def waits(self) -> bool:
        self._thread.join(0.1)
        return self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(SOON)
        assert not self._thread.is_alive(), "it hangs"
        if isinstance(self._found, BaseException):
            raise self._found
        return self._found

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self._found = work()
        except BaseException as error:
            self._found = error


# --- who meets whom --------------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: Patch) -> list[torch.device]:
    """Two GPUs by name; returns the devices for which groups were made."""
    made: list[torch.device] = []

    def make(talk: Any, rank: int, hostname: str, device: torch.device) -> Exchange:
        made.append(device)
        return Exchange(talk, rank, hostname, CPU, GLOO)

    names = {FIRST: "GPU-1", SECOND: "GPU-2"}
    monkeypatch.setattr(cuda, "identity", lambda device: names.get(device, ""))
    monkeypatch.setattr(ways, "Exchange", make)
    return made


@pytest.mark.parametrize(
    ("source", "target", "meet"),
    [
        (FIRST, SECOND, True),
        (FIRST, FIRST, False),  # NCCL refuses two ranks on one GPU, and here no GPU has memory to share
        (FIRST, None, False),
        (FIRST, CPU, False),
        (None, SECOND, False),
    ],
)
def test_two_gpus_meet_and_all_others_go_through_cpu_memory(
    pair: tuple[Endpoint, Endpoint], gpus: list[torch.device], source: Any, target: Any, meet: bool
) -> None:
    pair[1].expect(EDGE, target)
    out: Any = pair[0].connect(EDGE, pair[1].address, SOON, device=source)
    inlet: Any = pair[1].accept(EDGE, SOON, device=target)
    assert set(gpus) == ({FIRST, SECOND} if meet else set())
    assert isinstance(out, MeetingOutlet) == isinstance(inlet, MeetingInlet) == meet
    assert meet or isinstance(out._bulk, HostRing)
    assert inlet.pin == (target in (FIRST, SECOND))
    inlet.pin = False  # there is no GPU whose driver could pin anything
    out.send(data(1))
    assert torch.equal(inlet.receive().message.inputs, torch.ones(10))


class Sharing:
    """Memory of a GPU that two processes share, played by the CPU's in one process."""

    def __init__(self, can_export: bool = True, can_open: bool = True) -> None:
        self._can_export, self._can_open, self._made = can_export, can_open, dict[bytes, torch.Tensor]()

    def allocate(self, size: int, device: torch.device) -> tuple[torch.Tensor, bytes]:
        if not self._can_export:
            raise OSError("cuIpcGetMemHandle: error 801 of the CUDA driver")
        handle = bytes([len(self._made)]) * 64
        self._made[handle] = torch.zeros(size, dtype=torch.uint8)
        return self._made[handle], handle

    def open(self, handle: bytes, size: int, device: torch.device) -> torch.Tensor:
        if not self._can_open or not handle:
            raise OSError("cuIpcOpenMemHandle_v2: error 201 of the CUDA driver")
        return self._made[handle]


@pytest.mark.parametrize(("export", "map_"), [(True, True), (True, False), (False, True)])
def test_two_processes_on_one_gpu_share_a_ring_of_its_memory_if_they_can(
    pair: tuple[Endpoint, Endpoint], gpus: list[torch.device], monkeypatch: Patch, export: bool, map_: bool
) -> None:
    sharing = Sharing(export, map_)
    monkeypatch.setattr(shared_device, "_allocate", sharing.allocate)
    monkeypatch.setattr(shared_device, "_open", sharing.open)
    pair[1].expect(EDGE, FIRST)
    out: Any = pair[0].connect(EDGE, pair[1].address, SOON, device=FIRST)
    inlet: Any = pair[1].accept(EDGE, SOON, device=FIRST)
    assert not gpus
    kind = DeviceRing if export and map_ else HostRing
    assert isinstance(out._bulk, kind)
    assert isinstance(inlet._bulk, kind)
    inlet.pin = False
    out.send(data(1))
    assert torch.equal(inlet.receive().message.inputs, torch.ones(10))


def shared(pair: tuple[Endpoint, Endpoint]) -> tuple[Any, Any]:
    return pair[0].connect(EDGE, pair[1].address, SOON, bulk="shared_device"), pair[1].accept(EDGE, SOON)


def test_the_target_gives_a_shared_ring_back_before_the_source(
    pair: tuple[Endpoint, Endpoint], monkeypatch: Patch
) -> None:
    """CUDA leaves open what a mapping is worth whose memory has been freed."""
    freed: list[Any] = []
    free = DeviceRing.free
    monkeypatch.setattr(DeviceRing, "free", lambda ring: (freed.append((ring, inlet._link._is_cut)), free(ring)))
    out, inlet = shared(pair)
    out.send(data(1, 100_000))
    inlet.receive()
    inlet.taken()
    assert not freed
    out.close()
    leaves = Background(lambda: out.join(SOON))
    assert leaves.waits()
    assert not freed  # the source waits until the target's end is closed
    with pytest.raises(Closed):
        inlet.receive()
    leaves.result()
    assert freed[0] == (inlet._bulk, False)
    assert [cut for ring, cut in freed if ring is out._bulk] == [True]
    assert inlet._bulk._memory is out._bulk._memory is None


@pytest.mark.parametrize("receives", [True, False])
def test_an_error_of_the_gpu_is_not_taken_for_the_death_of_the_other_process(
    pair: tuple[Endpoint, Endpoint], monkeypatch: Patch, receives: bool
) -> None:
    out, inlet = shared(pair)
    broken = (inlet if receives else out)._bulk

    class Side(cuda.Side):
        def finish(self) -> None:
            raise RuntimeError("CUDA error: device-side assert triggered")

    broken._side = Side(CPU)
    out.send(data(1, 100_000))
    with pytest.raises((ProtocolError, Lost), match="device-side assert" if receives else "gone"):
        inlet.receive()
    if not receives:
        out.join(SOON)
        with pytest.raises(Lost, match="device-side assert"):
            out.ready()


def test_a_source_on_a_gpu_waits_until_the_target_is_known(
    pair: tuple[Endpoint, Endpoint], gpus: list[torch.device]
) -> None:
    a, b = pair
    with pytest.raises(NeverOpened, match=r"rank 7 never opened edge block0\.up->block1\.up within 0\.2 s"):
        a.connect(EDGE, b.address, 0.2, "rank 7", run=0, device=FIRST)
    connecting = Background(lambda: a.connect(EDGE, b.address, SOON, run=1, device=FIRST))
    assert connecting.waits()
    inlet = Background(lambda: b.accept(EDGE, SOON, run=1, device=SECOND))
    connecting.result().send(data(3))
    assert inlet.result().receive().message.key == 3


# --- the rendezvous --------------------------------------------------------------------------------------------------


def test_nothing_is_said_before_it_is_computed_nor_sent_before_the_target_is_ready(
    pair: tuple[Endpoint, Endpoint], monkeypatch: Patch
) -> None:
    computed = threading.Event()
    monkeypatch.setattr(cuda, "computed", lambda device: lambda: computed.wait(SOON))
    out, inlet = open_(pair)
    events: list[str] = []
    group: Any = out._bulk._group  # type: ignore[attr-defined]
    send, write, tell = group.send, out._link.write, inlet._tell
    group.send = lambda tensors: (events.append("send"), send(tensors))[1]

    def noted(header: Frame, *rest: Any, **how: Any) -> bool:
        events.append(header.kind.name)
        return write(header, *rest, **how)

    monkeypatch.setattr(out._link, "write", noted)
    inlet._tell = lambda frame: (events.append(frame.kind.name), tell(frame))[1]  # type: ignore[method-assign]
    out.send(data(1))  # the actor's thread goes on
    receiving = Background(inlet.receive)
    assert receiving.waits()
    assert events == []
    computed.set()
    assert torch.equal(receiving.result().message.inputs, torch.ones(10))
    assert events == ["MESSAGE", "RELEASE", "send"]


def test_credits_are_heard_while_a_transfer_is_under_way(pair: tuple[Endpoint, Endpoint]) -> None:
    out, inlet = open_(pair)
    for n in range(2):
        out.send(data(n))
    assert not out.ready(0)
    assert inlet.receive().message.key == 0  # the second one has been announced, and waits
    inlet.taken()
    assert out.ready(SOON)


class Stuck(exchange.Group):
    """A group of NCCL's whose other end has died: nothing ends before it is aborted."""

    device = CPU

    def __init__(self) -> None:
        self._aborted = threading.Event()

    def send(self, tensors: Sequence[torch.Tensor]) -> Complete:
        return self._wait

    receive = send

    def abort(self) -> None:
        self._aborted.set()

    def _wait(self) -> None:
        self._aborted.wait()
        raise ConnectionAbortedError("aborted")


@pytest.mark.parametrize("dies", ["source", "target"])
def test_a_transfer_does_not_outlive_its_other_end(
    pair: tuple[Endpoint, Endpoint], monkeypatch: Patch, dies: str
) -> None:
    monkeypatch.setattr(rendezvous, "_GRACE", 0.05)
    out, inlet = open_(pair)
    out._bulk._group, inlet._bulk._group = Stuck(), Stuck()  # type: ignore[attr-defined]
    out.send(data(1))
    receiving = Background(inlet.receive)
    assert receiving.waits()
    if dies == "source":
        out._link.cut()
        with pytest.raises(Lost, match="rank 0 has gone"):
            receiving.result()
    else:
        sending = Background(lambda: [out.send(data(n)) for n in range(2)])
        assert sending.waits()
        inlet._link.cut()
        inlet._bulk.abort()
        with pytest.raises(Lost, match="rank 1 has gone"):
            sending.result()
        out.close()
        out._thread.join(4.0)  # before anybody loses patience with it
        assert not out._thread.is_alive()


def test_a_wrong_clearance_is_refused(pair: tuple[Endpoint, Endpoint]) -> None:
    out, inlet = open_(pair)
    inlet._bulk.receive = lambda pieces, part, release: release(7)  # type: ignore[method-assign]
    out.send(data(1))
    Background(inlet._begin).result()
    with pytest.raises(Lost, match="cleared 7 bytes where 40 are to be sent"):
        Background(lambda: [out.send(data(n)) for n in range(9)]).result()


def test_tensors_of_a_device_need_one_at_the_target() -> None:
    encoded = encode(data(1), str(EDGE), CPU)
    assert isinstance(encoded.pieces[0], torch.Tensor)
    with pytest.raises(ProtocolError, match="no device is at this end"):
        Draft(encoded.meta, 1, 40, str(EDGE))
    assert isinstance(Draft(encoded.meta, 1, 40, str(EDGE), CPU).pieces[0], torch.Tensor)


# --- opening ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["hangs", "raises"])
def test_a_group_that_does_not_come_up_is_given_up_in_time(
    pair: tuple[Endpoint, Endpoint], monkeypatch: Patch, fails: str
) -> None:
    forever = threading.Event()

    def make(store: Any, rank: int, hostname: str) -> Any:
        if fails == "hangs":
            forever.wait(SOON)
        raise RuntimeError("NCCL says no")

    monkeypatch.setattr(ways, "GLOO", Library("NCCL", make, lambda group, other: None))
    why = "NCCL did not connect|hung up" if fails == "hangs" else "NCCL says no|hung up"
    with pytest.raises(
        NeverOpened, match=rf"rank 1 never opened edge block0\.up->block1\.up within 0\.5 s \(.*({why})"
    ):
        pair[0].connect(EDGE, pair[1].address, 0.5, "rank 1", bulk="rendezvous")
    forever.set()
