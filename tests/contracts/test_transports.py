"""The contract of transports, for every way a message can take: two endpoints of one process, a thread each.

way            link         large tensors
shared_memory  Unix socket  ring of shared memory
stream         Unix socket  behind the header
gloo           Unix socket  Gloo
shared_device  Unix socket  ring of shared memory, with the threads of a GPU's edge: what two ends on one GPU get
rendezvous     Unix socket  a process group, when both ends stand ready: what two GPUs get (there over NCCL)
far stream     TCP          behind the header        (the address is said to be another host's)
far gloo       TCP          Gloo
far rendezvous TCP          as above
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoupled.errors import ProtocolError, UserError
from decoupled.messages import Data, End, Message, Up
from decoupled.runtime.contract import Edge
from decoupled.transport import ends, frame, handshake, link, place
from decoupled.transport.contract import Closed, Lost, NeverOpened, Outlet
from decoupled.transport.endpoint import Address, Endpoint
from decoupled.transport.ends import LinkInlet, LinkOutlet
from decoupled.transport.frame import Frame, Kind

ROOT = Path(__file__).resolve().parents[2]
WAYS = ("shared_memory", "shared_device", "stream", "gloo", "rendezvous", "far stream", "far gloo", "far rendezvous")
EDGE = Edge("block0", "up", "block1", "up", 3)
SOON = 20.0  # seconds that nothing takes on a machine that is not broken
TOKEN = b"a token"


class Task:
    """A function in a thread of its own."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def waits(self) -> bool:
        """Whether it is still at work after a moment."""
        self._thread.join(0.05)
        return self._thread.is_alive()

    def result(self, timeout: float = SOON) -> Any:
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "it hangs"
        if isinstance(self._found, BaseException):
            raise self._found
        return self._found

    def _run(self) -> None:
        try:
            self._found: Any = self._work()
        except BaseException as error:
            self._found = error


class Two:
    """Two endpoints, and edges from the first to the second."""

    def __init__(self, way: str, ring_bytes: int = 1 << 20) -> None:
        self.way = way
        self.a, self.b = (Endpoint(TOKEN, "127.0.0.1", ring_bytes=ring_bytes) for _ in range(2))

    @property
    def address(self) -> Address:
        far = self.way.startswith("far ")
        return dataclasses.replace(self.b.address, host="another host") if far else self.b.address

    def open(self, edge: Edge = EDGE, run: int = 0) -> tuple[LinkOutlet, LinkInlet]:
        bulk = self.way.removeprefix("far ")
        out = self.a.connect(edge, self.address, SOON, "rank 1", run=run, bulk=bulk)
        inlet = self.b.accept(edge, SOON, "rank 0", run=run)
        assert isinstance(out, LinkOutlet)
        assert isinstance(inlet, LinkInlet)
        return out, inlet

    def close(self) -> None:
        closing_b = Task(self.b.close)
        self.a.close()
        closing_b.result()


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(SOON)
        assert not thread.is_alive(), thread


@pytest.fixture(params=WAYS)
def two(request: pytest.FixtureRequest) -> Iterator[Two]:
    with closing(Two(request.param)) as two:
        yield two


@pytest.fixture
def near() -> Iterator[Two]:
    with closing(Two("shared_memory")) as two:
        yield two


def message(number: int, *sizes: int) -> Up:
    payload = tuple(torch.arange(size, dtype=torch.float32) + number for size in sizes)
    return Up(key=number, batch=number, round=0, indices=torch.arange(7), version=number, payload=payload)


def assert_equal(found: Message, sent: Message) -> None:
    assert isinstance(found, Up)
    assert isinstance(sent, Up)
    assert (found.key, found.version, len(found.payload)) == (sent.key, sent.version, len(sent.payload))
    assert all(torch.equal(a, b) for a, b in zip(found.payload, sent.payload, strict=True))
    assert torch.equal(found.indices, sent.indices)  # type: ignore[arg-type]


# --- messages --------------------------------------------------------------------------------------------------------

SIZES = [(1,), (), (0,), (5, 300_000, 0, 7), (70_000,), (1_000_000,), (20_000,) * 9, (1,), (600_000, 2), (262_144,)]


def test_messages_of_all_sizes_arrive_unchanged_and_in_order(two: Two) -> None:
    out, inlet = two.open()
    sent = [message(n, *sizes) for n, sizes in enumerate(SIZES)]

    def send() -> None:
        for one in sent:
            out.send(one)
        out.send(End(99))

    sender = Task(send)
    times, kept = [], []
    for one in sent:
        found, time = Task(inlet.receive).result()
        inlet.taken()
        assert_equal(found, one)
        kept.append(found)
        times.append(time)
    assert inlet.receive().message == End(99)
    sender.result()
    assert times == sorted(times)
    for found, one in zip(kept, sent, strict=True):  # a later message has not changed an earlier one
        assert_equal(found, one)
    total = sum(t.nbytes for one in sent for t in (*one.payload, one.indices) if t is not None)
    assert out.payload_bytes == total
    assert total < out.nbytes < total + 600 * len(sent) + 48 * 40


@pytest.mark.parametrize("ring", [333, 4096, 100_003])
@pytest.mark.parametrize("way", ["shared_memory", "shared_device"])
def test_messages_larger_than_the_ring_stream_through_it(way: str, ring: int) -> None:
    with closing(Two(way, ring)) as two:
        out, inlet = two.open()
        one = message(1, 30_000, 3, 25_001)
        sender = Task(lambda: [out.send(one) for _ in range(2)])
        for _ in range(2):
            assert_equal(Task(inlet.receive).result().message, one)
        sender.result()


@settings(max_examples=25)
@given(st.lists(st.lists(st.integers(0, 90_000), max_size=4), min_size=1, max_size=4), st.integers(4_000, 200_000))
def test_any_sizes_and_any_ring(sizes: list[list[int]], ring: int) -> None:
    with closing(Two("shared_memory", ring)) as two:
        out, inlet = two.open()
        sender = Task(lambda: [out.send(message(n, *some)) for n, some in enumerate(sizes)])
        for n, some in enumerate(sizes):
            assert_equal(Task(inlet.receive).result().message, message(n, *some))
            inlet.taken()
        sender.result()


def test_wire_bytes_are_payload_bytes_within_two_percent(two: Two) -> None:
    out, inlet = two.open()
    for n in range(3):
        x = torch.randn(64, 256)
        out.send(Up(key=n, batch=n, round=0, indices=torch.arange(64), version=n, payload=(x,)))
        inlet.receive()
        inlet.taken()
    assert out.payload_bytes == 3 * (64 * 1024 + 64 * 8)
    assert out.payload_bytes < out.nbytes <= 1.02 * out.payload_bytes


def test_what_cannot_be_sent_costs_no_credit(near: Two) -> None:
    out, inlet = near.open()
    for _ in range(5):
        with pytest.raises(ProtocolError, match=r"edge block0\.up->block1\.up.*list"):
            out.send(Message([1]))  # type: ignore[arg-type]
    out.send(Message(1))
    assert inlet.receive().message == Message(1)


def test_a_slow_network_does_not_hold_up_the_sender() -> None:
    for way in ("far stream", "far gloo", "gloo", "rendezvous"):
        with closing(Two(way)) as two:
            out, inlet = two.open()
            Task(lambda: [out.send(message(n, 4_000_000)) for n in range(3)]).result()  # noqa: B023 - ends here
            for n in range(3):
                assert_equal(Task(inlet.receive).result().message, message(n, 4_000_000))


# --- credits ---------------------------------------------------------------------------------------------------------


def test_who_is_answered_at_once_waits_awake_for_a_moment_and_then_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "_MOMENT", 0.02)  # a busy machine may take the core away for longer than the true one

    class Poll:
        """Counts how often it is asked for what is there already, and how often it sleeps."""

        def __init__(self) -> None:
            self.looks = self.sleeps = 0

        def poll(self, milliseconds: float | None = None) -> list[tuple[int, int]]:
            self.looks, self.sleeps = self.looks + (milliseconds == 0), self.sleeps + (milliseconds is None)
            return answers.poll(milliseconds)

    mine, its = socket.socketpair()
    answers = select.poll()
    answers.register(mine, select.POLLIN)
    with its, closing(link.Link(mine, "a->b", 0, "rank 1")) as watching:

        def watch() -> Poll:
            watching._poll = poll = Poll()  # pyright: ignore[reportAttributeAccessIssue]
            watching.watch()
            return poll

        its.send(b"x")
        for _ in range(100):  # it is there at once
            watch()
        mine.recv(1)
        late = threading.Timer(0.3, its.send, [b"x"])
        late.start()
        found = watch()  # it is late for once
        late.join()
        assert found.looks > 2
        assert found.sleeps == 1
        mine.recv(1)
        late = threading.Timer(0.3, its.send, [b"x"])
        late.start()
        found = watch()  # now it is known to be late
        late.join()
        assert (found.looks, found.sleeps) == (1, 1)


def test_capacity_is_kept_exactly(two: Two) -> None:
    out, inlet = two.open()
    size = 5_000 if two.way == "stream" else 40_000  # what the socket holds while nobody receives
    for n in range(3):
        assert out.ready(0)
        out.send(message(n, size))
    assert not out.ready(0)
    for _ in range(3):
        inlet.receive()
    assert not out.ready(0.01)  # received is not taken
    fourth = Task(lambda: out.send(message(3, size)))
    assert fourth.waits()
    inlet.taken()
    fourth.result()
    assert not out.ready(0.01)
    assert inlet.receive().message.key == 3
    for _ in range(3):
        inlet.taken()
    assert out.ready(SOON)
    with pytest.raises(ProtocolError, match="more messages were taken"):
        inlet.taken()


def test_messages_beyond_the_capacity_and_credits_without_messages_are_refused(near: Two) -> None:
    out, inlet = near.open()
    for n in range(4):
        out._credits = 1  # a sender that cheats
        out.send(message(n, 1))
    for _ in range(3):
        inlet.receive()
    with pytest.raises(ProtocolError, match="beyond the capacity 3"):
        inlet.receive()
    out, inlet = near.open(run=1)
    for n in range(3):
        out.send(message(n, 1))
    inlet._tell(Frame(Kind.CREDIT, 4))  # a receiver that cheats
    with pytest.raises(ProtocolError, match="more messages were taken"):
        out.ready()


@pytest.mark.parametrize("bursts", [1, 500])
def test_credits_that_nobody_reads_never_stop_the_target(two: Two, bursts: int) -> None:
    """A Unix socket holds fewer than 300 of them."""
    out, inlet = two.open(dataclasses.replace(EDGE, capacity=1_000))

    def work() -> None:
        for first in range(0, 1_000, bursts):
            for n in range(first, first + bursts):
                out.send(message(n, 1))
                inlet.receive()
            for _ in range(bursts):
                inlet.taken()

    Task(work).result()


def test_a_large_capacity_is_kept_exactly_too(near: Two) -> None:
    out, inlet = near.open(dataclasses.replace(EDGE, capacity=200))
    for n in range(200):
        out.send(message(n, 1))
        inlet.receive()
    assert not out.ready(0.01)
    for n in range(200, 400):
        inlet.taken()
        assert out.ready(SOON)
        out.send(message(n, 1))
        inlet.receive()
        assert not out.ready(0)


# --- closing ---------------------------------------------------------------------------------------------------------


def test_what_was_sent_before_closing_arrives(two: Two) -> None:
    out, inlet = two.open()
    size = 5_000 if two.way == "stream" else 50_000
    for n in range(3):
        out.send(message(n, size))
    Task(out.close).result()
    out.close()
    with pytest.raises(Closed):
        out.send(message(4, 1))
    for n in range(3):
        assert_equal(Task(inlet.receive).result().message, message(n, size))
    inlet.taken()  # too late, and harmless
    for _ in range(2):
        with pytest.raises(Closed, match="closed by rank 0"):
            Task(inlet.receive).result()
    inlet.close()
    inlet.close()


@pytest.mark.parametrize("way", ["far stream", "far gloo", "far rendezvous"])
def test_closing_with_unread_credits_loses_nothing(way: str) -> None:
    """A TCP socket that is closed with something unread resets the connection; what is under way would be lost."""
    with closing(Two(way)) as two:
        out, inlet = two.open()
        out.send(message(0, 1))
        out.send(message(1, 5_000_000))
        inlet.receive()
        inlet.taken()  # the source will not read this
        out.close()
        assert_equal(Task(inlet.receive).result().message, message(1, 5_000_000))
        with pytest.raises(Closed):
            Task(inlet.receive).result()


def fill(out: Outlet) -> None:
    while out.ready(0):
        out.send(message(0, 1))


def exhaust(out: Outlet) -> None:
    fill(out)
    out.ready()


@pytest.mark.parametrize("closes", ["own", "other"])
def test_closing_wakes_who_waits_for_room_or_a_message(two: Two, closes: str) -> None:
    for run in range(2):
        out, inlet = two.open(run=run)
        if run:
            fill(out)
            waiting, own, other = Task(out.ready), out, inlet
        else:
            waiting, own, other = Task(inlet.receive), inlet, out
        assert waiting.waits()
        (own if closes == "own" else other).close()
        with pytest.raises(Closed, match=r"edge block0\.up->block1\.up was closed"):
            waiting.result()


@pytest.mark.parametrize("closes", ["outlet", "inlet"])
def test_closing_wakes_a_sender_in_the_middle_of_a_message(two: Two, closes: str) -> None:
    out, inlet = two.open()

    def send() -> None:
        out.send(message(0, 9_000_000))
        exhaust(out)

    sender = Task(send)
    assert sender.waits()
    (out if closes == "outlet" else inlet).close()
    with pytest.raises((Closed, Lost)) as caught:
        sender.result()
    assert closes == "outlet" or caught.type is Closed


def test_closing_wakes_a_receiver_in_the_middle_of_a_message(two: Two) -> None:
    out, inlet = two.open()
    out._bulk.send = lambda *_: lambda: None  # type: ignore[method-assign]  # announced, and never sent
    stuck = frame.Frame(Kind.MESSAGE, 4_000_096, 0.0, b"", 2)
    encoded = ends.encode(message(1, 1_000_000), str(EDGE), inlet._bulk.device)
    size = sum(piece.nbytes for piece in encoded.pieces)
    small, _ = inlet._bulk.divide(encoded.pieces)
    if "stream" in two.way:
        small = [piece[:10] for piece in small[1:]]
    out._link.write(stuck._replace(amount=size, meta=encoded.meta), small)
    waiting = Task(inlet.receive)
    assert waiting.waits()
    inlet.close()
    with pytest.raises(Closed):
        waiting.result()


def test_an_end_that_vanishes_is_lost(two: Two) -> None:
    out, inlet = two.open()
    waiting = Task(inlet.receive)
    assert waiting.waits()
    out._link.cut()  # as the system does for a process that dies
    out._bulk.abort()
    with pytest.raises(Lost, match=r"edge block0\.up->block1\.up: rank 0 has gone without saying goodbye"):
        waiting.result()
    out, inlet = two.open(run=1)
    fill(out)
    waiting = Task(out.ready)
    assert waiting.waits()
    inlet._link.cut()
    with pytest.raises(Lost, match="rank 1 has gone"):
        waiting.result()
    with pytest.raises(Lost):
        out.send(message(0, 1))


def test_edges_open_again_in_later_runs_and_stale_ones_are_forgotten(two: Two) -> None:
    bulk = two.way.removeprefix("far ")
    stale = two.a.connect(EDGE, two.address, SOON, run=0, bulk=bulk)  # never accepted
    for run in (1, 2):
        out, inlet = two.open(run=run)
        receiving = Task(inlet.receive)
        out.send(message(run, 100_000))
        assert_equal(receiving.result().message, message(run, 100_000))
        if run == 1:
            out.close()
            inlet.close()
    with pytest.raises(Closed):
        exhaust(stale)
    out.send(message(9, 1))
    assert inlet.receive().message.key == 9


def test_processes_may_open_edges_in_any_order(near: Two) -> None:
    edges = [Edge("a", "x", "b", "y", n + 1) for n in range(1)] + [
        Edge(f"a{n}", "x", f"b{n}", "y", 2) for n in range(9)
    ]
    forth = [near.a.connect(edge, near.b.address, SOON) for edge in edges]
    back = [near.b.connect(edge, near.a.address, SOON) for edge in edges]  # both connect before anybody accepts
    for edge, outlet in zip(reversed(edges), reversed(forth), strict=True):
        outlet.send(Message(str(edge)))
        assert near.b.accept(edge, SOON).receive().message.key == str(edge)
    for edge, outlet in zip(edges, back, strict=True):
        outlet.send(Message(str(edge)))
        assert near.a.accept(edge, SOON).receive().message.key == str(edge)


# --- opening ---------------------------------------------------------------------------------------------------------


def test_an_edge_that_is_not_opened_is_named(near: Two) -> None:
    with pytest.raises(NeverOpened, match=r"rank 3 never opened edge block0\.up->block1\.up within 0\.05 s"):
        near.b.accept(EDGE, 0.05, "rank 3")
    near.b.close()
    with pytest.raises(NeverOpened, match=r"rank 1 never opened edge block0\.up->block1\.up within 0\.5 s"):
        near.a.connect(EDGE, near.b.address, 0.5, "rank 1")
    with closing(socket.create_server(("127.0.0.1", 0))) as mute:
        address = dataclasses.replace(near.b.address, host="another host", port=mute.getsockname()[1])
        with pytest.raises(NeverOpened, match=r"within 0\.05 s"):
            near.a.connect(EDGE, address, 0.05, "rank 1")


def test_closing_the_endpoint_wakes_who_opens(near: Two) -> None:
    accepting = Task(lambda: near.b.accept(EDGE, SOON))
    with closing(socket.create_server(("127.0.0.1", 0))) as mute:
        address = dataclasses.replace(near.b.address, host="another host", port=mute.getsockname()[1])
        connecting = Task(lambda: near.a.connect(EDGE, address, SOON))
        assert accepting.waits()
        assert connecting.waits()
        near.close()
        for waiting in (accepting, connecting):
            with pytest.raises(Closed):
                waiting.result()


@pytest.mark.parametrize("far", [False, True])
def test_a_wrong_token_is_refused(far: bool) -> None:
    with closing(Endpoint(TOKEN, "127.0.0.1")) as right, closing(Endpoint(b"guess", "127.0.0.1")) as wrong:
        address = dataclasses.replace(right.address, host="another host") if far else right.address
        with pytest.raises(ProtocolError, match=r"edge block0\.up->block1\.up with rank 7: refused: wrong token"):
            wrong.connect(EDGE, address, SOON, "rank 7")
        with pytest.raises(NeverOpened):
            right.accept(EDGE, 0.01)


def test_a_target_without_the_token_is_refused(monkeypatch: pytest.MonkeyPatch, near: Two) -> None:
    real = handshake._proof
    monkeypatch.setattr(
        handshake, "_proof", lambda token, side, *n: real(b"x" if side == "target" else token, side, *n)
    )
    monkeypatch.setattr(handshake.hmac, "compare_digest", lambda a, b: a == b and len(set(a)) < 0)
    with pytest.raises(ProtocolError, match="wrong token"):
        near.a.connect(EDGE, near.b.address, SOON)


def test_capacities_must_agree(near: Two) -> None:
    out = near.a.connect(EDGE, near.b.address, SOON)
    with pytest.raises(ProtocolError, match=r"edge block0\.up->block1\.up: its capacity is 5 here and 3 at rank 0"):
        near.b.accept(dataclasses.replace(EDGE, capacity=5), SOON, "rank 0")
    with pytest.raises(Closed):
        exhaust(out)


def test_what_makes_no_sense_is_a_user_error(near: Two) -> None:
    far = dataclasses.replace(near.b.address, host="another host")
    with pytest.raises(UserError, match="share no memory; use bulk='auto'"):
        near.a.connect(EDGE, far, SOON, bulk="shared_memory")
    with pytest.raises(UserError, match="Did you mean 'gloo'"):
        near.a.connect(EDGE, far, SOON, bulk="glo")
    with pytest.raises(UserError, match="token"):
        Endpoint(b"")


def test_addresses_travel_as_json_and_tell_hosts_apart(near: Two) -> None:
    address = near.a.address
    assert Address(**json.loads(json.dumps(dataclasses.asdict(address)))) == address
    assert address.host == near.b.address.host == place.host()
    assert address.local != near.b.address.local


def test_the_address_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.reachable(interface="lo") == "127.0.0.1"
    assert place.reachable("localhost") == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert place.reachable() == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    with pytest.raises(UserError, match=r"'nosuch0' has no IPv4 address .*known: .*lo"):
        place.reachable()
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    assert place.reachable().count(".") == 3
    with pytest.raises(UserError, match="no IPv4 address"):
        place.reachable("no.such.host.invalid")


# --- nonsense --------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.binary(max_size=300), st.booleans())
def test_nonsense_from_strangers_does_no_harm(noise: bytes, prefixed: bool) -> None:
    with closing(Two("shared_memory")) as two:
        for family, address in (
            (socket.AF_UNIX, two.b.address.local.replace("@", "\0", 1)),
            (socket.AF_INET, ("127.0.0.1", two.b.address.port)),
        ):
            with socket.socket(family) as stranger, suppress(OSError):
                stranger.connect(address)
                stranger.sendall((len(noise).to_bytes(4, "big") if prefixed else b"") + noise)
                stranger.shutdown(socket.SHUT_WR)
                assert len(stranger.recv(1 << 16)) < 1000
        out, inlet = two.open()
        out.send(message(1, 1))
        assert inlet.receive().message.key == 1


@settings(max_examples=30)
@given(
    st.binary(min_size=1, max_size=200), st.sampled_from(["noise", "changed byte", "cut off"]), st.integers(0, 10**6)
)
def test_nonsense_from_a_source_is_an_error_and_nothing_else(noise: bytes, kind: str, place_: int) -> None:
    with closing(Two("shared_memory")) as two:
        out, inlet = two.open()
        encoded = ends.encode(message(1, 10), str(EDGE))
        header = Frame(Kind.MESSAGE, 96, 0.0, encoded.meta, 2)
        good = frame.pack(header, frame.number(str(EDGE), 0), 0) + encoded.meta
        if kind == "noise":
            data = noise
        elif kind == "cut off":
            data = good[: place_ % len(good)]
        else:
            place_ %= len(good)
            data = good[:place_] + bytes([good[place_] ^ noise[0] or 1]) + good[place_ + 1 :]
            data = data if data != good else b"x" + good[1:]
        out._link._socket.sendall(data)
        out._link.cut()
        with pytest.raises((ProtocolError, Lost), match=r"edge block0\.up->block1\.up"):
            Task(inlet.receive).result()


@pytest.mark.parametrize("kind", [Kind.PART, Kind.CREDIT, Kind.RELEASE])
def test_frames_that_are_not_due_are_refused(near: Two, kind: Kind) -> None:
    out, inlet = near.open()
    out._link.write(Frame(kind, 1))
    with pytest.raises(ProtocolError, match=f"a {kind.name} arrived where a MESSAGE is due"):
        inlet.receive()
    for n in range(3):  # what the target says is read when the credits are used up
        out.send(message(n, 1))
    inlet._link.write(Frame(Kind.MESSAGE if kind is Kind.CREDIT else kind, 1))
    with pytest.raises(ProtocolError):
        out.ready()


@pytest.mark.parametrize("amount", [0, 500_001, 1 << 30])
def test_parts_that_cannot_be_are_refused(near: Two, amount: int) -> None:
    out, inlet = near.open()
    encoded = ends.encode(Data(0, batch=0, inputs=torch.zeros(125_000)), str(EDGE))
    out._link.write(Frame(Kind.MESSAGE, 500_000, 0.0, encoded.meta, 1))
    out._link.write(Frame(Kind.PART, amount))
    with pytest.raises(ProtocolError, match=f"a part of {amount} bytes, where 500000 are missing"):
        inlet.receive()


# --- death -----------------------------------------------------------------------------------------------------------

CHILD = """
import json, sys, torch
from decoupled.messages import Data
from decoupled.runtime.contract import Edge
from decoupled.transport.endpoint import Address, Endpoint

endpoint = Endpoint(b"a token", "127.0.0.1")
address = Address(**json.loads(sys.stdin.readline()))
outlets = []
for way in sys.argv[1:]:
    far = Address("another host", *list(vars(address).values())[1:])
    target = far if way.startswith("far ") else address
    edge = Edge("block0", way, "block1", way, 2)
    outlets.append(endpoint.connect(edge, target, 20, bulk=way.removeprefix("far ")))
for outlet in reversed(outlets):  # those with a thread of their own first
    outlet.send(Data(0, batch=0, inputs=torch.ones(30_000_000)))
"""


@pytest.mark.parametrize(
    "ways",
    [("shared_memory", "shared_device", "gloo", "far gloo"), ("stream", "far stream", "rendezvous", "far rendezvous")],
)
def test_a_killed_sender_is_noticed_in_the_middle_of_a_message_and_leaves_nothing(
    ways: tuple[str, ...], tmp_path: Path
) -> None:
    with closing(Endpoint(TOKEN, "127.0.0.1")) as endpoint:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, *ways],
            stdin=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        )
        try:
            assert child.stdin is not None
            child.stdin.write(json.dumps(dataclasses.asdict(endpoint.address)) + "\n")
            child.stdin.flush()
            inlets = [endpoint.accept(Edge("block0", way, "block1", way, 2), 60, "rank 0") for way in ways]
            killed, begun = threading.Event(), threading.Semaphore(0)
            for inlet in inlets:
                assert isinstance(inlet, LinkInlet)
                read_into = inlet._link.read_into

                def wait(pieces: Any, read_into: Callable[..., None] = read_into) -> None:
                    begun.release()  # the header is here; wait for the death, then read on
                    assert killed.wait(60)
                    read_into(pieces)

                inlet._link.read_into = wait  # type: ignore[method-assign]
            waiting = [Task(inlet.receive) for inlet in inlets]
            for _ in inlets:
                assert begun.acquire(timeout=60)
        finally:
            child.kill()
            child.wait()
            assert child.stdin is not None
            child.stdin.close()
        killed.set()
        for task in waiting:
            with pytest.raises(Lost, match="rank 0 has gone without saying goodbye"):
                task.result(1.0)
    assert not list(tmp_path.iterdir())
    assert not list(Path("/dev/shm").glob("*decoupled-ring*"))
