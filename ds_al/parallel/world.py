"""Initialization of the process group, bounded in time."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

from ds_al.errors import ALConfigError
from ds_al.parallel import arrival, presence, store, worker
from ds_al.parallel.buffers import remove_buffers
from ds_al.parallel.launchers import LOOPBACK, PORT, launched
from ds_al.system import extensions

ARRIVAL = 45.0
"""Seconds for which the ranks of several hosts wait for each other, by default."""
TOGETHER = 300.0
"""Seconds for which ranks wait that share a host, or that have all come, by default."""

_unnamed = False
_joined_here = True


def join_world(**options: Any) -> None:
    """Calls ``deepspeed.init_distributed(**options)`` unless it was called, and waits until all ranks are there.

    All ranks must call it. A second call does nothing. A process without a launcher, ``python script.py``, becomes a
    world of one rank. The store of the job listens on the interface of ``MASTER_ADDR`` alone; the shared memory of
    DeepSpeed loses its names.

    Raises:
        ALConfigError: a rank has not come within :func:`start_seconds`, the ranks cannot work together
            (:func:`~ds_al.parallel.arrival.await_all`), or an extension cannot be compiled.
    """
    global _unnamed, _joined_here
    import deepspeed  # late: the launcher of ranks needs no engine
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    if worker.IS_WORKER:
        worker.join(**options)
        return
    if not dist.is_initialized():
        os.environ |= launched(os.environ, port=options.get("distributed_port", PORT))
        with contextlib.ExitStack() as stack:
            if "RANK" in os.environ and "init_method" not in options:
                store.host()
                _await_all(gloo=get_accelerator().device_name() == "cpu")
                stack.enter_context(store.hosted())
                stack.enter_context(presence.here().leaving_with_others())
            if get_accelerator().device_name() == "cpu":
                name = extensions.SHARED_MEMORY
                stack.enter_context(extensions.compiling(name, tell=os.environ.get("LOCAL_RANK", "0") == "0"))
            deepspeed.init_distributed(**options)
    elif not _unnamed:
        _joined_here = False
    presence.start(dist.get_rank(), dist.get_world_size())
    if not _unnamed:
        _unnamed = True
        dist.barrier()  # until then another rank may not have opened this one's buffer
        remove_buffers(os.environ.get("MASTER_PORT", ""), rank=dist.get_rank())


def check_joined_here() -> None:
    """Checks that the script has left it to :func:`join_world` to make the process group.

    Raises:
        ALConfigError: it has made one itself.
    """
    if not _joined_here:
        raise ALConfigError(
            "recovery: the script has called init_distributed() or init_process_group() itself, which a new process "
            "cannot repeat alone: remove the call, ALPipelineModule joins the ranks"
        )


def start_seconds(default: float = TOGETHER) -> float:
    """Returns how long a rank waits for others at the start: ``DS_AL_START_SECONDS``.

    Args:
        default: seconds where the variable is not set.

    Raises:
        ALConfigError: the variable is no positive number.
    """
    text = os.environ.get("DS_AL_START_SECONDS", str(default))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ALConfigError(f"DS_AL_START_SECONDS: got {text!r}, expected a number of seconds, more than 0")
    return seconds


def _await_all(*, gloo: bool) -> None:
    """Waits for all ranks; where they share this host, gloo and NCCL listen on its loopback interface alone."""
    world, near = int(os.environ["WORLD_SIZE"]), os.environ["MASTER_ADDR"] in LOOPBACK
    if near:
        _stay_on_this_host()
    if world > 1:
        seconds = start_seconds(TOGETHER if near else ARRIVAL)
        ranks = arrival.await_all(int(os.environ["RANK"]), world, seconds=seconds, gloo=gloo)
        if not near and len({rank.network for rank in ranks}) == 1:
            _stay_on_this_host()


def _stay_on_this_host() -> None:
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={loopback[0]}")
