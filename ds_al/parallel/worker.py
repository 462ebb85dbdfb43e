"""Workers: processes that a keeper (:mod:`ds_al.recovery.keeper`) has started in its place, and their world.

A process that takes the place of another one cannot join a process group in which the others have met long ago, and
DeepSpeed's constructor calls collectives. In all workers, the first ones included, the group of all ranks is therefore
of torch's fake backend, which knows ranks and size, and sends nothing. What ranks have to say to each other goes over
the store (:mod:`ds_al.parallel.meetings`) and over groups of two ranks (:mod:`ds_al.parallel.pairs`).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import distributed
from torch.distributed import Store

from ds_al import host
from ds_al.errors import ALConfigError, ALTransportError
from ds_al.parallel import launchers, meetings, presence, store
from ds_al.parallel.journal import Journal
from ds_al.parallel.launchers import PORT, launched

VARIABLE = "DS_AL_WORKER"
"""``<process of the keeper>:<folder of this rank>``; processes that a worker starts inherit it, and are none."""
TURN = "DS_AL_WORKER_TURN"
"""Number of the pipe on which a standby, a worker that was started before it is needed, waits for its turn."""

_keeper, _, _folder = os.environ.get(VARIABLE, "").partition(":")
IS_WORKER = _keeper == str(os.getppid())
"""Whether a keeper has started this process."""
_options: Any = None
_PATIENCE = 60.0  # seconds for a connection, on a machine that is busy


def folder() -> Path:
    """Returns the folder in which this rank keeps what a process that takes its place needs."""
    return Path(_folder)


def join(**options: Any) -> None:
    """Makes the world of a worker, once; all joint operations go over the store of the keepers from now on.

    A standby waits here for its turn.

    Raises:
        ALConfigError: the script has made a process group itself.
    """
    global _options
    import deepspeed

    if _options is not None:
        return
    if distributed.is_initialized():
        raise ALConfigError(
            "recovery: the script called init_distributed() or init_process_group() itself; remove the call, since "
            "ALPipelineModule joins the ranks, and a process that takes another one's place cannot"
        )
    _await_turn()
    from torch.testing._internal.distributed import fake_pg

    os.environ |= launched(os.environ, port=options.get("distributed_port", PORT))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend: Any = fake_pg.FakeProcessGroup
    _options = backend.Options()
    distributed.init_process_group(
        "fake", store=fake_pg.FakeStore(), rank=rank, world_size=world, pg_options=_options
    )  # fmt: skip
    with host.without_shared_memory():
        deepspeed.init_distributed(**options)
    _options.error_on_collective = True
    presence.start(rank, world, name="presence of workers", watches=False)
    meetings.use(meetings.Room(rank, world, store=open_store(), journal=Journal(folder() / "journal")))
    threading.Thread(target=_end_stopped_keeper, args=(rank,), name="ds_al keeper is stopped", daemon=True).start()


def open_store() -> Store:
    """Opens a connection to the store of the keepers.

    Raises:
        ALTransportError: it does not answer.
    """
    connection = store.connect("recovery", seconds=_PATIENCE)
    if connection is None:
        raise ALTransportError(f"the keeper of rank 0, which holds the store, has not answered within {_PATIENCE:g} s")
    return connection


def _await_turn() -> None:
    turn = os.environ.pop(TURN, None)
    if turn is not None and not os.read(int(turn), 1):
        os._exit(1)  # the keeper has ended


def _end_stopped_keeper(rank: int) -> None:
    """Kills the keeper of this process, and so this process, once it was stopped for long: the others end by then."""
    keeper, looks = int(_keeper), 0
    while looks < presence.STOPPED:
        time.sleep(1.0)
        looks = looks + 1 if launchers.is_stopped(keeper) else 0
    print(f"rank {rank}: its keeper, process {keeper}, is stopped: the job ends", file=sys.stderr, flush=True)
    os.kill(keeper, signal.SIGKILL)


@contextmanager
def collectives() -> Iterator[None]:
    """Lets DeepSpeed's constructors call collectives, whose results they do not use; elsewhere they raise."""
    if _options is None:
        yield
        return
    before, _options.error_on_collective = _options.error_on_collective, False
    try:
        yield
    finally:
        _options.error_on_collective = before
