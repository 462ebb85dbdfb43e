"""Shared memory of DeepSpeed's CPU backend, which it leaks.

On CPU every rank that the ``deepspeed`` command starts on one machine allocates a buffer of 66 MiB in ``/dev/shm`` for
its all-reduce and never removes it, so each run would occupy memory until the machine reboots. A segment remains usable
without a name while a process has it open, so the names are removed as soon as all ranks have opened each other's.
"""

from __future__ import annotations

import os
from pathlib import Path

_FOLDER = Path("/dev/shm")


def remove_buffers(port: int | str, *, rank: int | None = None) -> None:
    """Unlinks the ``/dev/shm`` buffers of a job, identified by its master port, or of one of its ranks."""
    last = "*" if rank is None else rank
    for path in _FOLDER.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_{last}"):
        path.unlink(missing_ok=True)
