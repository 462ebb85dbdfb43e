"""A process group of gloo whose waits end when the process at its other end has died.

gloo raises an error in a wait for a message of which nothing has been transferred. If a part of it has been, the wait
does not end, neither at the sender nor at the receiver, and one with a time-out would break a connection that is only
slow. Here a thread waits, in the order of the transfers, and the caller looks after the other process meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from torch import Tensor

_LOOK = 0.05  # seconds between two looks after the other process


class WatchedGroup:
    """The part of a process group that channels use.

    Args:
        group: of two ranks, for messages in one direction.
        lost: whether the process at the other end has died; called by whoever waits.
        meanwhile: called again and again by whoever waits.
    """

    def __init__(self, group: Any, *, lost: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> None:
        self._group, self._lost, self._meanwhile = group, lost, meanwhile
        self._transfers: SimpleQueue[_Transfer | None] = SimpleQueue()
        threading.Thread(target=_wait_for, args=(self._transfers,), name="ds_al transfers", daemon=True).start()

    def rank(self) -> int:
        """Number of this end."""
        number: int = self._group.rank()
        return number

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> _Transfer:
        """Begins to send."""
        return self._watched(self._group.send(tensors, peer, tag))

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> _Transfer:
        """Begins to receive."""
        return self._watched(self._group.recv(tensors, peer, tag))

    def close(self) -> None:
        """Ends the thread, unless it waits for a process that has died."""
        self._transfers.put(None)

    def _watched(self, work: Any) -> _Transfer:
        transfer = _Transfer(work, self._lost, self._meanwhile)
        self._transfers.put(transfer)
        return transfer


class _Transfer:
    """A transfer that has begun."""

    def __init__(self, work: Any, lost: Callable[[], bool], meanwhile: Callable[[], None]) -> None:
        self.work, self._lost, self._meanwhile = work, lost, meanwhile
        self.ended = threading.Event()
        self.error = ""

    def wait(self) -> None:
        """Waits until it is complete.

        Raises:
            RuntimeError: the other process is lost.
            ALTransportError: raised by ``meanwhile``.
        """
        while not self.ended.wait(_LOOK):
            if self._lost():
                raise RuntimeError("its process has died")
            self._meanwhile()
        if self.error:
            raise RuntimeError(self.error)


def _wait_for(transfers: SimpleQueue[_Transfer | None]) -> None:
    while (transfer := transfers.get()) is not None:
        try:
            transfer.work.wait()
        except RuntimeError as error:
            transfer.error = str(error)
        transfer.work = None
        transfer.ended.set()
        del transfer  # it holds the buffer and the connection
