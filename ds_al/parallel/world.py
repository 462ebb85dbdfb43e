"""Initialization of the process group, bounded in time."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from datetime import timedelta
from typing import Any, NoReturn

from torch.distributed import Store

from ds_al.errors import ALConfigError
from ds_al.parallel import presence, reach, store
from ds_al.parallel.buffers import remove_buffers
from ds_al.parallel.launchers import LOOPBACK, PORT, launched
from ds_al.system import extensions

_unnamed = False
_READING = 5.0  # seconds


def join_world(**options: Any) -> None:
    """Calls ``deepspeed.init_distributed(**options)`` unless it was called, and waits until all ranks are there.

    All ranks must call it. A second call does nothing. A process without a launcher, ``python script.py``, becomes a
    world of one rank. The store of the job listens on the interface of ``MASTER_ADDR`` alone; the shared memory of
    DeepSpeed loses its names.

    Raises:
        ALConfigError: a rank has not come within :func:`start_seconds`, or an extension cannot be compiled.
    """
    global _unnamed
    import deepspeed  # late: the launcher of ranks needs no engine
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    if not dist.is_initialized():
        os.environ |= launched(os.environ, port=options.get("distributed_port", PORT))
        with contextlib.ExitStack() as stack:
            if "RANK" in os.environ and "init_method" not in options:
                store.host()
                _stay_on_this_host()
                gloo = get_accelerator().device_name() == "cpu"
                _await_all(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), gloo=gloo)
                stack.enter_context(store.hosted())
            if get_accelerator().device_name() == "cpu":
                name = extensions.SHARED_MEMORY
                stack.enter_context(extensions.compiling(name, tell=os.environ.get("LOCAL_RANK", "0") == "0"))
            deepspeed.init_distributed(**options)
    presence.start(dist.get_rank(), dist.get_world_size())
    if not _unnamed:
        _unnamed = True
        dist.barrier()  # until then another rank may not have opened this one's buffer
        remove_buffers(os.environ.get("MASTER_PORT", ""), rank=dist.get_rank())


def start_seconds() -> float:
    """Returns how long a rank waits for others at the start: ``DS_AL_START_SECONDS``, by default 300.

    Raises:
        ALConfigError: the variable is no positive number.
    """
    text = os.environ.get("DS_AL_START_SECONDS", "300")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ALConfigError(f"DS_AL_START_SECONDS: got {text!r}, expected a number of seconds, more than 0")
    return seconds


def _stay_on_this_host() -> None:
    """Lets gloo listen on the loopback interface where the address of the first rank says that all ranks are here."""
    if os.environ["MASTER_ADDR"] in LOOPBACK:
        loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
        if loopback:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])


def _await_all(rank: int, world: int, *, gloo: bool) -> None:
    """Waits until every rank has come, and checks that hosts can connect to each other where gloo listens.

    Raises:
        ALConfigError: a rank has not come, and those that have are named; or a host does not reach another one.
    """
    if world == 1:
        return
    limit = start_seconds()
    deadline = time.monotonic() + limit
    if rank:
        reach.await_address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), seconds=limit)
    room = store.connect("start", seconds=max(deadline - time.monotonic(), 0.1))
    if room is None:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ALConfigError(
            f"rank {rank} ({socket.gethostname()}) has not reached rank 0 at {where} within {limit:.0f} s: start all "
            "ranks, with the same MASTER_ADDR and MASTER_PORT, or wait longer (DS_AL_START_SECONDS)"
        )
    room.set(str(rank), socket.gethostname())
    keys = [str(other) for other in range(world)]
    try:
        room.wait(keys, timedelta(seconds=max(deadline - time.monotonic(), 0.1)))
    except RuntimeError:
        _name_missing(room, keys, rank=rank, limit=limit)
    if gloo:
        reach.check_hosts(rank, [room.get(key).decode() for key in keys], room, seconds=limit)


def _name_missing(room: Store, keys: list[str], *, rank: int, limit: float) -> NoReturn:
    """Raises:
    ALConfigError: always; it names the ranks that have come.
    """
    there = [key for key in keys if room.check([key])]
    names = ", ".join(f"rank {key} ({room.get(key).decode()})" for key in there)
    missing = ", ".join(key for key in keys if key not in there)
    room.set(f"named by {rank}", "")
    if rank == 0:  # its end takes the store from ranks that are still reading
        with contextlib.suppress(RuntimeError):
            room.wait([f"named by {key}" for key in there], timedelta(seconds=_READING))
    raise ALConfigError(
        f"rank {missing} of {len(keys)} has not come within {limit:.0f} s; {names} came: start the same script on all "
        "ranks, or wait longer (DS_AL_START_SECONDS)"
    )
