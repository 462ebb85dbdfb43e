"""Keepers: the processes that the launcher has started, each of which starts its rank's worker and replaces it.

::

    launcher --- keeper of rank 0 --- worker of rank 0       the keepers hold the store, and talk by it
             --- keeper of rank 1 --- worker of rank 1       a worker ends with its keeper

    keeper 0    notices the end of its worker, and tells that era 0 of the group is over         era 1
    keeper 1    of the same group, an AL layer on stages 0 and 1, ends its worker       both start new workers
    keeper 2    of another group                                            its worker goes on

A keeper has run the script up to :func:`ds_al.initialize`, where it learns that recovery is on. It starts the same
command again as a child process, whose end no launcher sees. A worker that a signal or ``os._exit`` has ended is
replaced; one that an exception has ended would fail again, so the job ends with that exception.

Gradients couple the stages of a group, whose states have to be of one micro-batch: a group recovers as one. When a
process of it dies, its keepers end the others, wait until none is left, and start all anew from the restart point of
the group. A new process thus never meets one that has been there before.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, NoReturn

from torch import distributed
from torch.distributed import Store

from ds_al.config.associated_learning import RecoveryConfig
from ds_al.errors import ALConfigError
from ds_al.parallel import launchers, meetings, presence, store
from ds_al.parallel.presence import Record
from ds_al.recovery import events
from ds_al.recovery.ending import Ending
from ds_al.recovery.place import Place
from ds_al.recovery.standby import Processes

_LOOK = 0.2  # seconds between two looks at the other keepers, and whether the worker is stopped
_GRACE = 3.0  # seconds that a worker has to end by itself once another one has ended the job
_PARTING = 5.0  # seconds for which the keeper of rank 0, which holds the store, waits for the others at the end
_held: list[Any] = []
"""What has to live as long as the process: the store, where torch has opened it."""


def keep(config: RecoveryConfig, *, group: range) -> NoReturn:
    """Becomes the keeper of this rank: starts the worker, waits for it, and ends the process with its exit code.

    Every rank must call it, at the same place of its script.

    Args:
        config: the ``"recovery"`` block.
        group: ranks of the group of stages to which this one belongs, itself alone where K = P.

    Raises:
        ALConfigError: the script was not started by a command that can be started again.
    """
    if not sys.orig_argv[1:] or sys.orig_argv[1] == "-":
        raise ALConfigError("recovery: the script has to be a file that can be started again: python script.py")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    session = meetings.broadcast(uuid.uuid4().hex[:12], source=0)
    _held.append(distributed.distributed_c10d._get_default_store())
    distributed.destroy_process_group()
    gc.collect()
    connection = store.connect("recovery")
    if connection is None:
        raise ALConfigError("recovery: the store of the job cannot be reached")
    root = Path(config.folder).resolve()
    own = root / session / f"rank_{rank}"
    own.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        (root / events.FILE).unlink(missing_ok=True)
    processes = Processes(own, standby=config.standby)
    keeper = Keeper(
        rank, world, group=group, store=connection, folder=own, processes=processes, max_restarts=config.max_restarts
    )  # fmt: skip
    code = keeper.run()
    keeper.clear()
    presence.here().end()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Keeper:
    """Keeps one rank alive.

    Args:
        rank, world: this rank, and number of ranks.
        group: ranks whose processes are replaced together.
        store: connection to the store of the keepers.
        folder: of this rank.
        processes: starts workers.
        max_restarts: deaths of this rank's processes before the job ends.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        *,
        group: range,
        store: Store,
        folder: Path,
        processes: Processes,
        max_restarts: int,
    ) -> None:
        self.rank, self.world, self.store, self.folder = rank, world, store, folder
        self.max_restarts, self.restarts = max_restarts, 0
        self.place = Place(folder / "place")
        self.ending = Ending(rank, world, store=store)
        self._group, self._key, self._era = group, f"group/{group.start}", 0
        self._processes = processes
        self._process: subprocess.Popen[bytes]
        self._trained = 0  # micro-batches when the worker was started
        self._ended = threading.Event()
        self._stopped_since: float | None = None
        self._asked = 0
        self._abandoned = False

    def run(self) -> int:
        """Returns the exit code of this rank."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, frame: self._pass_on(number))
        here = presence.here()
        here.on_launcher_gone = lambda: self._pass_on(signal.SIGHUP)
        here.patience, here.on_exit = presence.STOPPED, self._abandon
        self._start()
        while True:
            if self._ended.wait(_LOOK):
                code = self._process.wait()
                if self._abandoned:
                    threading.Event().wait()  # the thread that has noticed why ends this process
                over = code != 0 and self.ending.is_over()
                if over and code < 0:
                    code = self.ending.code  # of the script; its interpreter was ended afterwards
                if code == 0:
                    return self._leave()
                if self._asked:  # to end, by the launcher or the user
                    return self._end_job(f"it was ended by {signal.Signals(self._asked).name}", code=128 + self._asked)
                if reason := self._told() or ("its script ended with an exit code" if over else ""):
                    return self._end_job(reason, code=code if code > 0 else 1)
                if self.restarts == self.max_restarts:
                    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                    return self._end_job(
                        f"its process was ended by {how}, and {self.max_restarts} have been replaced already "
                        '("max_restarts")',
                        code=1,
                    )
                self._tell_death(code)
            elif reason := self._of_others():
                return self._end_worker(reason)
            elif self._has_lost_one():
                self._end_with_group()
            else:
                self._kill_if_stopped()
                if self.place.micro_batches > self._trained:  # not while the worker starts, which needs the processor
                    self._processes.prepare()
                continue
            if reason := self._replace():
                return self._end_worker(reason)

    # ---- the worker --------------------------------------------------------------------------------

    def _start(self) -> None:
        self._ended = ended = threading.Event()
        self._process = process = self._processes.next()
        self._trained = self.place.micro_batches

        def watch() -> None:
            process.wait()
            ended.set()

        threading.Thread(target=watch, name="ds_al keeper", daemon=True).start()

    def _tell_death(self, code: int) -> None:
        self.restarts += 1
        at = self.place.micro_batches
        events.tell(self._root, "death", rank=self.rank, code=code, micro_batch=at, restarts=self.restarts)
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}, without a reason"
        print(
            f"rank {self.rank}: the process was {how} after {at} micro-batches; another one takes its place "
            f"({self.restarts} of {self.max_restarts})",
            file=sys.stderr,
            flush=True,
        )

    def _has_lost_one(self) -> bool:
        """Whether another process of the group has died in this era."""
        return len(self._group) > 1 and self.store.add(self._key, 0) > self._era

    def _end_with_group(self) -> None:
        self._process.kill()
        self._process.wait()
        self.ending.is_over()  # not with this rank, which has to come to its end again
        at = self.place.micro_batches
        events.tell(self._root, "ended", rank=self.rank, micro_batch=at)
        print(
            f"rank {self.rank}: goes back from {at} micro-batches with its group, the ranks "
            f"{', '.join(map(str, self._group))}",
            file=sys.stderr,
            flush=True,
        )

    def _replace(self) -> str:
        """Starts another worker, once no worker of this era is left in the group.

        Returns:
            Why the job has to end instead; empty where it has not, or has been asked to.
        """
        for border in (self.rank - 1, self.rank):
            self.store.add(f"generation/{border}", 1)
        self.store.add("deaths", 1)
        self.store.add(self._key, 0)
        self.store.compare_set(self._key, str(self._era), str(self._era + 1))
        self._era += 1
        gone = f"{self._key}/{self._era}"
        self.store.add(gone, 1)
        while self.store.add(gone, 0) < len(self._group):
            if self._asked:
                return ""
            if self.store.add("left", 0):
                reason = f"rank {self.rank}: its group cannot go back, since others have come to the end"
                self.store.compare_set("over", "", reason)
            if reason := self._of_others():
                return reason
            time.sleep(_LOOK / 4)
        self._start()
        return ""

    def _told(self) -> str:
        """Why the script of the worker ended, if it has told, or has come to its end."""
        record = self._record()
        return record.failed or ("its script ended with an exit code" if record.ended else "")

    def _record(self) -> Record:
        """What the present worker has told; empty where it has told nothing."""
        connection = store.connect("presence of workers")
        if connection is None or not connection.check([str(self.rank)]):
            return Record()
        record = Record(**json.loads(connection.get(str(self.rank))))
        return record if record.process == self._process.pid else Record()

    def _kill_if_stopped(self) -> None:
        if not launchers.is_stopped(self._process.pid):
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = time.monotonic()
        elif time.monotonic() - self._stopped_since > presence.STOPPED:
            self._stopped_since = None
            self._process.kill()

    def _pass_on(self, number: int) -> None:
        """Lets the worker come to its end; a terminal has sent ``SIGINT`` to it already."""
        self._asked = number
        if number != signal.SIGINT or not os.isatty(0):
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    # ---- the job -----------------------------------------------------------------------------------

    @property
    def _root(self) -> Path:
        return self.folder.parents[1]

    def _leave(self) -> int:
        """Ends this rank well; the store stays until all ranks have ended."""
        self.store.add("left", 1)
        while self.store.add("left", 0) < self.world:
            if reason := self._of_others():
                return self._end_worker(reason)
            time.sleep(_LOOK)
        self._part()
        return 0

    def _part(self) -> None:
        """Lets the others read what there is to know, before rank 0 takes the store away."""
        limit = time.monotonic() + _PARTING
        with contextlib.suppress(RuntimeError):
            self.store.add("parted", 1)
            while self.rank == 0 and self.store.add("parted", 0) < self.world and time.monotonic() < limit:
                time.sleep(0.05)

    def _end_job(self, reason: str, *, code: int) -> int:
        text = f"rank {self.rank}: {reason}"
        with contextlib.suppress(RuntimeError):
            self.store.compare_set("over", "", text)
        events.tell(self._root, "end", rank=self.rank, reason=reason)
        print(f"{text}: the job ends", file=sys.stderr, flush=True)
        self._part()
        return code

    def _of_others(self) -> str:
        """Why the job has to end, as far as another rank is concerned; empty where it has not."""
        try:
            if self.store.check(["over"]):
                return self.store.get("over").decode()
        except RuntimeError:
            return "the keeper of rank 0, which holds the store, has gone"
        here = presence.here()
        if names := ", ".join(map(here.name, here.gone())):
            return f"the keeper of {names} has gone"
        return here.failed()

    def _end_worker(self, reason: str) -> int:
        self._ended.wait(_GRACE)  # it may fail for the same reason, and tell more of it
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        print(f"rank {self.rank}: {reason}: the job ends", file=sys.stderr, flush=True)
        self._part()
        return 1

    def _abandon(self, reason: str) -> None:
        """Ends the worker where another keeper is stopped, or its machine is not heard of: the store may not answer."""
        self._abandoned = True
        events.tell(self._root, "end", rank=self.rank, reason=reason)
        self._process.kill()
        self._process.wait()
        self.clear()

    def clear(self) -> None:
        """Removes the folder of this rank."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()
