"""Emulates two machines: network namespaces joined by a pair of virtual interfaces with a limited rate at each end.

::

    namespace ds_al-PID-0                           namespace ds_al-PID-1
      link0  10.173.0.1/30  ---- veth, tbf ----       link0  10.173.0.2/30

Traffic stays within the two namespaces. They are always removed at the end; the next process removes those of a killed
one. This needs root, and ``ip`` and ``tc`` of iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

INTERFACE = "link0"
ADDRESSES = ("10.173.0.1", "10.173.0.2")
_PREFIX = "ds_al-"
_BURST = 64 * 1024  # bytes of a burst: the size of the largest packet, small compared with a message

Command = list[str]


class NotAllowed(RuntimeError):
    """This process or machine cannot create such a link; the message names the missing requirement."""


def names(pid: int) -> tuple[str, str]:
    """Returns the names of a process's two namespaces."""
    return f"{_PREFIX}{pid}-0", f"{_PREFIX}{pid}-1"


def creation(pid: int) -> list[Command]:
    """Returns the commands that create, join and start both namespaces."""
    one, two = names(pid)
    commands = [f"ip netns add {one}", f"ip netns add {two}"]
    commands += [f"ip link add {INTERFACE} netns {one} type veth peer name {INTERFACE} netns {two}"]
    for name, address in zip((one, two), ADDRESSES, strict=True):
        commands += [
            f"ip -n {name} address add {address}/30 dev {INTERFACE}",
            f"ip -n {name} link set lo up",
            f"ip -n {name} link set {INTERFACE} up",
        ]
    return [command.split() for command in commands]


def limit(mbit: float | None) -> Command:
    """Returns the command that limits the rate of this end of the link, to run in its namespace; ``None``: no limit."""
    if mbit is None:
        return f"tc qdisc replace dev {INTERFACE} root pfifo".split()
    return f"tc qdisc replace dev {INTERFACE} root tbf rate {mbit:g}mbit burst {_BURST} limit 16mb".split()


def within(pid: int) -> list[Command]:
    """Returns, for each rank, the prefix that runs a command in its namespace."""
    return [f"ip netns exec {name}".split() for name in names(pid)]


def environment() -> dict[str, str]:
    """Returns the environment variables that make ranks connect over the link."""
    return {"MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": INTERFACE}


@contextmanager
def joined_namespaces() -> Iterator[list[Command]]:
    """Creates the two namespaces of this process, yields :func:`within` of them, and removes them.

    Raises:
        NotAllowed: root, a tool or a part of the kernel is missing.
    """
    check()
    remove_stale()
    pid = os.getpid()
    try:
        for command in creation(pid):
            run(command)
        for prefix in within(pid):  # detects a kernel without tbf early
            run([*prefix, *limit(1000)])
        yield within(pid)
    finally:
        remove(names(pid))


def check() -> None:
    """Raises:
    NotAllowed: this process is not root, or a tool is missing.
    """
    if os.geteuid() != 0:
        raise NotAllowed("network namespaces need root: run this as root, on a machine or in a container of your own")
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        raise NotAllowed(f"{' and '.join(missing)} not found: install iproute2")


def run(command: Sequence[str]) -> None:
    """Runs a command.

    Raises:
        NotAllowed: the command failed; the message contains its output.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise NotAllowed(f"this machine does not allow `{' '.join(command)}`: {done.stderr.strip()}")


def remove(namespaces: Sequence[str]) -> None:
    """Removes namespaces and their interfaces, and ignores those that do not exist."""
    for name in namespaces:
        if name in existing():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=30)


def remove_stale() -> None:
    """Removes the namespaces of processes that no longer exist."""
    remove([name for name in existing() if not Path("/proc", name.removeprefix(_PREFIX).split("-")[0]).exists()])


def existing() -> list[str]:
    """Returns all namespaces created by this module in any process."""
    return sorted(path.name for path in Path("/var/run/netns").glob(f"{_PREFIX}*"))


def sent_bytes() -> int:
    """Returns the bytes sent from this end of the link so far, including headers; call it within a namespace."""
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())
