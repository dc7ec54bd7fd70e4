"""This host: versions, devices, processor threads, the back ends of torch.distributed, disk space."""

from __future__ import annotations

import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.cuda import nccl

from decoupled.doctor.finding import Finding, ok, problem, warning
from decoupled.doctor.launch import local_ranks
from decoupled.errors import first_line

PYTHON = (3, 11)  # at least
TORCH = ((2, 11), (3, 0))  # at least, below
GIB = 1 << 30
CGROUP = Path("/sys/fs/cgroup/cpu.max")
DRIVER = Path("/dev/nvidiactl")
MPS = Path("/tmp/nvidia-mps/control")  # of NVIDIA's multi-process service


def versions() -> Iterator[Finding]:
    """Python and torch are of the supported range."""
    python = sys.version_info[:2]
    least = ".".join(map(str, PYTHON))
    if python >= PYTHON:
        yield ok("Python", sys.version.split()[0])
    else:
        yield problem("Python", f"{sys.version.split()[0]} is too old", f"install Python {least} or later")
    match = re.match(r"(\d+)\.(\d+)", torch.__version__)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    low, high = TORCH
    if low <= version < high:
        yield ok("torch", str(torch.__version__))
    else:
        wanted = f"torch>={low[0]}.{low[1]},<{high[0]}"
        yield problem("torch", f"{torch.__version__} is not supported", f"pip install '{wanted}'")


def devices() -> Iterator[Finding]:
    """The GPUs can be used, and no two ranks share one."""
    with warnings.catch_warnings(record=True) as caught:  # a broken driver is told about in a warning
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    built = torch.version.cuda or torch.version.hip
    if torch.backends.mps.is_available():
        yield ok("GPU", "Apple GPU: used with devices=['mps'], never by itself")
    if not there:
        why = f" ({first_line(caught[0].message)})" if caught and isinstance(caught[0].message, Warning) else ""
        if built and DRIVER.exists():
            remedy = "look at nvidia-smi, the driver's version and CUDA_VISIBLE_DEVICES; until then the CPU is used"
            yield problem("GPU", f"torch is built for CUDA {built} and cannot use the GPU{why}", remedy)
        elif built:
            remedy = "nothing, if there is none; else look at nvidia-smi and CUDA_VISIBLE_DEVICES"
            yield warning("GPU", f"none, but torch is built for CUDA {built}{why}", remedy)
        elif DRIVER.exists():
            yield warning("GPU", "there is one, but torch is built for the CPU only", "install torch with CUDA")
        else:
            yield ok("GPU", "none; training runs on the CPU")
        return
    count = torch.cuda.device_count()
    for i in range(count):
        yield _gpu(i)
    if local_ranks() > count:
        says = f"{local_ranks()} ranks of this host share {count} GPU{'s' * (count > 1)}"
        remedy = (
            "they take turns there, and NCCL, which DistributedDataParallel needs, refuses them: "
            f"start at most {count} (--nproc-per-node), with several blocks each"
        )
        yield warning("GPU ranks", says, remedy)
    if "CUDA_MPS_PIPE_DIRECTORY" in os.environ or MPS.exists():
        says = "NVIDIA's multi-process service (MPS) runs: a fault of one process hits all on that GPU"
        yield warning("GPU MPS", says, "stop it (echo quit | nvidia-cuda-mps-control) unless you need it")


def _gpu(i: int) -> Finding:
    name = f"GPU {i}"
    major, minor = torch.cuda.get_device_capability(i)
    free, total = torch.cuda.mem_get_info(i)
    model = torch.cuda.get_device_name(i)
    says = f"{model}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, capability {major}.{minor}"
    kernels = torch.cuda.get_arch_list()
    if kernels and not any(_runs(kernel, major, minor) for kernel in kernels):
        return problem(
            name, f"{says}; torch has no kernels for it ({', '.join(kernels)})", "install another torch build"
        )
    if free < 0.1 * total:
        return warning(name, f"{says}: another process holds the rest", "stop it (nvidia-smi), or choose another GPU")
    return ok(name, says)


def _runs(kernel: str, major: int, minor: int) -> bool:
    """Whether a kernel (`sm_80`: machine code, `compute_80`: to be compiled) runs on this capability."""
    match = re.match(r"(sm|compute)_(\d+)(\d)", kernel)
    if not match:
        return True  # of another maker: no opinion
    built = int(match[2]), int(match[3])
    return built <= (major, minor) and (match[1] == "compute" or built[0] == major)


def threads() -> Iterator[Finding]:
    """As many torch threads as there are cores for this rank."""
    cores, ranks, used = cores_available(), local_ranks(), torch.get_num_threads()
    given = os.environ.get("OMP_NUM_THREADS")
    says = f"{used} torch thread{'s' * (used != 1)} on {cores:g} core{'s' * (cores != 1)}"
    says += f" in each of {ranks} ranks" if ranks > 1 else ""
    says += f", OMP_NUM_THREADS={given}" if given is not None else ""
    better = f"export OMP_NUM_THREADS={max(1, int(cores / ranks))}"
    if given is not None and not re.fullmatch(r"\s*[1-9]\d*(\s*,\s*[1-9]\d*)*\s*", given):
        yield warning("threads", f"OMP_NUM_THREADS={given!r} is no number", better)
    elif used * ranks > max(1.0, cores) * 1.01 and used > 1:
        yield warning("threads", f"{says}: they get in each other's way", better)
    elif ranks > 1 and 2 * used * ranks <= cores:
        yield warning("threads", f"{says}: cores stay idle (torchrun sets 1 thread)", better)
    else:
        yield ok("threads", says)


def cores_available() -> float:
    """Cores this process may use: its affinity, or the quota of its container if that is less."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        quota, period = CGROUP.read_text(encoding="ascii").split()
        return cores if quota == "max" else min(cores, int(quota) / int(period))
    except (OSError, ValueError):
        return cores


def backends() -> Iterator[Finding]:
    """Gloo is there, and NCCL where GPUs are."""
    if not dist.is_available() or not dist.is_gloo_available():
        remedy = "install a torch build with Gloo; runtime=threads works without"
        yield problem("Gloo", "not in this torch: no training over several processes", remedy)
    if dist.is_available() and dist.is_nccl_available():
        version = ".".join(map(str, nccl.version())) if torch.cuda.is_available() else "unused: no GPU"
        yield ok("NCCL", version)
    elif torch.cuda.is_available():
        remedy = "install a torch build with NCCL for several GPUs in several processes"
        yield warning("NCCL", "not in this torch: between processes GPU tensors go through the CPU", remedy)
    else:
        yield ok("NCCL", "not in this torch; needed for GPUs only")


def disk() -> Iterator[Finding]:
    """There is room for checkpoints in the working directory."""
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    says = f"{free / GIB:.1f} GiB free in {here}"
    if not os.access(here, os.W_OK):
        yield problem("disk", f"{here} cannot be written to", "go to another directory, or give --out")
    elif free < GIB / 10:
        yield problem("disk", f"{says}: no room for checkpoints", "make room, or give --out on another disk")
    elif free < GIB:
        yield warning("disk", f"{says}: room for few checkpoints", "make room, or give --out on another disk")
    else:
        yield ok("disk", says)
