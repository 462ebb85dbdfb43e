"""Whether hosts reach each other, found out at the start, since gloo would try for half an hour and name no host.

::

    rank r > 0          ---> the store of rank 0            a route, and no firewall before its port
    host a, host b      ---> where the other one listens    the right interface, and no firewall before other ports
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

from torch.distributed import Store

from ds_al.errors import ALConfigError
from ds_al.parallel.waiting import Waiting

_ATTEMPT = 5.0  # seconds for a connection between two hosts
_ROUTE = 30.0  # seconds after which an address without a route, or that does not answer, counts as out of reach


def network() -> str:
    """Identifies the network of this process: two with the same one reach each other over its loopback interface."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        return socket.gethostname()


def await_address(address: str, port: int, *, waiting: Waiting) -> None:
    """Waits until something listens on a port of another host, or the time is over.

    Raises:
        ALConfigError: the host's name is unknown, it has no route, or does not answer at all.
    """
    here, limit = socket.gethostname(), min(waiting.seconds, _ROUTE) - _ATTEMPT
    while waiting.left:
        try:
            socket.create_connection((address, port), timeout=_ATTEMPT).close()
            return
        except ConnectionError:  # it answers: the first rank has not come yet
            waiting.say(f"rank 0, which does not listen on {address}:{port} (MASTER_ADDR:MASTER_PORT) yet")
        except OSError as error:
            if waiting.waited > limit:
                raise ALConfigError(
                    f"host {here} cannot reach the first rank at {address}:{port} (MASTER_ADDR:MASTER_PORT): "
                    f"{error.strerror or error}. Set MASTER_ADDR (--master_addr) to a name or an address of its host "
                    f"that {here} has a route to, and open the port in its firewall"
                ) from None
        time.sleep(0.2)


def check_hosts(rank: int, hosts: Sequence[str], room: Store, *, networks: Sequence[str], seconds: float) -> None:
    """Checks that every host can connect to every other one where gloo will listen. Every rank must call it.

    Args:
        hosts: host of every rank.
        room: store that all ranks reach.
        networks: network of every rank (:func:`network`), one for each host.
        seconds: time-out.

    Raises:
        ALConfigError: on all ranks: a host cannot reach another one.
    """
    speakers = [networks.index(each) for each in dict.fromkeys(networks)]  # the first rank of each host
    if len(speakers) == 1:
        return
    limit = timedelta(seconds=seconds)
    with contextlib.ExitStack() as stack:  # the sockets stay open until all have tried
        if rank in speakers:
            room.set(f"interfaces/{rank}", f"{_interfaces()} on {hosts[rank]}")
            room.set(f"faults/{rank}", json.dumps(_faults(rank, hosts, speakers, room, limit, stack)))
        keys = [f"faults/{speaker}" for speaker in speakers]
        room.wait(keys, limit)
        faults = [text for key in keys for text in json.loads(room.get(key))]
        interfaces = "; ".join(room.get(f"interfaces/{speaker}").decode() for speaker in speakers) if faults else ""
    room.set(f"read/{rank}", "")
    if rank == 0 and faults:  # its end closes the store
        with contextlib.suppress(RuntimeError):
            room.wait([f"read/{other}" for other in range(len(hosts))], timedelta(seconds=_ATTEMPT))
    if faults:
        raise ALConfigError(
            f"{'; '.join(faults)}. Set GLOO_SOCKET_IFNAME on every host to the interface that joins the hosts "
            f"({interfaces}), let a firewall pass TCP between them, and export the variable to the "
            "other hosts (.deepspeed_env; docs/clusters.md)"
        )


def _faults(
    rank: int, hosts: Sequence[str], speakers: Sequence[int], room: Store, limit: timedelta, stack: contextlib.ExitStack
) -> list[str]:
    """Listens as gloo will, and returns why this host does not, and which other ones it does not reach."""
    try:
        listener = stack.enter_context(socket.socket())
        listener.bind((listening_address(), 0))
        listener.listen(64)
        place, own = listener.getsockname(), []
    except ALConfigError as error:
        place, own = ("", 0), [str(error)]
    room.set(f"listens/{rank}", json.dumps(place))
    others = [other for other in speakers if other != rank]
    room.wait([f"listens/{other}" for other in others], limit)
    places = [json.loads(room.get(f"listens/{other}")) for other in others]
    with ThreadPoolExecutor(len(others)) as pool:  # one time-out, however many hosts do not answer
        found = pool.map(lambda other, place: _unreached(hosts[rank], hosts[other], *place), others, places)
    return [text for text in (*own, *found) if text]


def listening_address() -> str:
    """Returns the address that gloo listens on: that of ``GLOO_SOCKET_IFNAME``, or that of this host's own name.

    Raises:
        ALConfigError: there is no such interface, or it has no address.
    """
    if name := os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]:
        return _address_of(name)
    with contextlib.suppress(OSError), socket.socket() as probe:
        address = socket.gethostbyname(socket.gethostname())
        probe.bind((address, 0))
        return address
    return "127.0.0.1"  # gloo's own choice where the name does not resolve to this host


def _address_of(interface: str) -> str:
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", interface.encode()[:15]))  # SIOCGIFADDR
        except OSError as error:
            raise ALConfigError(
                f"host {socket.gethostname()}: got GLOO_SOCKET_IFNAME={interface}: {error.strerror}; expected one of "
                f"{_interfaces()}, with an IPv4 address"
            ) from None
    return socket.inet_ntoa(answer[20:24])


def _interfaces() -> str:
    return ", ".join(name for _, name in socket.if_nameindex())


def _unreached(here: str, there: str, address: str, port: int) -> str:
    """Why one host does not reach another one; empty if it does, or the other one does not listen."""
    if not address:
        return ""
    if address.startswith("127."):
        return f"host {there} listens on {address}, which host {here} does not reach: it is {there}'s own"
    try:
        socket.create_connection((address, port), timeout=_ATTEMPT).close()
    except OSError as error:
        return f"host {here} does not reach host {there} at {address}:{port}: {error.strerror or error}"
    return ""
