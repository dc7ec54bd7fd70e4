"""Two hosts on one machine: shaping, the relay, and that training across them gives the simulator's bits."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from decoupled.benchmarks import two_hosts
from decoupled.benchmarks.peers import network as networks
from decoupled.benchmarks.peers import relay, training
from decoupled.benchmarks.peers.network import Link, Network, Unavailable


def namespaces() -> list[str]:
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line.split()[0] for line in done.stdout.splitlines() if line.startswith("decoupled-")]


@pytest.fixture
def network() -> Iterator[Network]:
    try:
        made = Network()
    except Unavailable as error:
        pytest.skip(f"no network namespaces here: {error}")
    with made:
        yield made
    assert not set(made.namespaces) & set(namespaces()), "a namespace was left behind"


@pytest.mark.parametrize(
    ("rate", "delay", "link"),
    [
        (None, None, Link()),
        ("100mbit", "5ms", Link(100.0, 5.0)),
        ("1.5gbit", None, Link(1500.0, 0.0)),
        ("800 kbit", "500us", Link(0.8, 0.5)),
    ],
)
def test_links_are_written_as_for_tc(rate: str | None, delay: str | None, link: Link) -> None:
    assert Link.parse(rate, delay) == link


@pytest.mark.parametrize(("rate", "delay"), [("fast", None), ("100", None), (None, "5"), ("0mbit", None)])
def test_wrong_links_are_refused(rate: str | None, delay: str | None) -> None:
    with pytest.raises(ValueError, match=r"number|positive"):
        Link.parse(rate, delay)


def test_differences_are_of_bits() -> None:
    one = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor(float("nan")), "c": torch.tensor(3)}
    assert two_hosts.differences(one, {name: tensor.clone() for name, tensor in one.items()}) == []
    assert two_hosts.differences(one, one | {"a": torch.tensor([-0.0, 1.0])}) == ["a"]
    assert two_hosts.differences(one, one | {"c": torch.tensor(3.0)}) == ["c"]
    assert two_hosts.differences(one, {"a": one["a"], "b": one["b"], "d": one["c"]}) == ["c", "d"]


def test_leaves_are_found_everywhere() -> None:
    tree = {"weights": [torch.zeros(2), {"bias": torch.ones(1)}], "updates": 3, "name": "sgd", "none": None}
    assert [name for name, _ in training.leaves(tree, "x")] == ["x.weights.0", "x.weights.1.bias", "x.updates"]


def test_without_namespaces_it_says_so_and_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    assert two_hosts.main([]) == two_hosts.SKIP == 77
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "ip and tc not found; install iproute2" in said


def test_the_relay_holds_packets_back_and_keeps_their_order() -> None:
    """Datagram sockets stand in for the interfaces."""
    (a, end_a), (b, end_b) = (socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2))
    control, controller = os.pipe()
    for end in (end_a, end_b):
        end.setblocking(False)
    thread = threading.Thread(target=relay.relay, args=((end_a.fileno(), end_b.fileno()), control))
    thread.start()
    try:
        a.send(b"at once")
        assert b.recv(100) == b"at once"
        os.write(controller, b"50\n")
        while True:  # until the relay has read the new delay
            start = time.monotonic()
            b.send(b"back")
            assert a.recv(100) == b"back"
            if time.monotonic() - start >= 0.05:
                break
        start = time.monotonic()
        for number in range(5):
            a.send(b"%d" % number)
        assert [b.recv(100) for _ in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
        assert time.monotonic() - start >= 0.05
    finally:
        os.close(controller)
        thread.join(10)
        for one in (a, b, end_a, end_b):
            one.close()
        os.close(control)
    assert not thread.is_alive()


def test_what_a_killed_process_left_is_removed(network: Network) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    orphan = f"decoupled-{dead.pid}-0a"
    subprocess.run(["ip", "netns", "add", orphan], check=True)
    with Network() as another:
        left = namespaces()
    assert orphan not in left and {*network.namespaces, *another.namespaces} <= set(left)


def test_tcp_forgets_the_line_that_was(network: Network) -> None:
    try:
        network.shape(Link(100.0, 5.0))
    except Unavailable as error:
        pytest.skip(f"no delays here: {error}")
    for host in (0, 1):
        saved = network.command(host, "cat", "/proc/sys/net/ipv4/tcp_no_metrics_save")
        routes = network.command(host, "ip", "route")
        assert subprocess.run(saved, capture_output=True, text=True, check=True).stdout.strip() == "1"
        told = subprocess.run(routes, capture_output=True, text=True, check=True).stdout.splitlines()
        assert told and all(" ".join(network.control) in route for route in told)


@pytest.mark.slow
def test_rate_and_delay_hold(network: Network) -> None:
    """Round trips take twice the delay, and a stream no less than the rate allows; the other way is as before."""
    server = (
        "import socket; s = socket.create_server(('10.77.0.2', 5000)); print('up', flush=True); c, _ = s.accept()\n"
        "while data := c.recv(1 << 20):\n    c.sendall(b'x') if data[-1:] == b'!' else None"
    )
    client = (
        "import socket, time; c = socket.create_connection(('10.77.0.2', 5000)); times = []\n"
        "for data in [b'!'] * 3 + [bytes((4 << 20) - 1) + b'!']:\n"
        "    start = time.perf_counter(); c.sendall(data); c.recv(1); times.append(time.perf_counter() - start)\n"
        "print(min(times[:3]), times[3])"
    )
    for link in (Link(), Link(100, 0), Link(100, 20), Link()):
        network.shape(link)
        command = network.command(1, sys.executable, "-c", server)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as serving:
            assert serving.stdout is not None and serving.stdout.readline() == "up\n"
            command = network.command(0, sys.executable, "-c", client)
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        trip, stream = map(float, done.stdout.split())
        assert trip >= 2e-3 * link.delay
        if link.rate is not None:
            assert stream >= 0.95 * (4 << 23) / (link.rate * 1e6)
    assert min(network.sent()) > 0


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("link", [Link(), Link(100, 5)], ids=str)
def test_training_across_two_hosts_equals_the_simulator(network: Network, link: Link) -> None:
    network.shape(link)
    before = network.sent()
    found = two_hosts.train_on_two_hosts(network, training.METHODS)
    assert min(b - a for a, b in zip(before, network.sent(), strict=True)) > 100_000, "they did not use the line"
    for method in training.METHODS:
        expected = training.train(method, "simulated")
        assert expected is not None and any("module" in name for name in expected)
        assert two_hosts.differences(found[method], expected) == []


@pytest.mark.slow
def test_what_fails_on_a_host_is_told(network: Network) -> None:
    with pytest.raises(two_hosts.TorchrunError, match="unknown method 'nosuch'"):
        two_hosts.train_on_two_hosts(network, ["nosuch"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_stays_behind(number: signal.Signals, network: Network) -> None:
    words = [sys.executable, "-m", "decoupled.benchmarks.two_hosts", "--rate", "1mbit", "--delay", "1ms"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        mine = f"decoupled-{process.pid}-"
        deadline = time.monotonic() + 60
        while not any(networks._pids(name) for name in namespaces() if name.startswith(mine)):
            assert process.poll() is None and time.monotonic() < deadline
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert not any(name.startswith(mine) for name in namespaces())
