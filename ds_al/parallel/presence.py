"""Presence of the ranks: what each of them tells the others beside training, and what it notices of them.

Every rank posts one small :class:`Record` in the store and reads those of all others, twice a second, in a thread: that
it lives, why it failed, that it has ended, that the job has to stop. A second thread looks at what the first one has
read, since a store on a stopped host never answers. The job ends, with a diagnosis and exit code 1, where

* the process of a rank on this machine is stopped for :data:`STOPPED` seconds; it is killed, as it cannot end itself;
* the process of a rank on this machine has gone for :data:`STOPPED` seconds, and did not tell of its end;
* a rank is not heard of for :data:`PATIENCE` seconds, as one that keeps Python's lock may be for a while;
* the launcher of this rank has gone.

Nothing here takes part in training, and a process of one rank without a launcher has no threads.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import NoReturn

from torch.distributed import Store

from ds_al.errors import ALTransportError
from ds_al.parallel import launchers, store
from ds_al.parallel.lost import is_loss

STOPPED = 20.0
"""Seconds without a word of a process that is stopped, or has gone, after which the job ends."""
PATIENCE = 300.0
"""Seconds without a word of any rank after which the job ends."""
_TICK = 0.5  # seconds between two readings of the records
_FIRST = 0.05  # seconds between two readings until the records of all ranks have been read once
_LOOK = 0.25  # seconds between two looks at what has been read, and at the launcher
_LINGER = 3.0  # seconds for which a rank that has failed waits until all others know why
_PARTING = 10.0  # seconds for which rank 0, which holds the store, waits until all others know that it ends
_EXITING = 2.0  # seconds for which a process that has closed its sockets may still be there
_SLEPT = 5.0  # seconds between two looks after which this process counts as stopped meanwhile
_STOP = 30.0  # seconds that training has to come to its end once the launcher has gone


@dataclass
class Record:
    """What a rank tells of itself.

    Attributes:
        host: name of its machine.
        machine: identity of the machine, and of its table of processes.
        process: number of its process there.
        beat: number of this record; grows as long as the rank lives.
        failed: why the rank fails; empty where it does not.
        lost: whether it fails because it has lost another rank.
        ended: whether its script has come to its end.
        stop: why the job has to stop, as far as this rank knows; empty where it does not.
        read: latest ``beat`` of every rank that this rank has read.
    """

    host: str = ""
    machine: str = ""
    process: int = 0
    beat: int = 0
    failed: str = ""
    lost: bool = False
    ended: bool = False
    stop: str = ""
    read: list[int] = field(default_factory=list)


class Presence:
    """Posts the record of this rank, and reads those of the others.

    Args:
        rank: of this process.
        world: number of ranks.
        store: connection to the store; ``None`` where there is none, or no other rank.
        watches: whether this process ends where another one is stopped or silent; keepers do so for their workers.
    """

    def __init__(self, rank: int, world: int, *, store: Store | None, watches: bool = True) -> None:
        self.rank, self.world = rank, world
        self.own = Record(socket.gethostname(), launchers.machine(), os.getpid(), read=[0] * world)
        self.records = {rank: self.own}
        """Latest known record of every rank."""
        self._watches = watches
        self.on_launcher_gone: Callable[[], None] | None = None
        """Called once when the launcher has gone; without it, this process ends at once."""
        self.patience = PATIENCE
        """Seconds without a word of any rank after which this process ends; keepers, which only wait, need less."""
        self.on_exit: Callable[[str], None] = lambda why: None
        """Called with the reason before this process ends because of another one."""
        self._store = store
        self._heard = dict.fromkeys(range(world), time.monotonic())
        self._launchers = launchers.launcher_processes()
        self._ended = threading.Event()
        self._now = threading.Event()
        self._leaves_with_others = False
        self._stopped: set[int] = set()  # ranks whose processes are stopped, or were when they last were there
        self._talk: threading.Thread | None = None
        if store is not None:
            self._talk = self._start(self._talking, "ds_al presence")
        if watches and (store is not None or self._launchers):
            self._start(self._looking, "ds_al presence, looking")
        atexit.register(self.end)

    def _start(self, target: Callable[[], None], name: str) -> threading.Thread:
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        return thread

    # ---- what this rank tells ----------------------------------------------------------------------

    def fail(self, error: BaseException, *, lost: bool = False) -> None:
        """Tells why this rank fails; the first reason counts."""
        if not self.own.failed:
            text = " ".join(str(error).split())
            self.own.failed = f"{type(error).__name__}: {text}"[:2000] if text else type(error).__name__
            self.own.lost = lost
            self._now.set()

    def recover(self) -> None:
        """Takes back what :meth:`fail` told: the script has gone on."""
        if self.own.failed:
            self.own.failed, self.own.lost = "", False
            self._now.set()

    def stop(self, reason: str) -> None:
        """Asks all ranks to stop training."""
        self.own.stop = self.own.stop or reason
        self._now.set()

    def end(self) -> None:
        """Tells that this script has come to its end; after a failure, waits until the others know its reason.

        Two threads may call it, since a process may be ended by its script while it is ended because of another one:
        each of them waits.
        """
        if self._ended.is_set():
            return
        self.own.ended = True
        limit = time.monotonic() + (_LINGER if self.own.failed else _PARTING if self.rank == 0 else 0.0)
        last = self.own.beat + 1  # the beat that tells of the end
        while self._talks:
            self._now.set()
            gone = self.gone()
            known = len(self.records) == self.world and all(
                record.ended or record.read[self.rank] >= last or rank in gone
                for rank, record in self.records.items()
                if rank != self.rank
            )
            if self.own.beat >= last and (known or time.monotonic() > limit):
                break
            if time.monotonic() > limit + _LINGER:  # the store does not answer
                break
            time.sleep(0.01)
        self._ended.set()
        self._now.set()
        if self._talk is not None:
            self._talk.join(timeout=1.0)
        atexit.unregister(self.end)

    # ---- what it knows of the others -----------------------------------------------------------------

    @property
    def stopping(self) -> str:
        """Why the job has to stop; empty where it has not."""
        return self.own.stop

    @property
    def all_stop(self) -> bool:
        """Whether every rank knows that the job has to stop."""
        return len(self.records) == self.world and all(r.stop or r.ended for r in self.records.values())

    def name(self, rank: int) -> str:
        """Names a rank and its host."""
        record = self.records.get(rank)
        return f"rank {rank}" if record is None else f"rank {rank} ({record.host})"

    def absent(self) -> list[int]:
        """Returns the ranks on this machine whose process has ended; none where keepers replace them."""
        if not self._watches:
            return []
        return [
            rank
            for rank, record in sorted(self.records.items())
            if record.machine == self.own.machine and launchers.has_ended(record.process)
        ]

    def gone(self) -> list[int]:
        """Returns the ranks on this machine whose process has ended, and that have told neither a failure nor an end.

        Once the store is lost, nothing is known of other ranks than rank 0, which held it.
        """
        known = set(self.records) if self._talks else {0}
        return [rank for rank in self.absent() if rank in known and not self._told(rank)]

    def _told(self, rank: int) -> bool:
        record = self.records[rank]
        return record.ended or bool(record.failed)

    def fails(self) -> bool:
        """Whether any rank has told that it fails."""
        return any(record.failed for record in self.records.values())

    def cause(self, *, seconds: float = _LINGER) -> str:
        """Returns what others tell of their failures or ends; waits a little until they have told."""
        start, gone, read = time.monotonic(), list[int](), 0
        limit = start + seconds
        while True:
            self._now.set()
            others = sorted((rank, record) for rank, record in self.records.items() if rank != self.rank)
            failed = [(rank, record) for rank, record in others if record.failed]
            told = [(rank, record) for rank, record in failed if not record.lost]
            silent = not self._talks
            if told:
                return "; ".join(f"{self.name(rank)} failed: {record.failed}" for rank, record in told)
            if gone != (found := self.gone()):  # what a process has told before its end may not be read yet
                gone, read = found, self.own.beat + 2
            if gone and (silent or self.own.beat >= read):
                names = ", ".join(map(self.name, gone))
                if self._stopped.issuperset(gone):  # another rank, which was faster, has killed them
                    return f"the process of {names} is stopped"
                return f"the process of {names} has gone without a word: it was killed, or left by os._exit()"
            elif failed and not gone:
                return "; ".join(f"{self.name(rank)} failed: {record.failed}" for rank, record in failed)
            if time.monotonic() > (min(limit, start + _EXITING) if silent else limit):
                ended = [self.name(rank) for rank, record in others if record.ended]
                if ended:
                    return f"{', '.join(ended)} had come to the end of its script: every rank has to train as long"
                return "no other rank told why: its process was killed, or left by os._exit()"
            time.sleep(0.02)

    def failed(self) -> str:
        """Returns what others have told of their failures so far; empty where none has."""
        others = sorted((rank, record) for rank, record in self.records.items() if rank != self.rank)
        told = [f"{self.name(rank)} failed: {record.failed}" for rank, record in others if record.failed]
        return "; ".join(told)

    def all_failed_alike(self, *, seconds: float = 1.5) -> bool:
        """Whether all ranks fail for the reason of this one; waits a little until they have told."""
        limit = time.monotonic() + seconds
        while True:
            reasons = [record.failed for record in self.records.values()]
            if len(reasons) == self.world and all(reasons):
                return len(set(reasons)) == 1
            if time.monotonic() > limit:
                return False
            self._now.set()
            time.sleep(0.02)

    @contextlib.contextmanager
    def leaving_with_others(self) -> Iterator[None]:
        """Ends this process where another rank fails inside, which the call inside would not notice for long.

        Raises:
            ALTransportError: the call inside has noticed it first; the message has what the other rank told.
        """
        self._leaves_with_others = True
        try:
            yield
        except RuntimeError as error:
            if not is_loss(error):
                raise
            lost = ALTransportError(f"the ranks have not joined: {self.cause()} ({error})")
            self.fail(lost, lost=True)
            raise lost from error
        finally:
            self._leaves_with_others = False

    @property
    def _talks(self) -> bool:
        return self._talk is not None and self._talk.is_alive()

    # ---- threads -----------------------------------------------------------------------------------

    def _talking(self) -> None:
        assert self._store is not None
        keys = [str(rank) for rank in range(self.world)]
        with contextlib.suppress(RuntimeError):  # rank 0 has ended, and with it the store
            while True:
                ended = self._ended.is_set()
                self.own.beat += 1
                self._store.set(keys[self.rank], json.dumps(asdict(self.own)))
                if ended:
                    return
                if len(self.records) == self.world or self._store.check(keys):
                    for rank, text in enumerate(self._store.multi_get(keys)):
                        if rank != self.rank:
                            self._read(rank, Record(**json.loads(text)))
                    if self.rank != 0 and self.records[0].ended:
                        self._store.set(keys[self.rank], json.dumps(asdict(self.own)))  # that this rank has read it
                        return
                self._heard[self.rank] = time.monotonic()
                self._now.wait(_TICK if len(self.records) == self.world else _FIRST)
                self._now.clear()

    def _read(self, rank: int, record: Record) -> None:
        if record.beat != self.own.read[rank] or record.ended:
            self._heard[rank] = time.monotonic()
        self.own.read[rank] = record.beat
        self.own.stop = self.own.stop or record.stop
        self.records[rank] = record

    def _looking(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(_LOOK):
            now = time.monotonic()
            if now - last > _SLEPT:  # this process was stopped itself, perhaps with all others
                self._heard = dict.fromkeys(range(self.world), now)
            last = now
            if self._launchers and any(launchers.parent_of(child) != parent for parent, child in self._launchers):
                self._launchers = []
                self._leave_without_launcher()
            if self._leaves_with_others:
                self._leave_with_others()
            if self._talks or (self._talk is not None and not self.records.get(0, self.own).ended):
                self._look()

    def _leave_with_others(self) -> None:
        gone = self._talk is not None and not self._talks
        if cause := self.failed() or ("rank 0 has ended, and with it the store" if gone else ""):
            self.own.failed, self.own.lost = cause, True
            self.end()  # rank 0 would take the store from those who do not know yet
            self._exit(cause)

    def _look(self) -> None:
        now = time.monotonic()
        quiet = [rank for rank in self.records if now - self._heard[rank] > 2 * _TICK]
        if self._stopped:
            self._stopped &= set(self.absent())
        self._stopped.update(rank for rank in quiet if self._is_stopped(self.records[rank]))
        # While the store does not answer, nothing is heard of anyone.
        late = {rank: now - self._heard[rank] for rank in self.records if now - self._heard[rank] > STOPPED}
        stopped = [rank for rank in late if self._is_stopped(self.records[rank])]
        if stopped:
            self._leave(f"the process of {', '.join(map(self.name, stopped))} is stopped", kill=stopped)
        if any(rank in late for rank in self.gone()):
            self._leave(self.cause())
        silent = [rank for rank, seconds in late.items() if seconds > self.patience and rank != self.rank]
        if silent:
            self._leave(f"{', '.join(map(self.name, silent))}: not heard of for {self.patience:.0f} s")

    def _is_stopped(self, record: Record) -> bool:
        return record.machine == self.own.machine and launchers.is_stopped(record.process)

    def _leave_without_launcher(self) -> None:
        what = "the launcher that started this rank has gone"
        if self.on_launcher_gone is None:
            self._leave(what)
            return
        self.on_launcher_gone()
        if not self._ended.wait(_STOP):
            self._leave(f"{what}, and training has not stopped for {_STOP:.0f} s")

    def _leave(self, why: str, *, kill: Sequence[int] = ()) -> None:
        if not self._ended.is_set():
            self._exit(why, kill=kill)

    def _exit(self, why: str, *, kill: Sequence[int] = ()) -> NoReturn:
        sys.stderr.write(f"\nrank {self.rank} ({self.own.host}): {why}: the job ends\n")
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        self.fail(ALTransportError(why))
        last, limit = self.own.beat + 1, time.monotonic() + _TICK
        while self._talks and self.own.beat <= last and time.monotonic() < limit:  # until the store has it
            self._now.set()
            time.sleep(0.01)
        for rank in kill:
            with contextlib.suppress(OSError):  # another rank was faster
                os.kill(self.records[rank].process, signal.SIGKILL)
        self.end()  # rank 0 would take the store from those who do not know yet
        self.on_exit(why)
        os._exit(1)


_here: Presence | None = None


def start(rank: int, world: int, *, name: str = "presence", watches: bool = True) -> None:
    """Starts the presence of this rank, once; an exception that ends the script is then told to the others.

    Args:
        name: of the records in the store; processes with different names do not see each other.
        watches: see :class:`Presence`.
    """
    global _here
    if _here is not None:
        return
    _here = Presence(rank, world, store=store.connect(name) if world > 1 else None, watches=watches)
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        before(kind, error, trace)  # first: others tell of it as soon as they know
        here().fail(error)

    sys.excepthook = hook


def here() -> Presence:
    """Returns the presence of this rank; of a world of one where no group was joined."""
    global _here
    if _here is None:
        _here = Presence(0, 1, store=None)
    return _here
