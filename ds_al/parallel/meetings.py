"""Meetings: joint operations of all ranks on small values.

::

    usually           collectives of the process group
    with recovery     rank r posts its value in the store, and reads those of all ranks: a process that takes another
                      one's place can come to a meeting that the others have left, since posts stay until all ranks
                      have written down what they read (:mod:`ds_al.parallel.journal`)

Values of a meeting over the store have a plain form (:mod:`ds_al.system.plain`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from deepspeed import comm as dist
from torch.distributed import Store

from ds_al.errors import ALTransportError
from ds_al.parallel.journal import Entry, Journal
from ds_al.system import values

_LOOKS = 0.001, 0.05  # seconds between two looks at the store, at first and later


class Interrupted(Exception):
    """A process has died while all ranks were inside a call that they have to repeat."""


class Room:
    """Where the ranks of a job with recovery meet.

    Args:
        rank, world: this rank, and number of ranks.
        store: connection to the store of the keepers.
        journal: of this rank.

    Attributes:
        while_waiting: called several times a second while this rank waits for others.
    """

    def __init__(self, rank: int, world: int, *, store: Store, journal: Journal) -> None:
        self.rank, self.world, self.store, self.journal = rank, world, store, journal
        self.while_waiting: Callable[[], None] = lambda: None
        self.number = 0
        """Meetings and joint calls that this rank has left."""
        self._attempt: int | None = None
        self._inside = False
        self._inner = 0
        self._posted: list[tuple[int, str]] = []
        self._recorded: list[Entry] = []

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, in their order."""
        if self._attempt is not None:
            return self._meet(value)
        if self._inside and self._recorded:
            self._inner += 1
            return self._recorded.pop(0).value
        kind = "inner" if self._inside else "meeting"
        if (entry := self.journal.take(kind, "gather")) is not None:
            found = entry.value
        else:
            found = self._meet(value)
            self.journal.add(kind, "gather", found)
            self.journal.flush()
        if not self._inside:
            self.leave()
        return found

    @contextmanager
    def call(self, *, attempt: int | None = None, recorded: Sequence[Entry] = ()) -> Iterator[None]:
        """Meets inside as part of one joint call.

        Args:
            attempt: number of the attempt at a call that all ranks begin again where a process dies; its meetings are
                not written down. ``None``: a call that a new process continues.
            recorded: meetings of this call that a process before this one has written down.
        """
        self._inside, self._attempt, self._inner, self._recorded = True, attempt, 0, list(recorded)
        try:
            yield
        finally:
            self._inside, self._attempt = False, None

    def leave(self) -> None:
        """Ends a meeting or a joint call, which is written down: all posts of earlier ones have been read."""
        self.number += 1
        self._inner = 0

    def deaths(self) -> int:
        """Number of processes that have died so far."""
        return self.store.add("deaths", 0)

    def others_have_posted(self) -> bool:
        """Whether another rank has come to the next meeting already."""
        keys = (self._key(rank) for rank in range(self.world) if rank != self.rank)
        return any(self.store.check([key]) for key in keys)

    def post(self, key: str, value: Any) -> Any:
        """Posts a value, unless one is there already; returns what is there."""
        key, data = f"{self.number}/{key}", values.encode(value, of="a value")
        self._posted.append((self.number, key))
        return values.decode(self.store.compare_set(key, "", data))  # type: ignore[arg-type]

    def _key(self, rank: int) -> str:
        return f"{self.number}/{self._attempt or 0}/{self._inner}/{rank}"

    def _meet(self, value: Any) -> list[Any]:
        keys = [self._key(rank) for rank in range(self.world)]
        self._inner += 1
        own = keys[self.rank]
        self.store.compare_set(own, "", values.encode(value, of="a value"))  # type: ignore[arg-type]
        self._posted.append((self.number, own))
        pause, longest = _LOOKS
        while not self._are_there(keys):
            time.sleep(pause)
            pause = min(2 * pause, longest)
            self.while_waiting()
            if self._attempt is not None and self.deaths() > self._attempt:
                raise Interrupted
        found = [values.decode(data) for data in self.store.multi_get(keys)]
        done = [key for number, key in self._posted if number < self.number]
        self._posted = [(number, key) for number, key in self._posted if number == self.number]
        for key in done:
            self.store.delete_key(key)
        return found

    def _are_there(self, keys: list[str]) -> bool:
        try:
            return self.store.check(keys)
        except RuntimeError as error:
            raise ALTransportError("the keeper of rank 0, which holds the store, has gone") from error


_room: Room | None = None


def use(room: Room) -> None:
    """Lets all ranks meet over the store from now on."""
    global _room
    _room = room


def room() -> Room | None:
    """Returns where ranks meet over the store; ``None`` where they meet in the process group."""
    return _room


def attend() -> None:
    """Lets neighbours whose processes have died connect again; whoever waits for other ranks calls it in a loop."""
    if _room is not None:
        _room.while_waiting()


def are_over() -> bool:
    """Whether the next meeting has begun without this rank, which thus took the place of one that was there."""
    return _room is not None and _room.others_have_posted()


def repeat() -> bool:
    """Whether this process does again what one before it has done, whose place it takes."""
    return _room is not None and _room.journal.next is not None


def gather(value: Any, *, group: Any = None) -> list[Any]:
    """Returns the values of all ranks of a group, in their order. Every one of them must call it."""
    if _room is not None:
        return _room.gather(value)
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def broadcast(value: Any, *, source: int) -> Any:
    """Returns the value of one rank. Every rank must call it."""
    if _room is not None:
        return _room.gather(value if _room.rank == source else None)[source]
    held = [value]
    dist.broadcast_object_list(held, src=source)
    return held[0]


def barrier(*, group: Any = None) -> None:
    """Waits until all ranks of a group have come."""
    if _room is not None:
        _room.gather(None)
    else:
        dist.barrier(group=group)
