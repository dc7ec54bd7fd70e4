"""The doctor: every check can fail, says what to do, and none can hang or crash the command."""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import shutil
import socket
import sys
import threading
import time
import tomllib
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from decoupled import cli, doctor
from decoupled.doctor import Check, examine, host, launch, network, process, sharing
from decoupled.doctor.finding import Finding, ok, problem, warning

ROOT = Path(__file__).resolve().parents[2]
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: Patch) -> None:
    for name in (*launch.NUMBERS, "MASTER_ADDR", "OMP_NUM_THREADS", network.VARIABLE, "CUDA_MPS_PIPE_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)


def one(findings: Iterable[Finding], check: str) -> Finding:
    (found,) = [finding for finding in findings if finding.check == check]
    assert (found.status == "ok") == (not found.remedy), "what is not ok has a remedy"
    assert "\n" not in found.says + found.remedy
    return found


def ranks(monkeypatch: Patch, **given: object) -> None:
    usual = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 29500}
    for name, value in {**usual, "MASTER_ADDR": "127.0.0.1", **given}.items():
        monkeypatch.setenv(name, str(value))


# --- this host ----------------------------------------------------------------------------------------------------


def test_versions(monkeypatch: Patch) -> None:
    assert [finding.status for finding in host.versions()] == ["ok", "ok"]
    Version = namedtuple("Version", "major minor micro")
    monkeypatch.setattr(sys, "version_info", (*Version(3, 9, 1), "final", 0))
    monkeypatch.setattr(sys, "version", "3.9.1 (main)")
    assert one(host.versions(), "Python").says == "3.9.1 is too old"
    monkeypatch.undo()
    for version, status in {"2.10.1": "problem", "2.11.0+cu130": "ok", "3.0.0a0": "problem", "odd": "problem"}.items():
        monkeypatch.setattr(torch, "__version__", version)
        assert one(host.versions(), "torch").status == status


def test_the_supported_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={host.PYTHON[0]}.{host.PYTHON[1]}"
    assert f"torch>={host.TORCH[0][0]}.{host.TORCH[0][1]},<{host.TORCH[1][0]}" in project["dependencies"]


def gpus(monkeypatch: Patch, count: int, free: float = 70e9, kernels: tuple[str, ...] = ("sm_80", "sm_90")) -> None:
    fake = {
        "is_available": lambda: count > 0, "device_count": lambda: count, "get_device_name": lambda i: "H100",
        "get_device_capability": lambda i: (9, 0), "mem_get_info": lambda i: (free, 80e9),
        "get_arch_list": lambda: list(kernels),
    }  # fmt: skip
    for name, function in fake.items():
        monkeypatch.setattr(torch.cuda, name, function)


@pytest.mark.parametrize(
    ("built", "driver", "status", "says"),
    [
        (None, False, "ok", "none; training runs on the CPU"),
        (None, True, "warning", "torch is built for the CPU only"),
        ("13.0", False, "warning", "none, but torch is built for CUDA 13.0"),
        ("13.0", True, "problem", "cannot use the GPU"),
    ],
)
def test_no_gpu(monkeypatch: Patch, tmp_path: Path, built: str, driver: bool, status: str, says: str) -> None:
    gpus(monkeypatch, 0)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(host, "DRIVER", tmp_path if driver else tmp_path / "none")
    found = one(host.devices(), "GPU")
    assert found.status == status
    assert says in found.says


def test_gpus(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "MPS", tmp_path / "none")
    gpus(monkeypatch, 2)
    found = list(host.devices())
    assert [f.check for f in found] == ["GPU 0", "GPU 1"]
    assert found[0].says == "H100, 65.2 of 74.5 GiB free, capability 9.0"
    gpus(monkeypatch, 1, free=1e9)
    assert "another process holds the rest" in one(host.devices(), "GPU 0").says
    for kernels, status in {
        ("sm_80",): "problem",
        ("compute_80",): "ok",
        ("sm_100",): "problem",
        ("gfx90",): "ok",
    }.items():
        gpus(monkeypatch, 1, kernels=kernels)
        assert one(host.devices(), "GPU 0").status == status
    monkeypatch.setattr(host, "MPS", tmp_path)
    assert one(host.devices(), "GPU MPS").status == "warning"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert "Apple" in one(host.devices(), "GPU").says


def test_ranks_that_share_a_gpu(monkeypatch: Patch) -> None:
    gpus(monkeypatch, 2)
    ranks(monkeypatch, WORLD_SIZE=3, LOCAL_WORLD_SIZE=3)
    found = one(host.devices(), "GPU ranks")
    assert (found.status, found.says) == ("warning", "3 ranks of this host share 2 GPUs")
    ranks(monkeypatch)
    assert not [f for f in host.devices() if f.check == "GPU ranks"]


@pytest.mark.parametrize(
    ("cores", "used", "local", "omp", "status", "says"),
    [
        (8, 8, 1, None, "ok", "8 torch threads on 8 cores"),
        (8, 4, 2, "4", "ok", "in each of 2 ranks, OMP_NUM_THREADS=4"),
        (8, 8, 2, None, "warning", "in each other's way"),
        (8, 16, 1, "16", "warning", "in each other's way"),
        (8, 1, 2, "1", "warning", "cores stay idle"),
        (8, 8, 1, "many", "warning", "OMP_NUM_THREADS='many' is no number"),
        (1, 1, 4, "1", "ok", "1 torch thread on 1 core"),
    ],
)  # fmt: skip
def test_threads(
    monkeypatch: Patch, cores: float, used: int, local: int, omp: str | None, status: str, says: str
) -> None:
    monkeypatch.setattr(host, "cores_available", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: used)
    ranks(monkeypatch, WORLD_SIZE=local, LOCAL_WORLD_SIZE=local)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    found = one(host.threads(), "threads")
    assert found.status == status
    assert says in found.says
    assert status == "ok" or found.remedy == f"export OMP_NUM_THREADS={cores // local}"


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 16), ("250000 100000", 2.5), ("odd", 16)])
def test_cores_are_those_of_the_container(monkeypatch: Patch, tmp_path: Path, quota: str, cores: float) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(16))
    monkeypatch.setattr(host, "CGROUP", tmp_path / "cpu.max")
    assert host.cores_available() == 16
    (tmp_path / "cpu.max").write_text(quota)
    assert host.cores_available() == cores


def test_back_ends(monkeypatch: Patch) -> None:
    gpus(monkeypatch, 0)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    assert [f.status for f in host.backends()] == ["ok"]
    gpus(monkeypatch, 1)
    assert one(host.backends(), "NCCL").status == "warning"
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    assert one(host.backends(), "Gloo").status == "problem"
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(host.nccl, "version", lambda: (2, 28, 3))
    assert one(host.backends(), "NCCL").says == "2.28.3"


def test_disk(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for free, status in {2 << 30: "ok", 1 << 29: "warning", 1 << 20: "problem"}.items():
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert one(host.disk(), "disk").status == status
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written to" in one(host.disk(), "disk").says


# --- the network --------------------------------------------------------------------------------------------------

HOME = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.2"], "eth1": []}


def test_addresses_are_those_of_the_system() -> None:
    assert "127.0.0.1" in network.addresses()["lo"]
    assert one(network.interfaces(), "interfaces").status in ("ok", "warning")


def test_interfaces(monkeypatch: Patch) -> None:
    for found, status in ((HOME, "ok"), ({"lo": ["127.0.0.1"]}, "warning"), ({"lo": []}, "problem")):
        monkeypatch.setattr(network, "addresses", lambda found=found: found)
        assert one(network.interfaces(), "interfaces").status == status


@pytest.mark.parametrize(
    ("meant", "hosts", "status", "says"),
    [
        ("10.0.0.2", 2, "ok", "box is 10.0.0.2"),
        ("127.0.1.1", 1, "warning", "which means another host to every other host"),
        ("127.0.1.1", 2, "problem", "which means another host to every other host"),
        ("10.9.9.9", 1, "problem", "which is no address of this host"),
        (None, 1, "warning", "box does not resolve"),
        (None, 2, "problem", "box does not resolve"),
    ],
)
def test_host_name(monkeypatch: Patch, meant: str | None, hosts: int, status: str, says: str) -> None:
    def resolve(name: str, *_: object) -> list[Any]:
        if meant is None:
            raise socket.gaierror(-2, "Name or service not known")
        return [(0, 0, 0, "", (meant, 0))]

    monkeypatch.setattr(network, "addresses", lambda: HOME)
    monkeypatch.setattr(socket, "gethostname", lambda: "box")
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    if hosts > 1:
        ranks(monkeypatch, WORLD_SIZE=2 * hosts)
    found = one(network.host_name(), "host name")
    assert found.status == status
    assert says in found.says
    assert status == "ok" or "export GLOO_SOCKET_IFNAME=eth0" in found.remedy


@pytest.mark.parametrize(
    ("chosen", "hosts", "status", "says"),
    [
        ("eth0", 2, "ok", "GLOO_SOCKET_IFNAME=eth0: 10.0.0.2"),
        ("lo", 1, "ok", "127.0.0.1"),
        ("lo", 2, "problem", "other hosts cannot call loopback"),
        ("wlan0", 1, "problem", "wlan0 is no interface"),
        ("eth1", 1, "problem", "eth1 has no address"),
    ],
)
def test_a_chosen_interface(monkeypatch: Patch, chosen: str, hosts: int, status: str, says: str) -> None:
    monkeypatch.setattr(network, "addresses", lambda: HOME)
    monkeypatch.setenv(network.VARIABLE, chosen)
    ranks(monkeypatch, WORLD_SIZE=2 * hosts)
    found = one(network.host_name(), "host name")
    assert found.status == status
    assert says in found.says


def test_gloo_talks_between_two_real_processes(monkeypatch: Patch) -> None:
    monkeypatch.setattr(network, "LIMIT", 60.0)
    found = one(network.gloo(), "gloo")
    assert found.status == "ok"
    assert re.search(r"loopback [\d.]+ ms, interface [\d.]+ ms", found.says)


def script(monkeypatch: Patch, tmp_path: Path, text: str) -> None:
    """Other children than the real ones."""
    path = tmp_path / "child.py"
    path.write_text(f"import sys, json, threading\n{text}\n")
    monkeypatch.setattr(process, "CHILD", path)


@pytest.mark.slow
def test_gloo_on_an_interface_that_is_not_there(monkeypatch: Patch) -> None:
    monkeypatch.setattr(network, "LIMIT", 60.0)
    monkeypatch.setenv(network.VARIABLE, "nowhere0")
    found = one(network.gloo(), "gloo")
    assert found.status == "problem"
    assert found.says.startswith("two processes, interface: process ended with 1: RuntimeError: ")
    assert "nowhere0" in found.says and "enforce" not in found.says
    assert f"export {network.VARIABLE}=" in found.remedy


STAGE = "print(json.dumps({'stage': 'loopback'}), flush=True)"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("threading.Event().wait()", "start: no answer within 1.5 s"),
        (f"{STAGE}; threading.Event().wait()", "loopback: no answer within 2.5 s"),
        (f"{STAGE}; sys.exit('refused')", "loopback: process ended with 1: refused"),
        ("print(json.dumps({'stage': 'loopback', 'right': False, 'seconds': 1}))", "loopback: other bytes arrived"),
    ],
    ids=["silent", "stuck", "crashed", "wrong"],
)  # fmt: skip
def test_gloo_that_fails(monkeypatch: Patch, tmp_path: Path, text: str, says: str) -> None:
    script(monkeypatch, tmp_path, text)
    monkeypatch.setattr(network, "LIMIT", 2.5)
    monkeypatch.setattr(network, "START", 1.5 if "start" in says else 60.0)
    found = one(network.gloo(), "gloo")
    assert found.status == "problem"
    assert says in found.says


def test_gloo_has_its_time_from_when_torch_is_imported(monkeypatch: Patch, tmp_path: Path) -> None:
    """A busy machine takes 9 s for that, and was told that Gloo gave no answer within 11 s."""
    stages = [json.dumps({"stage": stage, "right": True, "seconds": 0}) for stage in ("loopback", "interface")]
    script(monkeypatch, tmp_path, f"threading.Event().wait(3); print(*{stages}, sep='\\n')")
    monkeypatch.setattr(network, "LIMIT", 2.5)
    assert one(network.gloo(), "gloo").status == "ok"


def test_children_end_with_the_check_and_by_themselves() -> None:
    with process.child(30.0, "clock") as child:
        assert child.poll() is None
    assert child.returncode == -9
    with process.child(0.2, "clock") as child:
        assert child.wait(timeout=10) == -14, "by the alarm"


def test_children_import_only_what_they_need() -> None:
    tree = ast.parse(process.CHILD.read_text())
    modules = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    assert {name for name in modules if name.split(".")[0] not in sys.stdlib_module_names} == {
        "torch", "torch.distributed",
    }  # fmt: skip


# --- what processes share -----------------------------------------------------------------------------------------


def test_shared_memory(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(sharing, "SHM", tmp_path)
    assert one(sharing.memory(), "shared memory").status == "ok"
    small = SimpleNamespace(f_bavail=16, f_blocks=64, f_frsize=1 << 20)
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    found = one(sharing.memory(), "shared memory")
    assert found.status == "warning"
    assert "16 of 64 MiB free" in found.says and "--shm-size" in found.remedy
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert one(sharing.memory(), "shared memory").status == "problem"
    monkeypatch.undo()
    monkeypatch.setattr(sharing, "SHM", tmp_path / "none")
    assert one(sharing.memory(), "shared memory").status == "warning"


def test_mapping(monkeypatch: Patch, tmp_path: Path) -> None:
    assert one(sharing.mapping(), "mapping").status == "ok"
    monkeypatch.setattr(sharing, "LIMIT", 0.5)
    script(monkeypatch, tmp_path, "threading.Event().wait()")
    assert one(sharing.mapping(), "mapping").says == "another process cannot use a shared mapping (timed out)"
    quiet = "import socket; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[3].replace('@', chr(0))); s.recv(1)"
    script(monkeypatch, tmp_path, quiet)
    monkeypatch.setattr(sharing, "LIMIT", 4.0)
    assert "does not arrive (b'ping" in one(sharing.mapping(), "mapping").says

    def forbidden(name: str) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", forbidden)
    found = one(sharing.mapping(), "mapping")
    assert (found.status, "Operation not permitted" in found.says) == ("problem", True)
    monkeypatch.delattr(os, "memfd_create")
    assert one(sharing.mapping(), "mapping").status == "warning"


def test_limits(monkeypatch: Patch, tmp_path: Path) -> None:
    given = {resource.RLIMIT_NOFILE: (256, 4096), resource.RLIMIT_MEMLOCK: (8 << 20, 8 << 20)}
    monkeypatch.setattr(resource, "getrlimit", given.get)
    monkeypatch.setattr(sharing, "INFINIBAND", tmp_path / "none")
    assert one(sharing.limits(), "open files").remedy == "ulimit -n 4096"
    assert one(sharing.limits(), "locked memory").status == "ok"
    monkeypatch.setattr(sharing, "INFINIBAND", tmp_path)
    assert one(sharing.limits(), "locked memory").status == "warning"
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: unlimited)
    assert {f.says for f in sharing.limits()} == {"no limit"}


def test_clock(monkeypatch: Patch, tmp_path: Path) -> None:
    assert one(sharing.clock(), "clock").status == "ok"
    late = "import time\nfor _ in sys.stdin: print(time.perf_counter() - 2, flush=True)"
    script(monkeypatch, tmp_path, late)
    found = one(sharing.clock(), "clock")
    assert found.status == "warning"
    assert re.match(r"another process's clock is -(2\.0|1\.9)\d+ s off", found.says)
    coarse = SimpleNamespace(resolution=0.015)
    monkeypatch.setattr(time, "get_clock_info", lambda name: coarse)
    assert "steps of 0.015 s" in next(iter(sharing.clock())).says


# --- torchrun -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"RANK": 2, "LOCAL_RANK": 0}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"LOCAL_RANK": 2, "RANK": 1}, "LOCAL_RANK=2 is not below LOCAL_WORLD_SIZE=2"),
        ({"RANK": 0}, "LOCAL_RANK=1 is more than RANK=0"),
        ({"LOCAL_WORLD_SIZE": 4}, "LOCAL_WORLD_SIZE=4 is more than WORLD_SIZE=2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two': no number"),
        ({"MASTER_PORT": 70000}, "MASTER_PORT=70000 is no port"),
        ({"MASTER_ADDR": ""}, "set, but not MASTER_ADDR"),
        ({"WORLD_SIZE": 4}, "on several hosts, but MASTER_ADDR=127.0.0.1 is this host"),
    ],
)
def test_torchrun_variables(monkeypatch: Patch, given: dict[str, object], says: str) -> None:
    ranks(monkeypatch, **given)
    found = one(launch.torchrun(), "torchrun")
    assert found.status == "problem"
    assert says in found.says


def test_torchrun_or_not(monkeypatch: Patch) -> None:
    assert one(launch.torchrun(), "torchrun").says == "not started by it: one process"
    ranks(monkeypatch)
    assert one(launch.torchrun(), "torchrun").says == "rank 1 of 2, 2 on this host, meeting at 127.0.0.1:29500"

    def resolve(*_: object) -> list[Any]:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert "MASTER_ADDR=127.0.0.1 does not resolve" in one(launch.torchrun(), "torchrun").says


# --- the command --------------------------------------------------------------------------------------------------


@contextmanager
def checks(monkeypatch: Patch, *looks: Callable[[], Iterable[Finding]]) -> Iterator[None]:
    made = tuple(Check(f"check {i}", look, limit=5.0, every_rank=i == 0) for i, look in enumerate(looks))
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "CHECKS", made)
        yield


def test_a_check_that_fails_is_a_line() -> None:
    def fails() -> Iterator[Finding]:
        yield ok("first", "fine")
        raise OSError("no such thing\nat all")

    found = examine([Check("broken", fails), Check("fine", lambda: [ok("second", "fine")])])
    assert [(f.check, f.status) for f in found] == [("first", "ok"), ("broken", "problem"), ("second", "ok")]
    assert found[1].says == "could not be looked at (OSError: no such thing)"


def test_a_check_that_hangs_is_a_line() -> None:
    def hangs() -> Iterator[Finding]:
        yield ok("first", "fine")
        threading.Event().wait()

    found = examine([Check("stuck", hangs, limit=0.1), Check("fine", lambda: [ok("second", "fine")])])
    assert [(f.check, f.status) for f in found] == [("first", "ok"), ("stuck", "problem"), ("second", "ok")]
    assert found[1].says == "no answer within 0.1 s"


def test_the_exit_code_is_that_of_the_worst(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    good, poor, bad = ok("a", "fine"), warning("b", "slow", "wait"), problem("c", "broken", "mend it")
    with checks(monkeypatch, lambda: [good], lambda: [poor]):
        assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 ok, 1 warning, 0 problems"
    with checks(monkeypatch, lambda: [good, poor], lambda: [bad]):
        assert cli.main(["doctor"]) == 1
        caught = capsys.readouterr()
        assert "-> mend it" in caught.out
        assert caught.err == "decoupled: to be mended: c\n"
        assert cli.main(["doctor", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert list(told) == ["version", "status", "findings"]
    assert told["status"] == "problem"
    assert told["findings"][1] == {"check": "b", "status": "warning", "says": "slow", "remedy": "wait"}
    with checks(monkeypatch, lambda: [poor], lambda: [bad]):  # another rank of the host looks and tells less
        ranks(monkeypatch)
        assert cli.main(["doctor"]) == 0
        caught = capsys.readouterr().out
        assert "slow" in caught and "problems" not in caught


def test_the_whole_command_is_quick_and_narrow(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    began = time.monotonic()
    code = cli.main(["doctor"])
    assert time.monotonic() - began < network.START  # most of it is the import of torch, by two at once
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert code == (0 if "0 problems" in text else 1)
    rows = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    names = [name for name in rows if name and not name.startswith("GPU")]
    wanted = ["Python", "torch", "threads", "NCCL", "interfaces", "host name", "gloo", "shared memory", "mapping"]
    assert names == [*wanted, "open files", "locked memory", "clock", "torchrun", "disk"]
    assert all(a.limit <= (72 if a.name == "gloo" else 12) for a in doctor.CHECKS)
