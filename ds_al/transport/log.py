"""Log of the messages that a stage has sent to a neighbour, from which it sends them again to a new process there.

::

    restart point of the neighbour                      latest message
                 |  m  m+1  m+2  ...                          |  append
      <- trim ---+--------------------------------------------+
                       at most ``mib`` MiB, in memory or in files

All kinds of messages are in one log, in the order in which they were sent, since the neighbour takes them in this
order. At its limit the log waits until the neighbour has saved.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ds_al.errors import ALConfigError, ALTransportError
from ds_al.transport.layout import Layout

Message = tuple[Tensor, ...]
_POLL = 0.01  # seconds between two looks at the restart point while the log is full


class Entry(NamedTuple):
    """A message of the log."""

    kind: str
    number: int
    """Number among the messages of its kind."""
    micro_batch: int
    """Micro-batch at which it was sent."""
    shapes: int
    """How often shapes had been reset before it."""
    layout: Layout
    place: Any
    """Where its tensors are stored."""


class Storage(Protocol):
    """Stores messages."""

    def put(self, layout: Layout, message: Message) -> Any:
        """Stores a copy of a message, and returns its place."""

    def get(self, layout: Layout, place: Any) -> Message:
        """Returns the tensors of a message."""

    def free(self, layout: Layout, place: Any) -> None:
        """Forgets a message."""


class Memory:
    """Stores messages in memory, in buffers that are used again.

    Args:
        limit: most bytes of unused buffers.
    """

    def __init__(self, limit: float) -> None:
        self._limit, self._unused = limit, dict[int, list[Tensor]]()
        self._nbytes = 0

    def put(self, layout: Layout, message: Message) -> Tensor:
        """Copies a message into a buffer."""
        unused = self._unused.get(layout.nbytes)
        if unused:
            buffer = unused.pop()
            self._nbytes -= layout.nbytes
        else:
            buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
        _copy(layout, buffer, message)
        return buffer

    def get(self, layout: Layout, place: Tensor) -> Message:
        """Returns views of a buffer."""
        return layout.views(place)

    def free(self, layout: Layout, place: Tensor) -> None:
        """Keeps a buffer for later messages of its size."""
        if self._nbytes + layout.nbytes > self._limit:
            self._unused.clear()
            self._nbytes = 0
        self._unused.setdefault(layout.nbytes, []).append(place)
        self._nbytes += layout.nbytes


class Files:
    """Stores every message in a file.

    Args:
        folder: of these files alone; it is emptied.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob("*.message"):
            file.unlink()

    def put(self, layout: Layout, message: Message) -> Path:
        """Writes a message.

        Raises:
            ALTransportError: the file cannot be written.
        """
        buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
        _copy(layout, buffer, message)
        path = self._folder / f"{self._count}.message"
        self._count += 1
        try:
            buffer.numpy().tofile(path)
        except OSError as error:
            raise ALTransportError(
                f"the log of messages cannot be written to {path}: {error}. Free space there, or keep it in memory "
                '("log": "memory")'
            ) from None
        return path

    def get(self, layout: Layout, place: Path) -> Message:
        """Reads a message."""
        return layout.views(torch.from_file(str(place), size=layout.nbytes, dtype=torch.uint8))

    def free(self, layout: Layout, place: Path) -> None:
        """Removes the file."""
        place.unlink(missing_ok=True)


def _copy(layout: Layout, buffer: Tensor, message: Message) -> None:
    for view, tensor in zip(layout.views(buffer), message, strict=True):
        view.copy_(tensor)


class MessageLog:
    """Messages that a neighbour may need again.

    Args:
        mib: most MiB of messages.
        interval: micro-batches between two saves of the neighbour.
        ahead: most messages of a kind that are sent and not yet used.
        restart_point: returns the micro-batch at which a new process of the neighbour would begin.
        folder: of the files; ``None`` keeps messages in memory.
    """

    def __init__(
        self, *, mib: float, interval: int, ahead: int, restart_point: Callable[[], int], folder: Path | None
    ) -> None:
        self._mib, self._limit = mib, mib * 2**20
        self._interval, self._ahead, self._restart_point = interval, ahead, restart_point
        self._storage: Storage = Memory(self._limit) if folder is None else Files(folder)
        self._entries: deque[Entry] = deque()
        self._kinds: set[str] = set()
        self._look = 0  # micro-batch from which on the restart point is read again
        self.nbytes = 0
        """Bytes of all messages in the log."""

    def append(
        self,
        kind: str,
        message: Message,
        *,
        number: int,
        micro_batch: int,
        shapes: int,
        idle: Callable[[], None],
    ) -> float:
        """Adds a copy of a message, and returns the seconds for which it has waited while the log was full.

        Args:
            kind, number, micro_batch, shapes: see :class:`Entry`.
            message: its tensors.
            idle: called again and again while the log is full.

        Raises:
            ALConfigError: the limit is smaller than what is sent between two saves.
            ALTransportError: the log cannot be written.
        """
        layout = Layout.of(message)
        if kind not in self._kinds:
            self._kinds.add(kind)
            if number == micro_batch:  # a message per micro-batch
                self._check(layout.nbytes * (self._interval + self._ahead))
        if micro_batch >= self._look:
            self._look = micro_batch + max(1, self._interval // 2)
            self.trim()
        start = time.perf_counter()
        while not self._has_room(layout.nbytes, micro_batch):
            time.sleep(_POLL)
            idle()
        waited = time.perf_counter() - start
        self.nbytes += layout.nbytes
        self._entries.append(Entry(kind, number, micro_batch, shapes, layout, self._storage.put(layout, message)))
        return waited

    def _has_room(self, nbytes: int, micro_batch: int) -> bool:
        if self.nbytes + nbytes <= self._limit:
            return True
        point = self.trim()
        if self.nbytes + nbytes <= self._limit:
            return True
        if micro_batch < point + self._interval:  # the neighbour cannot reach its next save
            self._check((self.nbytes + nbytes) * self._interval / (micro_batch - point + 1))
        return False

    def _check(self, nbytes: float) -> None:
        """Refuses a limit that does not hold the messages between two saves."""
        if nbytes > self._limit:
            raise ALConfigError(
                f"the log of messages may take {self._mib:g} MiB, and the messages between two saves, {self._interval} "
                f"micro-batches apart, and those in flight take {nbytes / 2**20:.4g} MiB: raise its limit to "
                f"{math.ceil(nbytes / 2**20)} MiB, or save more often"
            )

    def trim(self) -> int:
        """Forgets what the neighbour will not need again, and returns its restart point."""
        point = self._restart_point()
        while self._entries and self._entries[0].micro_batch < point:
            entry = self._entries.popleft()
            self.nbytes -= entry.layout.nbytes
            self._storage.free(entry.layout, entry.place)
        return point

    def since(self, taken: Mapping[str, int]) -> Iterator[tuple[Entry, Message]]:
        """Yields the messages from these numbers on, in the order in which they were appended.

        Args:
            taken: for each kind, how many messages the neighbour has had.
        """
        for entry in list(self._entries):
            if entry.number >= taken[entry.kind]:
                yield entry, self._storage.get(entry.layout, entry.place)
