"""Real processes: every method gives the simulator's bits, and whatever is done to them, nobody hangs or stays."""

import contextlib
import itertools
import os
import random
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from torch.nn import functional as F

from decoupled import Trainer
from decoupled.cli import main
from decoupled.errors import OperationError, PeerLost, UserError
from decoupled.runtime import launch
from decoupled.runtime.control import Beats, Control
from decoupled.runtime.line import Line
from decoupled.runtime.processes import Processes
from decoupled.testing import OPTIMIZERS, Case, label, point, variants

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).resolve().parents[2]
CASE = Case(widths=(4, 5, 3, 4, 5, 3), cuts=(1, 2, 4), sizes=(6,) * 7 + (5,))
FIXED = [spec for spec in variants() if point(spec).fixed]


@pytest.fixture(scope="module")
def pool():
    """Processes that outlive a trainer: starting them takes longer than most tests."""
    made = {}

    def of(count):
        if count not in made:
            made[count] = Processes(processes=count, intra_op=1)
        return made[count]

    yield of
    for runtime in made.values():
        runtime.close()


def equal(mine, theirs):
    if isinstance(mine, torch.Tensor):
        return torch.equal(mine, theirs)
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(equal(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, list | tuple):
        return len(mine) == len(theirs) and all(map(equal, mine, theirs))
    return mine == theirs or (mine != mine and theirs != theirs)


def trained(spec, runtime, epochs=2):
    given = {"loss": F.cross_entropy, "optimizer": OPTIMIZERS["momentum"], "runtime": runtime}
    with Trainer(CASE.blocks(), spec, **given) as trainer:
        losses = [row["loss"] for row in trainer.fit(CASE.batches(), epochs)]
        held_out = trainer.evaluate(CASE.batches())
        state = trainer.state_dict()
        counts = [(b.updates, b.samples, b.versions, b.staleness, b.bytes_up, b.bytes_down, b.peak_held_bytes)
                  for b in trainer.statistics()]  # fmt: skip
    assert equal(state, trainer.state_dict()), "closing changed the state"
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    return {"losses": losses, "held out": held_out, "state": state, "counts": counts, "weights": weights}


def check_equal(spec, runtime):
    mine, theirs = trained(spec, runtime), trained(spec, "simulated")
    assert [key for key in theirs if not equal(mine[key], theirs[key])] == []


@pytest.mark.costly
@pytest.mark.parametrize("spec", FIXED, ids=label)
def test_two_processes_equal_the_simulator(spec, pool):
    """Weights, optimizer states, generators, history, statistics: bit for bit."""
    check_equal(spec, pool(2))


LOSSY = [spec for spec in variants() if point(spec).coupling.lossy]


@pytest.mark.parametrize("spec", LOSSY, ids=label)
def test_blocks_that_wait_for_nobody_end_and_their_counts_come_home(spec, pool):
    """No two runs need to be equal; every batch of the first block is met, and the intakes' counts are the blocks'."""
    given = {"loss": F.cross_entropy, "optimizer": OPTIMIZERS["momentum"], "runtime": pool(2)}
    with Trainer(CASE.blocks(), spec, **given) as trainer:
        trainer.fit(CASE.batches(), 3)
        blocks = trainer.statistics()
    assert blocks[0].updates == 3 * len(CASE.sizes)
    for below, block in itertools.pairwise(blocks):
        assert block.updates == below.updates - block.dropped + block.reused
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_idling_between_runs_is_no_stall():
    """It was: finished actors "wait", and after `patience` seconds the edges kept for the next run were closed."""
    with contextlib.closing(Processes(processes=2, intra_op=1, patience=0.2)) as runtime:
        given = {"loss": F.cross_entropy, "optimizer": OPTIMIZERS["sgd"], "runtime": runtime}
        with Trainer(CASE.blocks(), "pipedream", **given) as trainer:
            trainer.fit(CASE.batches())
            assert not runtime.start().wait_lost(1.5)  # the monitor looks many times meanwhile
            assert len(trainer.fit(CASE.batches())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("spec", FIXED, ids=label)
def test_more_processes_equal_the_simulator(spec, count, pool):
    check_equal(spec, pool(count))


def test_a_run_goes_on_bit_for_bit_from_a_saved_state(pool):
    spec = "pipedream"
    given = {"loss": F.cross_entropy, "optimizer": OPTIMIZERS["momentum"], "runtime": pool(2)}
    with Trainer(CASE.blocks(), spec, **given) as first:
        first.fit(CASE.batches())
        state = first.state_dict()
    with Trainer(CASE.blocks(), spec, **given) as second:
        second.load_state_dict(state)
        second.fit(CASE.batches())
        assert equal(second.state_dict()["blocks"], trained(spec, "simulated")["state"]["blocks"])


class Failing(nn.Module):
    """Fails at its `n`-th forward in training."""

    def __init__(self, n):
        super().__init__()
        self.n, self.calls = n, 0

    def forward(self, x):
        self.calls += self.training
        if self.calls > self.n:
            raise ArithmeticError(f"call {self.calls}")
        return x


@pytest.mark.parametrize("where", [0, 3])
def test_what_fails_in_one_process_is_raised_in_the_caller_and_the_others_live_on(where, pool):
    blocks = CASE.blocks()
    blocks[where] = nn.Sequential(blocks[where], Failing(4))
    given = {"loss": F.cross_entropy, "optimizer": OPTIMIZERS["sgd"], "runtime": pool(2)}
    with Trainer(blocks, "pipedream", **given) as trainer:
        with pytest.raises(OperationError, match=rf"block{where}, operation F4 \(batch 4\).*ArithmeticError: call 5"):
            trainer.fit(CASE.batches())
    check_equal("pipedream", pool(2))  # the same processes


def test_a_failure_between_runs_is_raised_in_the_caller():
    """An optimizer that cannot be made in the other process: nothing runs, nobody waits."""

    def optimizer(parameters):
        if "DECOUPLED_FOLLOW" in os.environ:
            raise LookupError("not here")
        return torch.optim.SGD(parameters, lr=0.1)

    with Trainer(CASE.blocks(), "pipedream", loss=F.cross_entropy, optimizer=optimizer, runtime="processes") as trainer:
        with pytest.raises(LookupError, match="not here"):
            trainer.fit(CASE.batches())


def test_what_cannot_be_sent_is_named(pool):
    lock = threading.Lock()
    given = {"loss": lambda y, t: F.cross_entropy(y, t) + 0 * lock.locked(), "optimizer": OPTIMIZERS["sgd"]}
    with Trainer(CASE.blocks(), "pipedream", runtime=pool(2), **given) as trainer:
        with pytest.raises(UserError, match=r"cannot be sent to another process.*leave out what cannot be pickled"):
            trainer.fit(CASE.batches())


class TwoArguments(Exception):
    """Pickle makes it anew with one."""

    def __init__(self, what, where):
        super().__init__(f"{what} at {where}")


def test_what_cannot_be_unpickled_there_is_named(pool):
    """It was the other process's TypeError, with no word of sending."""
    kept = TwoArguments("a", "b")
    given = {"loss": lambda y, t: F.cross_entropy(y, t) + 0 * len(kept.args), "optimizer": OPTIMIZERS["sgd"]}
    with Trainer(CASE.blocks(), "pipedream", runtime=pool(2), **given) as trainer:
        message = r"cannot be unpickled there \(TypeError: .*'where'\); leave out what"
        with pytest.raises(UserError, match=message) as caught:
            trainer.fit(CASE.batches())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        ({"name": "processes", "processes": 5}, "5 processes for 4 blocks"),
        ({"name": "processes", "processes": 0}, "processes must be an integer of at least 1, got 0"),
        ({"name": "processes", "heartbeat": -1.0}, r"heartbeat must be a positive number of seconds, got -1\.0"),
        ({"name": "processes", "patience": "long"}, "option 'patience' must be float, got 'long'"),
        ({"name": "processes", "hartbeat": 1.0}, "Did you mean 'heartbeat'"),
        ({"name": "threads", "processes": 2}, "option of runtime 'threads'"),
    ],
)
def test_wrong_settings_are_refused(runtime, message):
    with pytest.raises(UserError, match=message):
        Trainer(CASE.blocks(), "pipedream", loss=F.cross_entropy, optimizer=OPTIMIZERS["sgd"], runtime=runtime)


# --- signals ------------------------------------------------------------------------------------------------------


def followers(leader):
    """Processes that follow `leader`: process number -> a descriptor that becomes readable when it ends."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if parent == leader and b"decoupled.runtime.follow" in (entry / "cmdline").read_bytes():
                    found[int(entry.name)] = os.pidfd_open(int(entry.name))
    return found


def endless():
    while True:
        yield from CASE.batches()


SLACK = 0.5  # seconds for the news to travel and the threads to leave


def strike(signal_number, after, heartbeat, patience):
    """Train on two processes, send a signal to the second one at batch `after`; the error and the seconds it took."""
    struck, seen = [], itertools.count(1)

    def child():
        return runtime._group._children[1].pid

    def on_batch(samples):
        if next(seen) == after:
            struck.append(time.monotonic())
            os.kill(child(), signal_number)

    runtime = Processes(processes=2, intra_op=1, heartbeat=heartbeat)
    given = {"loss": F.cross_entropy, "optimizer": OPTIMIZERS["sgd"], "runtime": runtime, "on_batch": on_batch}
    with Trainer(CASE.blocks(), "pipedream", **given) as trainer:
        with pytest.raises(PeerLost) as caught:
            trainer.fit(endless())
        seconds, pid = time.monotonic() - struck[0], child()
    runtime.close()
    assert seconds < patience, f"it took {seconds:.1f} s"
    assert not Path(f"/proc/{pid}").exists(), "the process is still there"
    return str(caught.value)


def test_a_killed_process_is_reported_at_once():
    text = strike(signal.SIGKILL, 30, heartbeat=10.0, patience=2.0)
    assert "rank 1 (block2, block3; process " in text
    assert "was killed by SIGKILL" in text
    assert "edge block1.up->block2.up, last batch " in text


def test_a_frozen_process_is_reported_within_the_heartbeat_limit():
    text = strike(signal.SIGSTOP, 30, heartbeat=3.0, patience=3.0 + SLACK)
    assert "rank 1 (block2, block3; process " in text
    assert "no sign of life for 3 s" in text
    assert "edge block2.down->block1.down, last batch " in text


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(900)
def test_killed_and_frozen_at_random_batches():
    """50 rounds; every one ends in time with the right name, and nothing is left."""
    draw = random.Random(7)
    before = sorted(os.listdir("/dev/shm"))
    for _ in range(50):
        number, after = draw.choice([signal.SIGKILL, signal.SIGSTOP]), draw.randint(1, 120)
        text = strike(number, after, heartbeat=3.0, patience=2.0 if number == signal.SIGKILL else 3.0 + SLACK)
        assert text.startswith("rank 1 (block2, block3; process "), text
    assert sorted(os.listdir("/dev/shm")) == before


SCRIPT = textwrap.dedent("""
    import sys, time
    import torch
    from torch import nn
    from torch.nn import functional as F
    from decoupled import Trainer

    def endless():
        n = 0
        while True:
            yield torch.randn(8, 4), torch.randint(3, (8,))
            n += 1
            if n == 20:
                print("under way", flush=True)

    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    with Trainer(model, "pipedream", [1, 2, 3], loss=F.cross_entropy, optimizer=torch.optim.SGD,
                 runtime={"name": "processes", "processes": 3}) as trainer:
        trainer.fit(endless())
""")


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGKILL))]
)
def test_nothing_stays_behind_when_rank_0_is_ended(number):
    before = sorted(os.listdir("/dev/shm"))
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "under way\n"
        others = followers(process.pid)
        assert len(others) == 2
        process.send_signal(number)
        try:
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode != 0
    assert ("KeyboardInterrupt" in said) == (number == signal.SIGINT)
    for descriptor in others.values():
        assert select.select([descriptor], [], [], 3.0)[0], "a process is still there"
        os.close(descriptor)
    assert sorted(os.listdir("/dev/shm")) == before


# --- torchrun -----------------------------------------------------------------------------------------------------


def torchrun(ranks, *arguments, timeout=100):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, cwd=ROOT,
    )  # fmt: skip


def reach(store, timeout):
    """What rank 1 does when it has come to the store."""
    group = launch.Group(1, 2, starts=False, follows=False)
    group.store = store
    group._meet = lambda wait: None
    return group.connect(Beats(1.0), timeout, lambda rank, reason: reason, lambda *_: None)


@pytest.mark.parametrize(
    "error", [ConnectionRefusedError("refused"), OSError("the other process does not know the token")]
)
def test_a_rank_that_meets_the_address_from_before_a_restart_waits_for_the_new_one(monkeypatch, error):
    """The launcher's store outlives its processes."""
    store, asked = HashStore(), []
    store.set("hub", "10.0.0.1:7 old")

    def member(rank, world, address, token, *more):
        asked.append((address, token))
        if len(asked) < 3:
            store.set("hub", "10.0.0.2:8 new")
            raise error
        return "the line"

    monkeypatch.setattr(launch, "Member", member)
    monkeypatch.setattr(launch, "_PAUSE", 0.0)
    assert reach(store, 5.0) == ("the line", b"new")
    assert asked == [(("10.0.0.1", 7), b"old"), (("10.0.0.2", 8), b"new"), (("10.0.0.2", 8), b"new")]


def test_a_rank_that_cannot_reach_rank_0_says_so():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    store = HashStore()
    store.set("hub", f"127.0.0.1:{port} secret")
    with pytest.raises(PeerLost, match=rf"^rank 1 cannot reach rank 0 at 127.0.0.1:{port}: .*refused"):
        reach(store, 0.5)


def test_a_call_that_fails_leaves_no_connection_open():
    heard: list[bytes] = []
    ended = threading.Event()

    def pretend():
        connection, _ = server.accept()
        with connection:
            connection.sendall(bytes(64))  # a nonce, and what is not an answer
            while received := connection.recv(64):
                heard.append(received)
            ended.set()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(OSError, match="does not know") as caught:
            Line.call(server.getsockname(), b"token", 5.0)
        assert ended.wait(5.0), "the other end still waits"
        thread.join(5.0)
    assert b"".join(heard)  # it was called
    assert caught.traceback  # which would hold the connection


def test_a_rank_that_rank_0_never_comes_to_says_so():
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(PeerLost, match=r"^rank 1: rank 0 never came within 0.2 s"):
        reach(store, 0.2)


def launched(monkeypatch, rank, **other):
    """The group of a process whose launcher has set the variables, and their port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    given = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **other}
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return launch.Group.find(None), port


def come(group, timeout):
    return group.connect(Beats(1.0), timeout, lambda rank, reason: reason, lambda *_: None)


def test_ranks_of_another_launcher_meet(monkeypatch):
    """`torch.distributed.run` has a store of its own; here rank 0 has it."""
    group, _ = launched(monkeypatch, 0)
    text = "from decoupled.runtime.processes import Processes; Processes().start()"
    with subprocess.Popen([sys.executable, "-c", text], env=os.environ | {"RANK": "1"}, cwd=ROOT) as other:
        hub, _ = come(group, 60.0)
        try:
            assert hub.exchange("start", ("", 0.0, group.me()), 60.0)[1][2][0] == other.pid
        finally:
            hub.close()
            group.end()
    assert other.returncode == 0


def test_a_rank_that_nobody_has_started_is_named(monkeypatch):
    """It was a traceback of torch."""
    group, _ = launched(monkeypatch, 0)
    with pytest.raises(PeerLost, match=r"^rank 1 never came within 0\.3 s; see that all ranks run"):
        come(group, 0.3)
    group.end()


def test_an_address_where_rank_0_is_not_is_named(monkeypatch):
    group, port = launched(monkeypatch, 1)
    with pytest.raises(PeerLost, match=rf"^rank 1 cannot reach rank 0 at 127.0.0.1:{port} within 0.3 s \(Connection"):
        come(group, 0.3)

    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    group, port = launched(monkeypatch, 1, MASTER_ADDR="nowhere.invalid")
    with pytest.raises(PeerLost, match=rf"at nowhere.invalid:{port} within 0.3 s \(Name or service not known\); "):
        come(group, 0.3)


def test_rank_0_that_cannot_listen_says_where(monkeypatch):
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken:
        group, _ = launched(monkeypatch, 0, MASTER_PORT=taken.getsockname()[1])
        with pytest.raises(UserError, match=r"^rank 0 cannot listen at 127.0.0.1:\d+ \(.*address already in use\); "):
            come(group, 5.0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"RANK": "x"}, r"^RANK='x' is not a number; correct it, or unset RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT$"),
        ({"WORLD_SIZE": "-2"}, r"^WORLD_SIZE='-2' is not a number"),
        ({"MASTER_PORT": "http"}, r"^MASTER_PORT='http' is not a number"),
        ({"MASTER_PORT": 70000}, r"^MASTER_PORT=70000 is not a port"),
        ({"RANK": 2}, r"^RANK=2 is not below WORLD_SIZE=2"),
        ({"MASTER_PORT": ""}, r"^there is RANK, WORLD_SIZE, MASTER_ADDR, but not MASTER_PORT; use torchrun, or"),
    ],
)
def test_variables_of_a_launcher_that_cannot_be_are_named(monkeypatch, other, message):
    with pytest.raises(UserError, match=message):
        launched(monkeypatch, 0, **other)
    with pytest.raises(UserError, match=message):
        launch.launched_rank()


def test_a_start_that_fails_leaves_nothing_open(monkeypatch):
    def lost(self, *arguments):
        raise PeerLost("rank 1 did not come")

    before = set(threading.enumerate())
    monkeypatch.setattr(Control, "exchange", lost)
    runtime = Processes(processes=1)
    with pytest.raises(PeerLost, match="did not come"):
        runtime.start()
    started = set(threading.enumerate()) - before
    for thread in started:
        thread.join(5.0)  # told to end; when it gets there is the scheduler's
    assert not {thread.name for thread in started if thread.is_alive()}


def test_the_command_under_torchrun_gives_the_simulators_bits(tmp_path):
    words = ["train", "method=pipedream", "data=digits", "model=mlp", "blocks=[1]", "epochs=1", "batch_size=256"]
    done = torchrun(2, "-m", "decoupled", *words, "runtime=processes", "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1  # rank 0 alone speaks
    assert main([*words, "runtime=simulated", "--quiet", "--out", str(tmp_path / "one")]) == 0
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("one", "two"))
    assert equal(one["blocks"], two["blocks"])


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint_under_torchrun(tmp_path):
    words = [
        "train",
        "method=pipedream",
        "data=digits",
        "model=mlp",
        "blocks=[1]",
        "batch_size=256",
        "schedule=constant",
    ]
    for name, more in (("half", []), ("whole", ["resume=" + str(tmp_path / "half" / "checkpoint.pt")])):
        epochs = f"epochs={1 + len(more)}"
        done = torchrun(2, "-m", "decoupled", *words, *more, epochs, "runtime=processes", "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    assert main([*words, "epochs=2", "runtime=simulated", "--quiet", "--out", str(tmp_path / "one")]) == 0
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("one", "whole"))
    assert equal(one["blocks"], two["blocks"])


BROKEN = textwrap.dedent("""
    import os, sys
    import torch
    from torch import nn
    from torch.nn import functional as F
    from decoupled import Trainer

    class Broken(nn.Module):
        def forward(self, x):
            if self.training:
                raise ArithmeticError("on purpose")
            return x

    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), Broken(), nn.Linear(6, 3))
    batches = [(torch.randn(8, 4), torch.randint(3, (8,)))] * 4
    try:
        with Trainer(model, "pipedream", [1, 2], loss=F.cross_entropy, optimizer=torch.optim.SGD,
                     runtime="processes") as trainer:
            trainer.fit(batches)
    except Exception as error:
        with open(f"{sys.argv[1]}/rank{os.environ['RANK']}", "w") as file:
            file.write(f"{type(error).__name__}: {error}")
        raise
""")


@pytest.mark.slow
def test_a_failure_under_torchrun_reaches_every_rank_and_the_exit_code(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    assert torchrun(3, script, tmp_path).returncode != 0
    said = [(tmp_path / f"rank{rank}").read_text() for rank in range(3)]
    assert all(text.startswith("OperationError: block2, operation F0 (batch 0)") for text in said), said


@pytest.mark.slow
def test_torchrun_needs_the_right_runtime():
    done = torchrun(3, "-m", "decoupled", "train", "method=pipedream", "data=digits", "model=mlp", "blocks=[1]")
    assert "decoupled: torchrun needs runtime=processes, got runtime=threads" in done.stderr
    assert done.returncode != 0


def test_nobody_listens_after_close():
    """Not even until garbage is collected: that could happen in a process forked later, and abort it."""
    runtime = Processes(processes=2)
    with Trainer(
        CASE.blocks()[:2], "backprop", loss=F.mse_loss, optimizer=OPTIMIZERS["sgd"], runtime=runtime
    ) as trainer:
        x = torch.zeros(2, 4, dtype=torch.float64)
        trainer.fit([(x, torch.zeros(2, 3, dtype=torch.float64))])
        port = runtime._group.store.port  # type: ignore[attr-defined]
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    runtime.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
