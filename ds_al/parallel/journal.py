"""Journal of a rank: what its script got from other ranks and from training, in its order.

A process that takes the place of another one runs the script again from its start, and reads what the former one has
written, instead of asking other ranks again::

    meeting "gather"   values of all ranks           outside of calls of the engine
    inner   "gather"   values of all ranks           inside of a call that a new process may have to repeat
    batch              loss                          train_batch()
    call    "evaluate" result, and what it changed   a joint call

The file survives the process, not the machine: nothing is flushed to the disk itself.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from ds_al.errors import ALRecoveryError
from ds_al.system import values

_HEAD = struct.Struct("<II")  # length, checksum


class Entry(NamedTuple):
    """One entry."""

    kind: str
    name: str
    value: Any


class Journal:
    """Reads what a former process of this rank has written, then writes on.

    Args:
        path: of the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._file.seek(0)
        self.next = self._read()
        """The entry that the script comes to next; ``None`` once it has done more than any process before."""

    def take(self, kind: str, name: str) -> Entry | None:
        """Returns the next entry; ``None`` where there is none.

        Raises:
            ALRecoveryError: the script does something else than it did before.
        """
        entry = self.next
        if entry is None:
            return None
        if entry[:2] != (kind, name):
            raise ALRecoveryError(
                f"recovery: the script came to {kind} {name!r}, where the process before this one came to "
                f"{entry.kind} {entry.name!r}: a script must do the same again up to where a process died. Draw no "
                "conclusions from clocks, process numbers, or files that the script itself changes"
            )
        self.next = self._read()
        return entry

    def skip_inner(self) -> list[Entry]:
        """Takes the entries inside a call, up to its own."""
        found = []
        while self.next is not None and self.next.kind == "inner":
            found.append(self.next)
            self.next = self._read()
        return found

    def add(self, kind: str, name: str, value: Any) -> None:
        """Writes an entry; :meth:`flush` hands it to the operating system."""
        data = values.encode([kind, name, value], of=f"{kind} {name}")
        self._file.write(_HEAD.pack(len(data), zlib.crc32(data)) + data)

    def flush(self) -> None:
        """Lets all entries survive this process."""
        self._file.flush()

    def _read(self) -> Entry | None:
        start = self._file.tell()
        head = self._file.read(_HEAD.size)
        if len(head) == _HEAD.size:
            length, checksum = _HEAD.unpack(head)
            data = self._file.read(length)
            if len(data) == length and zlib.crc32(data) == checksum:
                return Entry(*values.decode(data))
        self._file.seek(start)
        self._file.truncate()  # what the process before was writing when it died
        return None
