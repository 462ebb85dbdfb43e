"""Findings on the machine and its tools: devices, cores, memory, compiler."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ds_al.doctor.finding import Finding
from ds_al.system import extensions


def machine(accelerator: Any) -> list[Finding]:
    """Returns the findings on accelerator, communication and hardware."""
    import torch

    group, name = "machine", accelerator.device_name()
    chosen = "DS_ACCELERATOR" if os.environ.get("DS_ACCELERATOR") else "found by DeepSpeed"
    rows = [
        Finding(group, "accelerator", name, remark=chosen),
        _backend_row(accelerator.communication_backend_name()),
        *_device_rows(accelerator),
        Finding(group, "cores", str(cores()), remark=f"of {os.cpu_count()} in the machine"),
        Finding(group, "memory", _gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))),
    ]
    threads, setting = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    remark = f"OMP_NUM_THREADS={setting}" if setting else "OMP_NUM_THREADS is not set: every rank takes as many"
    return [*rows, Finding(group, "torch threads", f"{threads} per process", remark=remark)]


def cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _backend_row(backend: str) -> Finding:
    from torch import distributed

    checks: dict[str, Callable[[], bool]] = {
        "nccl": distributed.is_nccl_available,
        "gloo": distributed.is_gloo_available,
    }
    if not distributed.is_available() or not checks.get(backend, lambda: True)():
        remark = f"this build of PyTorch has no {backend}: install one that has"
        return Finding("machine", "communication", backend, "no", remark, essential=True)
    return Finding("machine", "communication", backend)


def _device_rows(accelerator: Any) -> Iterator[Finding]:
    if accelerator.device_name() == "cpu":
        yield Finding("machine", "device", _processor())
        return
    for index in range(accelerator.device_count()):
        name = accelerator.device_name(index)
        if name.startswith("cuda"):
            import torch

            name = f"{name} {torch.cuda.get_device_name(index)}"
        yield Finding("machine", "device", f"{name}, {_gib(accelerator.total_memory(index))}")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def tools() -> list[Finding]:
    """Returns the findings on compiler, ninja and numactl on PATH."""
    cxx, ninja, numactl = compiler(), shutil.which("ninja"), shutil.which("numactl")
    missing_ninja = "not on PATH: activate the environment that holds it, or install ninja"
    missing_numactl = "the launcher's --bind_cores_to_rank fails without it: leave that out, or install numactl"
    return [
        Finding("tools", "C++ compiler", cxx)
        if cxx
        else Finding("tools", "C++ compiler", "none", "limited", "install g++, or set CXX"),
        Finding("tools", "ninja", ninja) if ninja else Finding("tools", "ninja", "none", "limited", missing_ninja),
        Finding("tools", "numactl", numactl)
        if numactl
        else Finding("tools", "numactl", "none", "limited", missing_numactl),
    ]


def compiler() -> str | None:
    """Returns the path of the C++ compiler that builds PyTorch's extensions, if there is one."""
    return shutil.which(os.environ.get("CXX") or "c++")


def compilation(accelerator: Any) -> list[Finding]:
    """Returns whether the shared-memory op, which DeepSpeed loads at every start on CPU, is or can be built."""
    if accelerator.device_name() != "cpu" or sys.platform != "linux":
        return []
    item, name = "shared-memory op", extensions.SHARED_MEMORY
    if not shutil.which("ninja"):
        remark = "DeepSpeed does not start on CPU without ninja, even if the op is compiled: see ninja"
        return [Finding("tools", item, "cannot be loaded", "no", remark, essential=True)]
    locks = [extensions.folder_of(each) / "lock" for each in (name, extensions.FUSED_ADAM)]
    for lock in (lock for lock in locks if lock.exists()):
        remark = f"left by a killed compilation, for which DeepSpeed waits: remove {lock}"
        if extensions.is_held(lock):
            remark = "another process compiles it"
        return [Finding("tools", lock.parent.name, "locked", "limited", remark)]
    if extensions.is_compiled(name):
        return [Finding("tools", item, "compiled", remark="as long as TORCH_EXTENSIONS_DIR stays the same")]
    if not compiler():
        remark = "no compiler: DeepSpeed does not start on CPU. Install g++, or set CXX"
        return [Finding("tools", item, "cannot be compiled", "no", remark, essential=True)]
    remark = "DeepSpeed's shared-memory op compiles at the first start, about 20-35 s, once"
    return [Finding("tools", item, "not compiled yet", remark=remark)]
