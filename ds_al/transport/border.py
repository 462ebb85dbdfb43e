"""Border between two neighbouring stages whose process groups are made again when a process dies.

::

    stage i                                  store                                      stage i + 1
      the error of a group, or            generation 7  <--- raised by the keeper         killed
      generation 7 > 6
    announce: taken {gradients: 40} --->  7/0
                                          7/1   <--- announce: taken {training: 32}      new process
    a group per kind of message  <--------------------------------------->               the same
    send again: training 32, 33, ...  ----------------------------------->               takes them

Both ends announce themselves under one generation before they connect. If the generation rises meanwhile, since one of
them has died again, they start over. A border is made as a whole: a stage that waited for one kind of messages could
keep its neighbour waiting for another kind. The store is not in any of the two processes.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store

from ds_al.errors import ALTransportError
from ds_al.parallel.pairs import connect
from ds_al.transport.log import Entry, MessageLog
from ds_al.transport.watched import WatchedGroup

EVALUATION = "evaluation"
"""Kind of the messages that are not sent again: a death makes evaluation begin anew."""
_POLL = 0.01  # seconds between two looks at the store
_TIMEOUT = timedelta(minutes=30)  # of a transfer, as of torch's own groups; an end that waits longer connects again
_GRACE = 10.0  # seconds after which an end that has lost the other one raises the generation itself


@dataclass(frozen=True)
class Recovery:
    """What the borders of a stage need to survive the death of a neighbour's process.

    Attributes:
        open_store: opens a connection to the store of the job, which is in none of the stages' processes; with a prefix
            for each replica of the pipeline.
        start: micro-batch at which this process begins.
        restart_point: returns the micro-batch at which a new process of a stage would begin. It never falls, and is at
            most that of the next stage, whose messages would else be in a log that has died.
        interval: micro-batches between two saves of a stage.
        check: called again and again while the process of this stage is awaited; raises where it will not come.
        log_mib: most MiB of messages that a border keeps.
        folder: of logs in files; ``None`` keeps them in memory.
        decoders: number of copies of decoders that this stage had received, and had sent, before ``start``.
    """

    open_store: Callable[[], Store]
    start: int
    restart_point: Callable[[int], int]
    interval: int
    check: Callable[[int], None]
    log_mib: float
    folder: Path | None = None
    decoders: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Reformed:
    """How a border was made.

    Attributes:
        stages: this one, and its neighbour.
        generation: of the new groups.
        began: moment at which this end began, ``time.time()``.
        met, connected, replay: seconds until both ends had announced themselves, until the groups were made, and
            until the messages were sent again.
        messages, nbytes: what was sent again.
    """

    stages: tuple[int, int]
    generation: int
    began: float
    met: float
    connected: float
    replay: float
    messages: int
    nbytes: int


class End:
    """One kind of messages at a border; subclasses are in :mod:`ds_al.transport.recoverable`."""

    kind: str

    def announced(self) -> int | None:
        """Number of messages that this end has taken; ``None`` where it takes none, or none again."""
        return None

    def attach(self, group: Any, *, taken: int) -> None:
        """Makes a new channel; ``taken`` is what the other end has announced."""
        raise NotImplementedError

    def detach(self) -> None:
        """Closes the channel."""
        raise NotImplementedError

    def resend(self, entry: Entry, message: tuple[Tensor, ...]) -> None:
        """Sends a message of the log."""
        raise NotImplementedError


class Border:
    """One end of a border. Ends of messages are added, then both processes call :meth:`form`.

    Args:
        recovery: see there.
        stages: index of this stage, and of the neighbour.
        device: of the messages' buffers.
        ahead: most messages of a kind that are sent and not yet used.
        elsewhere: attends the other border of the stage; called again and again while the stage waits at this one.
        coupled: whether both stages are of one group, whose processes are replaced together. Then no message is needed
            again but those in flight, where the border is made again for evaluation.
    """

    def __init__(
        self,
        recovery: Recovery,
        *,
        stages: tuple[int, int],
        device: torch.device,
        ahead: int,
        elsewhere: Callable[[], None] = lambda: None,
        coupled: bool = False,
    ) -> None:
        here, there = stages
        self.start = self.micro_batch = recovery.start
        """First micro-batch of this process, and the one that it is at."""
        self.reformed: list[Reformed] = []
        """How this border was made, each time."""
        folder = recovery.folder
        if coupled:
            window = ahead + 1  # a copy of a decoder may be one micro-batch older than the activations in flight
            self.log = MessageLog(
                mib=math.inf, interval=1, ahead=ahead, restart_point=lambda: self.micro_batch - window, folder=None
            )
        else:
            self.log = MessageLog(
                mib=recovery.log_mib,
                interval=recovery.interval,
                ahead=ahead,
                restart_point=lambda: recovery.restart_point(there),
                folder=None if folder is None else folder / f"from{here}-to{there}",
            )
        self._recovery, self._stages, self._device, self._elsewhere = recovery, stages, device, elsewhere
        self._end = int(here > there)
        self._store = recovery.open_store()
        self._name = f"generation/{min(stages)}"
        self._prefix = f"border/{min(stages)}"
        self._room = PrefixStore(self._prefix, self._store)
        self._ends: dict[str, End] = {}
        self._groups: dict[str, WatchedGroup] = {}
        self._generation = 0
        self._attempt = self._common_attempt = 0
        self._is_in_use = False

    def add(self, end: End) -> None:
        """Adds an end of messages, before :meth:`form`."""
        self._ends[end.kind] = end

    def form(self) -> None:
        """Connects both ends for the first time, or a new process with its neighbour."""
        self._form(self._store.add(self._name, 1))

    def reform(self, reason: str) -> float:
        """Makes all groups again, and sends what the neighbour has not had; returns the seconds that this took.

        Args:
            reason: why, for the error.

        Raises:
            ALTransportError: the neighbour needs messages that are not in the log any more.
            Exception: what ``check`` raises where the neighbour will not come.
        """
        start = time.perf_counter()
        try:
            self._form(self._generation + 1)
        except ALTransportError as error:
            raise ALTransportError(f"{error} ({reason})") from None
        return time.perf_counter() - start

    def attend(self) -> None:
        """Makes the groups again if the neighbour waits for that, as when its process has died unnoticed.

        It does nothing while the stage waits at this border, since that wait notices the death itself, nor for a
        neighbour that begins evaluation again, which this stage joins by :meth:`renew`.
        """
        generation = self._present()
        if self._is_in_use or not 0 < self._generation < generation:
            return
        other = self._announced(generation)
        if other is not None and other["attempt"] <= self._attempt:
            self.reform("a new process")

    def attend_both(self) -> None:
        """Attends this border and the other one of the stage, which waits for a save of a later stage."""
        self.attend()
        self._elsewhere()

    def renew(self, attempt: int) -> None:
        """Makes the groups again, for all kinds of messages to begin anew, until both ends are in this attempt.

        Args:
            attempt: number that grows from call to call, the same on both ends.
        """
        self._attempt = attempt
        while self._common_attempt < attempt:
            self._raise(self._generation)
            self.reform("a new attempt")

    # ---- how a border is made ----------------------------------------------------------------------

    def _form(self, least: int) -> None:
        while True:
            began, start = time.time(), time.perf_counter()
            for end in self._ends.values():
                end.detach()
            for group in self._groups.values():
                group.close()
            self._generation, taken = self._meet(least)
            met, least = time.perf_counter(), self._generation + 1
            groups = self._connected()
            if groups is None:
                continue
            self._groups = {kind: self._watched(kind, group) for kind, group in groups.items()}
            connected = time.perf_counter()
            try:
                messages, nbytes = self._go_on(taken)
            except ALTransportError as error:
                if not error.lost:
                    raise
                continue
            replay = time.perf_counter() - connected
            self.reformed.append(
                Reformed(self._stages, self._generation, began, met - start, connected - met, replay, messages, nbytes)
            )
            return

    def _meet(self, least: int) -> tuple[int, dict[str, int]]:
        """Waits until both ends have announced themselves under one generation, which is ``least`` or higher.

        Returns:
            The generation, and the number of messages of each kind that the other end has taken.
        """
        taken = {kind: number for kind, end in self._ends.items() if (number := end.announced()) is not None}
        own, announced, since = json.dumps({"attempt": self._attempt, "taken": taken}), -1, time.monotonic()
        while True:
            generation = self._present()
            if generation < least and time.monotonic() - since > _GRACE:
                self._raise(generation)
            if generation >= least:
                if generation != announced:
                    self._room.set(f"{generation}/{self._end}", own)
                    announced = generation
                other = self._announced(generation)
                if other is not None:
                    self._common_attempt = min(self._attempt, other["attempt"])
                    return generation, other["taken"]
            self._recovery.check(self._stages[1])
            self._meanwhile()
            time.sleep(_POLL)

    def _announced(self, generation: int) -> dict[str, Any] | None:
        """What the other end has announced under this generation; ``None`` if it has not come yet."""
        key = f"{generation}/{1 - self._end}"
        return json.loads(self._room.get(key)) if self._room.check([key]) else None

    def _connected(self) -> dict[str, Any] | None:
        """Makes a group for each kind; ``None`` if the generation rises meanwhile, or an end cannot be reached.

        The groups are made in a thread, which is left behind where the other process has died: it would wait for it.
        """
        groups: dict[str, Any] = {}
        own = self._recovery.open_store()  # a connection that waits is blocked for all others
        room = PrefixStore(f"{self._prefix}/{self._generation}", own)

        def make() -> None:
            with contextlib.suppress(RuntimeError):
                for kind in sorted(self._ends):
                    store = PrefixStore(kind, room)
                    groups[kind] = connect(store, self._end, device=self._device, timeout=_TIMEOUT)

        thread = threading.Thread(target=make, name="ds_al border", daemon=True)
        thread.start()
        while thread.is_alive() and not self._has_risen():
            thread.join(_POLL / 5)
        return groups if not thread.is_alive() and len(groups) == len(self._ends) else None

    def _watched(self, kind: str, group: Any) -> WatchedGroup:
        """A group whose waits notice that the other process has died, and attend the other border if in training."""
        if kind == EVALUATION:
            return WatchedGroup(group, lost=self._has_risen)
        return WatchedGroup(group, lost=self._has_risen, meanwhile=self._meanwhile)

    def _meanwhile(self) -> None:
        """Lets the other border be made again while this one is in use.

        Without it, three could wait for each other: a stage for a message of the one before, which waits for a free
        place in its log, and that for a save of the new process after this stage, which waits for this border.
        """
        was_in_use, self._is_in_use = self._is_in_use, True
        try:
            self._elsewhere()
        finally:
            self._is_in_use = was_in_use

    def _go_on(self, taken: dict[str, int]) -> tuple[int, int]:
        """Continues all kinds in new groups; returns the number and the bytes of the messages that were sent again."""
        for kind, end in self._ends.items():
            end.attach(self._groups[kind], taken=taken.get(kind, 0))
        messages = nbytes = 0
        for entry, message in self.log.since(taken):
            self._ends[entry.kind].resend(entry, message)
            messages, nbytes = messages + 1, nbytes + entry.layout.nbytes
        return messages, nbytes

    def _present(self) -> int:
        return self._store.add(self._name, 0)

    def _has_risen(self) -> bool:
        """Whether a process at this border has died since it was made."""
        return self._present() > self._generation

    def _raise(self, generation: int) -> None:
        """Raises this generation by one, unless that has been done."""
        self._store.compare_set(self._name, str(generation), str(generation + 1))
