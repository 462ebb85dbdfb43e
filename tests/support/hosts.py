"""Two hosts on one machine: network namespaces joined by a link, each with its own name, /dev/shm, folder and home.

::

    node0  10.173.0.1  ---- veth ----  node1  10.173.0.2

Ranks are put onto hosts by an argument of :class:`Places`, and a command by :meth:`Host.start`. Both hosts see the
files of this machine, but have different working directories: a relative path is a folder that they do not share.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from ds_al.studies.bench import namespaces
from tests.support.ranks import ROOT

_NEWNS, _NEWUTS, _NEWIPC, _NEWNET = 0x00020000, 0x04000000, 0x08000000, 0x40000000
_BIND, _REC, _PRIVATE = 0x1000, 0x4000, 0x40000
_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Host:
    """One host.

    Attributes:
        name: host name, which resolves to ``address`` on both hosts.
        address: on the link between the hosts.
        namespace: name of its network namespace.
        folder: its working directory and home.
        private: folder that has the same path on both hosts, and is another one on each, as a disk of its own is.
        names: file that takes the place of /etc/hosts.
    """

    name: str
    address: str
    namespace: str
    folder: Path
    private: Path
    names: Path

    def enter(self) -> None:
        """Moves this process onto the host, for good; threads that it has started already stay where they are."""
        with open(f"/var/run/netns/{self.namespace}") as network:
            _call("setns", network.fileno(), _NEWNET)
        _call("unshare", _NEWNS | _NEWUTS | _NEWIPC)
        _call("mount", b"none", b"/", None, _REC | _PRIVATE, None)
        _call("mount", b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=256m")
        _call("mount", b"tmpfs", bytes(self.private), b"tmpfs", 0, b"size=64m")
        _call("mount", bytes(self.names), b"/etc/hosts", None, _BIND, None)
        socket.sethostname(self.name)
        os.chdir(self.folder)
        os.environ |= self._environment()

    def start(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, log: Path
    ) -> subprocess.Popen[str]:
        """Starts a command on the host, in a session of its own, whose output goes to a file."""
        own = {name: value for name, value in os.environ.items() if name not in _RANK}
        own |= {**self._environment(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        with log.open("w") as file:
            return subprocess.Popen(
                command, env={**own, **(env or {})}, preexec_fn=self.enter, cwd=self.folder, text=True,
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def run(self, *command: str) -> None:
        """Runs a short command on the host's network, such as one of ``ip``."""
        subprocess.run(["ip", "netns", "exec", self.namespace, *command], check=True, capture_output=True, timeout=30)

    def _environment(self) -> dict[str, str]:
        return {"HOME": str(self.folder), "DS_AL_CACHE": str(self.folder / "cache")}


class Places(tuple[Host, ...]):
    """The host of every rank: an argument of a worker, which moves the rank that unpickles it onto its host.

    :func:`~ds_al.launch.ranks.run_ranks` reads arguments first, before the rank opens or looks for a store.
    """

    def here(self) -> Host:
        """The host of this rank."""
        return self[int(os.environ["RANK"])]

    def __reduce__(self) -> tuple[Callable[..., Places], tuple[tuple[Host, ...]]]:
        return _arrive, (tuple(self),)


def _arrive(hosts: tuple[Host, ...]) -> Places:
    places = Places(hosts)
    places.here().enter()
    return places


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Makes two hosts, and removes them at the end. Skips the test where this machine does not allow it."""
    addresses = dict(zip(("node0", "node1"), namespaces.ADDRESSES, strict=True))
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.delenv("GLOO_SOCKET_IFNAME", raising=False)  # an engine of an earlier test in this process has set it
        try:
            stack.enter_context(namespaces.joined_namespaces())
        except namespaces.NotAllowed as error:
            pytest.skip(f"two hosts on one machine: {error}")
        hosts, private = [], folder / "private"
        private.mkdir()
        for (name, address), namespace in zip(addresses.items(), namespaces.names(os.getpid()), strict=True):
            own = folder / name
            own.mkdir()
            names = folder / f"hosts-{name}"
            names.write_text("\n".join(lines) + "\n")
            hosts.append(Host(name, address, namespace, own, private, names))
        yield hosts[0], hosts[1]


def finished(processes: Sequence[subprocess.Popen[str]], logs: Sequence[Path], *, seconds: float) -> list[str]:
    """Waits for commands on hosts, ends what is left of their sessions, and returns their outputs."""
    try:
        for process in processes:
            process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        pytest.fail("\n".join([f"not done after {seconds} s", *(log.read_text()[-3000:] for log in logs)]))
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return [log.read_text() for log in logs]
