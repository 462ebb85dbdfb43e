"""Joins the ranks, and gives back at once what DeepSpeed would leave behind.

On CPU every rank that the ``deepspeed`` command starts on one machine fills a buffer of 66 MiB in ``/dev/shm`` for
its all-reduce and never removes it: the memory of a machine goes with the number of runs that it has seen. A segment
lives on without its name for as long as somebody has it open, so the names go as soon as all ranks have opened each
other's.
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
"""One of these is there in a process that torchrun, the ``deepspeed`` command, MPI or a cluster has started."""
_unnamed = False


def join_world(**options: Any) -> None:
    """``deepspeed.init_distributed(**options)``, if that has not been called; then no shared memory outlives the ranks.

    All ranks call it. A second call does nothing. A process that nothing has launched, ``python script.py``, is a world
    of its own.
    """
    global _unnamed
    import deepspeed  # late: who only starts ranks needs no engine
    import torch.distributed as dist

    if not dist.is_initialized():
        _stand_alone()
        deepspeed.init_distributed(**options)
    if not _unnamed:
        _unnamed = True
        dist.barrier()  # until then a rank may still have to open the buffers of others
        remove_buffers(os.environ.get("MASTER_PORT", ""), rank=dist.get_rank())


def _stand_alone() -> None:
    """Sets what a launcher would, where none has: DeepSpeed would look for MPI, and fail without it."""
    if any(name in os.environ for name in _LAUNCHED):
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)


def remove_buffers(port: int | str, *, rank: int | None = None) -> None:
    """Removes what the ranks that met at this port, or one of them, hold in ``/dev/shm`` under a name."""
    last = "*" if rank is None else rank
    for path in _FOLDER.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_{last}"):
        path.unlink(missing_ok=True)
