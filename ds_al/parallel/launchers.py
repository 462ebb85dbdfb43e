"""What launchers tell a process by environment variables, and which of its ancestors are launchers.

=====================================  ==========================================================
``deepspeed``, torchrun, by hand       ``RANK`` and ``WORLD_SIZE``
``srun``                               ``SLURM_PROCID`` of ``SLURM_STEP_NUM_TASKS``
``mpirun`` on one machine              ``OMPI_COMM_WORLD_RANK``, or ``PMI_RANK``
``mpirun`` on several machines         left to DeepSpeed, which asks mpi4py
=====================================  ==========================================================

Any other variable, such as ``MASTER_PORT`` in a shell or ``SLURM_PROCID`` in a batch script, launches nothing: the
process is then a world of one rank.
"""

from __future__ import annotations

import base64
import json
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from ds_al.errors import ALConfigError

PORT = 29500
"""Port of the first rank where no launcher chooses one, as of torch and DeepSpeed."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Addresses of a first rank on the host of all others."""

_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)  # rank, size, local rank, local size: of Open MPI, and of MPICH and its kin
_PROGRAMS = re.compile(
    r"deepspeed\.launcher\.(runner|launch)|torch\.distributed\.(run|launch)|bin/(deepspeed|ds|torchrun|accelerate)\b"
    r"|\b(mpirun|mpiexec|orterun|prterun|orted|prted|hydra_pmi_proxy|slurmstepd)\b"
)


def launched(environment: Mapping[str, str], *, port: int = PORT) -> dict[str, str]:
    """Returns the variables that DeepSpeed needs and this process does not have.

    Args:
        environment: variables of the process.
        port: port of the first rank where no launcher chooses one.

    Raises:
        ALConfigError: ranks were started by hand on several hosts, without ``LOCAL_RANK``.
    """
    if {"RANK", "WORLD_SIZE"} <= environment.keys():
        address = environment.get("MASTER_ADDR", "127.0.0.1")
        if "LOCAL_RANK" not in environment and address not in LOOPBACK:
            raise ALConfigError(
                f"RANK and WORLD_SIZE are set, for a first rank at {address}, and LOCAL_RANK is not: set it to the "
                "number of this rank on its own host, from 0"
            )
        needed = {"LOCAL_RANK": environment["RANK"], "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    elif int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        needed = _by_slurm(environment, port)
    else:
        for rank, size, local_rank, local_size in _MPI:
            world = int(environment.get(size, 1))
            if world == 1:
                continue
            if environment.get(local_size) != environment[size]:
                return {}
            local = environment.get(local_rank, environment[rank])
            needed = _variables(environment[rank], world, local, "127.0.0.1", port)
            break
        else:
            return _variables("0", 1, "0", "127.0.0.1", _free_port())  # overrides what a shell has left
    return {name: value for name, value in needed.items() if name not in environment}


def _by_slurm(environment: Mapping[str, str], port: int) -> dict[str, str]:
    """Variables of a task of ``srun``; the first node of the step has rank 0."""
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    one_node = environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", "1")) == "1"
    local = environment.get("SLURM_LOCALID", environment["SLURM_PROCID"])
    job = int(environment.get("SLURM_JOB_ID", 0))
    return _variables(
        environment["SLURM_PROCID"],
        int(environment["SLURM_STEP_NUM_TASKS"]),
        local,
        "127.0.0.1" if one_node else first_node(nodes),
        port + job % 1000,  # jobs that share a node
    )


def _variables(rank: str, world: int, local_rank: str, address: str, port: int) -> dict[str, str]:
    return {
        "RANK": rank,
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": local_rank,
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def first_node(nodes: str) -> str:
    """Returns the first host of a list of Slurm: ``gpu[03-07,12],cpu1`` begins with ``gpu03``."""
    found = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodes)
    return nodes if found is None else "".join(part or "" for part in found.groups())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launcher_processes() -> list[tuple[int, int]]:
    """Returns the ancestors of this process that are launchers, nearest first, as ``(process, its child)``.

    A shell is none: a job goes on when its shell has ended, as with ``nohup``.
    """
    found, child = [], os.getpid()
    parent = parent_of(child)
    while parent is not None and parent > 1 and _PROGRAMS.search(_command(parent)):
        found.append((parent, child))
        child, parent = parent, parent_of(parent)
    return found


def planned_hosts() -> list[str]:
    """Returns the host of every rank, as the hostfile of DeepSpeed names it; empty where another launcher runs."""
    for launcher, _ in launcher_processes():
        if found := re.search(r"--world_info=([\w=-]+)", _command(launcher)):
            slots = json.loads(base64.urlsafe_b64decode(found.group(1)))
            return [host for host, own in slots.items() for _ in own]
    return []


def parent_of(process: int) -> int | None:
    """Returns the parent of a process of this machine; ``None`` once the process has ended."""
    state = _state(process)
    return int(state[1]) if state else None


def is_stopped(process: int) -> bool:
    """Whether a process of this machine is stopped, as by ``SIGSTOP``; not by a debugger."""
    return _state(process)[:1] == ["T"]


def has_ended(process: int) -> bool:
    """Whether a process of this machine has ended, its parent may not know of it yet."""
    return _state(process)[:1] in ([], ["Z"], ["X"])


def machine() -> str:
    """Identifies this machine, and the table of processes that this process sees."""
    boot, table = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    try:
        return f"{boot.read_text().strip()} {os.readlink(table)}"
    except OSError:
        return ""


def _state(process: int) -> list[str]:
    """State, parent and more of a process; empty once it has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
