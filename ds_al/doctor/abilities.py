"""Features that work or do not work on this machine, and the reasons."""

from __future__ import annotations

import importlib.util
import socket
from typing import Any

from ds_al.doctor.finding import Finding
from ds_al.doctor.machine import compiler, cores

LAUNCHER_PORT = 29500
"""Default rendezvous port, unless ``--master_port`` of the ``deepspeed`` launcher sets another."""


def abilities(accelerator: Any, torch: Any) -> list[Finding]:
    """Returns the findings on the features that work or do not work here."""
    group, on_cpu = "works here", accelerator.device_name() == "cpu"
    streaming = (
        streaming_on_cores(cores(), torch.get_num_threads())
        if on_cpu
        else streaming_on_devices(accelerator.device_name(), accelerator.device_count())
    )
    gpus, has_nccl = torch.cuda.device_count(), torch.distributed.is_nccl_available()
    if has_nccl and gpus:
        nccl = Finding(group, "NCCL", f"{gpus} GPU{'s' * (gpus > 1)}")
    else:
        why = "no GPU was found" if has_nccl else "this build of PyTorch has none"
        nccl = Finding(group, "NCCL", "no", "no", f"{why}: ranks on CPU talk over gloo")
    return [
        streaming,
        nccl,
        _precision_row("fp16", accelerator.is_fp16_supported(), accelerator),
        _precision_row("bf16", accelerator.is_bf16_supported(), accelerator),
        Finding(group, "ZeRO", "stage 1", remark="over the data parallel replicas of each stage; 2 and 3 are refused"),
        _compile_row(on_cpu),
        port_row(LAUNCHER_PORT),
    ]


def streaming_on_cores(cores: int, threads: int) -> Finding:
    """Returns how many stages can compute concurrently on ``cores`` with ``threads`` each."""
    group, item, side_by_side = "works here", "streaming", cores // threads
    if side_by_side > 1:
        value = f"up to {side_by_side} ranks at once"
        each = f"{threads} thread{'s' * (threads > 1)}"
        remark = f"{cores} cores, {each} per rank. More ranks train too, but take turns"
        return Finding(group, item, value, remark=remark)
    if cores > 1:
        remark = f"2 ranks x {threads} threads on {cores} cores: set OMP_NUM_THREADS={cores // 2} or less"
    else:
        remark = "any number of ranks trains, but they share one core: nothing is gained in time"
    return Finding(group, item, "ranks take turns", "limited", remark)


def streaming_on_devices(name: str, devices: int) -> Finding:
    """Returns how many stages can compute concurrently on ``devices`` accelerators, one rank each."""
    group, item = "works here", "streaming"
    if devices > 1:
        return Finding(group, item, f"up to {devices} ranks", remark="one per device")
    return Finding(group, item, "1 rank", "limited", f"one {name} device: for more ranks set DS_ACCELERATOR=cpu")


def _precision_row(item: str, supported: bool, accelerator: Any) -> Finding:
    group, block = "works here", f'{{"{item}": {{"enabled": true}}}}'
    if supported:
        return Finding(group, item, "yes", remark=f"by {block}, with float32 masters")
    return Finding(group, item, "no", "no", f"DeepSpeed's accelerator {accelerator.device_name()!r} has none of it")


def _compile_row(on_cpu: bool) -> Finding:
    group, item = "works here", "torch.compile"
    if not compiler():
        return Finding(group, item, "no", "no", "needs a C++ compiler: install g++, or set CXX")
    if not on_cpu and importlib.util.find_spec("triton") is None:
        return Finding(group, item, "no", "no", "needs triton: install it")
    return Finding(group, item, "yes", remark='by "associated_learning": {"compile": {}}')


def port_row(port: int) -> Finding:
    """Returns whether ``port`` is free. The port is bound for a moment, without listening."""
    item = f"port {port}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            remark = "the launcher's default port is taken: give another by --master_port, or make PORT=..."
            return Finding("works here", item, "in use", "limited", remark)
    return Finding("works here", item, "free", remark="the launcher's default")
