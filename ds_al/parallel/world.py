"""Initialization of the process group, without the shared-memory leak of DeepSpeed's CPU backend.

On CPU every rank that the ``deepspeed`` command starts on one machine allocates a buffer of 66 MiB in ``/dev/shm`` for
its all-reduce and never removes it, so each run would occupy memory until the machine reboots. A segment remains usable
without a name while a process has it open, so the names are removed as soon as all ranks have opened each other's.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

_FOLDER = Path("/dev/shm")
_LAUNCHED = (
    *("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"),
    *("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID", "AZUREML_EXPERIMENT_ID", "SM_TRAINING_ENV"),
)
"""Environment variables of which torchrun, the ``deepspeed`` command, MPI or a cluster sets at least one."""
_unnamed = False


def join_world(**options: Any) -> None:
    """Calls ``deepspeed.init_distributed(**options)`` unless it was called, and unlinks its shared memory.

    All ranks must call it. A second call does nothing. A process without a launcher, ``python script.py``, becomes a
    world of one rank.
    """
    global _unnamed
    import deepspeed  # late: the launcher of ranks needs no engine
    import torch.distributed as dist

    if not dist.is_initialized():
        _stand_alone()
        deepspeed.init_distributed(**options)
    if not _unnamed:
        _unnamed = True
        dist.barrier()  # until then another rank may not have opened this one's buffer
        remove_buffers(os.environ.get("MASTER_PORT", ""), rank=dist.get_rank())


def _stand_alone() -> None:
    """Sets the environment variables of a launcher if none is set: DeepSpeed would require MPI otherwise."""
    if any(name in os.environ for name in _LAUNCHED):
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)


def remove_buffers(port: int | str, *, rank: int | None = None) -> None:
    """Unlinks the ``/dev/shm`` buffers of a job, identified by its master port, or of one of its ranks."""
    last = "*" if rank is None else rank
    for path in _FOLDER.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_{last}"):
        path.unlink(missing_ok=True)
