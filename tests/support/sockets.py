"""Which addresses processes listen on, by the tables of the kernel."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import subprocess
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.support.hosts import Host

_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")


def listening_here() -> set[str]:
    """Addresses that this process listens on."""
    own = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            own.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    rows = _rows(line for name in _TABLES for line in Path(name).read_text().splitlines())
    return {address for address, inode in rows if inode in own}


class Watch:
    """Collects the addresses that all processes of a host listen on, from now on, several times a second."""

    def __init__(self, host: Host) -> None:
        self.found: set[str] = set()
        self._command = ["ip", "netns", "exec", host.namespace, "cat", *_TABLES]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.3):
            text = subprocess.run(self._command, capture_output=True, text=True, timeout=30).stdout
            self.found |= {address for address, _ in _rows(text.splitlines())}


def _rows(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Address and inode of each socket that listens."""
    for row in map(str.split, lines):
        if len(row) > 9 and row[3] == "0A":
            yield _address(row[1].split(":")[0]), row[9]


def _address(text: str) -> str:
    """An address of the tables: words of four bytes in the order of the machine, which is little endian."""
    words = [bytes.fromhex(text[begin : begin + 8])[::-1] for begin in range(0, len(text), 8)]
    return str(ipaddress.ip_address(b"".join(words)))
