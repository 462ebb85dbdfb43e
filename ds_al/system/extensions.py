"""DeepSpeed's extensions in C++, which torch compiles at their first use: what is compiled, and locks left behind.

A compilation holds a file ``lock`` open, and so does every later start, which loads what was compiled. One that is
killed leaves the file, and torch then waits for it forever.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ds_al.errors import ALConfigError

SHARED_MEMORY = "deepspeed_shm_comm"
"""All-reduce in shared memory, which DeepSpeed loads at every start on a CPU."""

_LONGEST = 600.0  # seconds: no compilation takes as long
_NETWORK = ("nfs", "lustre", "gpfs", "beegfs", "cifs", "ceph", "fuse", "9p", "afs", "glusterfs")


FUSED_ADAM = "fused_adam"
"""Adam and AdamW of DeepSpeed, which ``"torch_adam": true`` replaces by those of torch."""


def of_optimizer(name: str | None, params: Mapping[str, Any] | None) -> str | None:
    """Returns the extension that an optimizer of DeepSpeed needs, where it may have to be compiled."""
    return FUSED_ADAM if (name or "").lower() in ("adam", "adamw") and not (params or {}).get("torch_adam") else None


def folder_of(name: str) -> Path:
    """Returns the folder in which torch compiles an extension."""
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    if root := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(root) / name
    kind = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
    return Path(get_default_build_root()) / f"py{sys.version_info.major}{sys.version_info.minor}_{kind}" / name


def is_compiled(name: str) -> bool:
    """Whether an extension has been compiled."""
    return (folder_of(name) / f"{name}.so").is_file()


@contextmanager
def compiling(name: str | None, *, tell: bool) -> Iterator[None]:
    """Says that an extension is compiled inside, and how long it took; waits for the compilation of another process.

    Args:
        name: of the extension; ``None`` for none.
        tell: whether this process says so, on its standard error.

    Raises:
        ALConfigError: a killed compilation has left its lock.
    """
    if name is None:
        yield
        return
    with _one_at_a_time(folder_of(name)):
        _await_lock(folder_of(name) / "lock", compiled=is_compiled(name), tell=tell)
    if is_compiled(name) or not tell:
        yield
        return
    print(f"compiling {name} of DeepSpeed, once, into {folder_of(name)}: 1 to 2 minutes", file=sys.stderr, flush=True)
    start = time.perf_counter()
    yield
    print(f"compiled {name} in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Lets one process of ds_al after the other look at the lock in a folder, so that one alone removes it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        guard = os.open(folder / ".ds_al", os.O_CREAT | os.O_RDWR)
    except OSError:  # compiled by another user, into a folder of theirs
        yield
        return
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(guard, fcntl.LOCK_EX)
        yield
    finally:
        os.close(guard)


def _await_lock(lock: Path, *, compiled: bool, tell: bool) -> None:
    """Waits while another process compiles; removes the lock of one that was killed while it loaded what is compiled.

    Raises:
        ALConfigError: none does, as far as this machine knows.
    """
    unheld, told = 0, False
    while lock.exists():
        unheld = 0 if is_held(lock) else unheld + 1
        age = time.time() - _modified(lock)
        if unheld > 5 and (age > _LONGEST or not _on_network(lock)):
            if compiled:
                lock.unlink(missing_ok=True)
                return
            raise ALConfigError(
                f"{lock} was left by a compilation that has been killed, and torch would wait for it forever: remove "
                "this file, and start again"
            )
        if tell and not told:
            told = True
            print(f"waiting for another process that compiles: {lock}", file=sys.stderr, flush=True)
        time.sleep(0.2)


def is_held(lock: Path) -> bool:
    """Whether a process of this machine holds a lock of torch, as far as this user may know."""
    target = str(lock.resolve())
    return any(target in _opened(process) for process in os.listdir("/proc") if process.isdecimal())


def _opened(process: str) -> Iterator[str]:
    """Yields what a process has open, as far as this user may know; it may end meanwhile."""
    with suppress(OSError):
        for number in os.listdir(f"/proc/{process}/fd"):
            with suppress(OSError):
                yield os.readlink(f"/proc/{process}/fd/{number}")


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _on_network(path: Path) -> bool:
    """Whether another machine may see this file, too."""
    mounts = []
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if path.resolve().is_relative_to(where):
            mounts.append((len(where), kind))
    return max(mounts, default=(0, ""))[1].startswith(_NETWORK)
