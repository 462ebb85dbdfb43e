"""Processes of one rank: workers, and with ``"standby"`` one that waits to take the place of the next worker that dies.

::

    worker     imports, data ... joins the ranks, trains ...... X
    standby         imports, data ... waits where it would join | joins the ranks, trains ...
    standby                                                             imports, data ... waits

Both run the same command. Until a process joins the ranks (:func:`ds_al.parallel.worker.join`) it knows nothing of the
others, so it can come there before it is needed; what is left to do after a death is to build the engine.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from ds_al.parallel import store, worker

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG, <sys/prctl.h>


class Processes:
    """Starts the processes of one rank. They end with the thread that started them.

    Args:
        folder: of this rank.
        standby: whether one process waits.
    """

    def __init__(self, folder: Path, *, standby: bool) -> None:
        self._folder, self._has_standby = folder, standby
        self._waiting: subprocess.Popen[bytes] | None = None
        self._turn: int | None = None  # pipe to the process that waits, or will

    def next(self) -> subprocess.Popen[bytes]:
        """Returns a new worker: the one that waits, or will soon, if there is any."""
        waiting, turn, self._waiting, self._turn = self._waiting, self._turn, None, None
        if turn is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(turn, b"!")
            os.close(turn)
        return self._start() if waiting is None or waiting.poll() is not None else waiting

    def prepare(self) -> None:
        """Starts the process that waits, if one should and none does."""
        if self._has_standby and self._waiting is None:
            end, self._turn = os.pipe()
            self._waiting = self._start(end)
            os.close(end)

    def _start(self, turn: int | None = None) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            worker.VARIABLE: f"{os.getpid()}:{self._folder}",
            store.HOSTED: "True",  # a worker of rank 0 opens no store
            **({} if turn is None else {worker.TURN: str(turn)}),
        }
        return subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]],
            env=environment,
            pass_fds=() if turn is None else (turn,),
            preexec_fn=_die_with_parent,
        )


def _die_with_parent() -> None:
    """Called in the child: the kernel ends it where its keeper ends."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
