"""The key-value store of the job, through which ranks talk beside the messages of training.

::

    rank 0    server, on the interface of MASTER_ADDR alone
    rank r    client: one connection of DeepSpeed's, and one for each use here

An operation on a store whose server is stopped never returns; whoever must notice that needs another thread.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch import distributed
from torch.distributed import PrefixStore, Store, TCPStore

from ds_al.errors import ALConfigError
from ds_al.parallel.launchers import LOOPBACK

SECONDS = 5.0
"""Time-out of a connection."""
_READING = 300.0  # seconds for which the server may be late to answer a read, where its machine is busy or was paused

HOSTED = "TORCHELASTIC_USE_AGENT_STORE"
"""Variable by which torchrun tells torch that the store is there already."""
_RESTARTS = "TORCHELASTIC_RESTART_COUNT"
_server: Any = None  # lives as long as the process


def connect(name: str, *, seconds: float = SECONDS) -> Store | None:
    """Opens a connection to the store.

    Args:
        name: prefix of its keys.
        seconds: time-out.

    Returns:
        ``None`` where the store cannot be reached.
    """
    try:
        return _opened(name, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), seconds=seconds)
    except (KeyError, ValueError, RuntimeError):
        return None


def connect_group(name: str, *, seconds: float) -> Store | None:
    """Opens a connection to the store in which the group of all ranks met. All ranks get one, or none does.

    Args:
        name: prefix of its keys.
        seconds: time within which a rank tries again, as where the machine is busy.

    Returns:
        ``None`` on all ranks where they met without a TCP store.

    Raises:
        ALConfigError: the store cannot be reached.
    """
    met: Any = distributed.distributed_c10d._get_default_store()
    while isinstance(met, PrefixStore):
        met = met.underlying_store
    if not isinstance(met, TCPStore):
        return None
    deadline = time.monotonic() + seconds
    while True:
        try:
            return _opened(name, met.host, met.port, seconds=SECONDS)
        except RuntimeError as error:
            if time.monotonic() > deadline:
                raise ALConfigError(
                    f"{socket.gethostname()} does not reach the store of the job at {met.host}:{met.port} any more: "
                    "the rank that hosts it has ended, or the network is down"
                ) from error
            time.sleep(0.1)


def _opened(name: str, address: str, port: int, *, seconds: float) -> Store:
    client = TCPStore(
        address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds)
    )  # fmt: skip
    client.set_timeout(timedelta(seconds=_READING))  # all keys that are read are there; a lost connection tells at once
    return PrefixStore(f"ds_al/{os.environ.get(_RESTARTS, '0')}/{name}", client)


def await_keys(room: Store, keys: list[str], *, seconds: float) -> bool:
    """Waits until all keys are there, and returns whether they are.

    It asks again and again, since torch prints a warning of each wait of its own that was in vain.

    Raises:
        RuntimeError: rank 0 has ended, and with it the store.
    """
    deadline, pause = time.monotonic() + seconds, 0.001
    while not room.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    return True


def host() -> None:
    """Opens the store on rank 0, unless it is open: torch would open it on all interfaces.

    A job that a process under torchrun has started by another launcher inherits torchrun's variable, without its store.

    Raises:
        ALConfigError: another process listens on the port.
    """
    global _server
    if _server is not None or os.environ["RANK"] != "0":
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if HOSTED in os.environ and not _is_refused(address, port):
        return
    listener = _listener(address, port)
    _server = TCPStore(
        address,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _is_refused(address: str, port: int) -> bool:
    """Whether a host answers, and nothing listens on its port."""
    try:
        socket.create_connection((address, port), timeout=SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:  # what waits for the ranks says that the host is not reached
        return False
    return False


def _listener(address: str, port: int) -> socket.socket:
    """A socket on the interface that has this address; on all of them where none has, as behind a translation."""
    family, *_, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        try:
            listener.bind(where)
        except OSError as error:
            if error.errno != 99:  # EADDRNOTAVAIL
                raise
            listener.bind(("", port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ALConfigError(
            f"rank 0 cannot listen on {address}:{port} (MASTER_ADDR:MASTER_PORT): {error.strerror}. Another job may "
            "use the port: choose another one (deepspeed --master_port, torchrun --master-port)"
        ) from None
    return listener


@contextmanager
def hosted() -> Iterator[None]:
    """Lets torch connect to the store that :func:`host` has opened, instead of opening one."""
    ours = {name: value for name, value in ((HOSTED, "True"), (_RESTARTS, "0")) if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


@contextmanager
def hosted_here() -> Iterator[None]:
    """Opens the store where all ranks are on this host, for whatever makes the process group inside.

    With ranks on several hosts it is opened when they join, since a rank may enter its host first.
    """
    if os.environ["MASTER_ADDR"] not in LOOPBACK:
        yield
        return
    host()
    with hosted():
        yield
