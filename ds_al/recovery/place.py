"""Place of a stage in its run, which its process writes to a file after every batch, and its keeper reads."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

_NUMBER = struct.Struct("<q")


class Place:
    """A number that outlives the process.

    Args:
        path: of the file; it is made where it does not exist.
    """

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as file:
            if not file.tell():
                file.write(_NUMBER.pack(0))
                file.flush()
            self._memory = mmap.mmap(file.fileno(), _NUMBER.size)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of this run that are trained."""
        return _NUMBER.unpack(self._memory[: _NUMBER.size])[0]

    @micro_batches.setter
    def micro_batches(self, count: int) -> None:
        _NUMBER.pack_into(self._memory, 0, count)
