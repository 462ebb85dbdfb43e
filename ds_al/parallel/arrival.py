"""Arrival of the ranks: all of them have come, each once, with the same software, before any connects to another one.

::

    rank r    its number, once ---> host, job, software ---> store ---> those of all ranks ---> the same error, or none

A host that does not reach the store can tell nobody but its own user; the others say every few seconds whom they
wait for.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta

from torch.distributed import Store

from ds_al.errors import ALConfigError
from ds_al.parallel import launchers, presence, reach, store
from ds_al.parallel.facts import differences, environment
from ds_al.parallel.waiting import LATER, Waiting

_SLICE = 1.0  # seconds between two looks at who has come
_READING = 5.0  # seconds for which rank 0, which holds the store, waits until all others have read it
_ANOTHER = (
    "Choose another port (deepspeed --master_port, torchrun --master-port) if another job uses this one, and give "
    "every host a --node_rank of its own"
)


@dataclass
class Arrival:
    """What a rank tells when it comes.

    Attributes:
        rank: its number.
        host: name of its machine.
        process: number of its process there.
        network: identity of the network that it is in (:func:`ds_al.parallel.reach.network`).
        software: releases and code.
    """

    rank: int
    host: str = field(default_factory=socket.gethostname)
    process: int = field(default_factory=os.getpid)
    network: str = field(default_factory=reach.network)
    software: dict[str, str] = field(default_factory=environment)

    @property
    def name(self) -> str:
        """Its number and host."""
        return f"{self.rank} ({self.host})"


def await_all(rank: int, world: int, *, seconds: float, gloo: bool) -> list[Arrival]:
    """Waits until every rank has come, checks that they can work together, and starts their presence.

    Args:
        rank: of this process.
        world: number of ranks.
        seconds: time-out.
        gloo: whether to check that hosts can connect to each other where gloo listens.

    Returns:
        All ranks, in their order.

    Raises:
        ALConfigError: a rank has not come, and those that have are named; another one has its number; software
            differs; a host does not reach another one; or another job uses the port.
    """
    waiting = Waiting(rank, seconds=seconds)
    if rank:
        reach.await_address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), waiting=waiting)
    room = store.connect("start", seconds=max(waiting.left, 0.1))
    if room is None:
        raise ALConfigError(
            f"rank {rank} ({socket.gethostname()}) has not reached rank 0 at {_where()} (MASTER_ADDR:MASTER_PORT) "
            f"within {seconds:.0f} s: start all ranks, with the same MASTER_ADDR and MASTER_PORT. {LATER}"
        )
    own = Arrival(rank)
    if (there := room.compare_set("world", "", str(world)).decode()) != str(world):
        raise ALConfigError(
            f"two jobs meet at {_where()} (MASTER_ADDR:MASTER_PORT): the one that is there has {there} ranks, that of "
            f"rank {own.name} has {world}. {_ANOTHER}"
        )
    if room.add(f"number {rank}", 1) > 1:
        _check_taken(own, room)
    room.set(str(rank), json.dumps(asdict(own)))
    presence.start(rank, world)
    ranks = _gathered(own, world, room, waiting=waiting)
    if found := differences([(each.name, each.software) for each in ranks]):
        _await_readers(rank, world, room)
        raise ALConfigError(f"the software is not the same on all ranks: {'; '.join(found)}")
    if gloo:
        hosts, networks = [each.host for each in ranks], [each.network for each in ranks]
        reach.check_hosts(rank, hosts, room, networks=networks, seconds=seconds)
    return ranks


def _gathered(own: Arrival, world: int, room: Store, *, waiting: Waiting) -> list[Arrival]:
    """Waits for what all ranks tell.

    Raises:
        ALConfigError: a rank has not come, has failed, or has come twice.
    """
    keys, planned = [str(rank) for rank in range(world)], launchers.planned_hosts()
    while True:
        try:
            all_came = store.await_keys(room, keys, seconds=min(waiting.left, _SLICE))
        except RuntimeError as error:
            raise ALConfigError(f"rank 0 at {_where()} has ended: its output shows the cause") from error
        if not all_came and (cause := presence.here().failed()):
            raise ALConfigError(cause)
        there = [Arrival(**json.loads(room.get(key))) for key in keys if room.check([key])]
        if room.check(["twice"]):
            raise ALConfigError(room.get("twice").decode())
        if len(there) == world:
            return there
        missing = [rank for rank in range(world) if rank not in {each.rank for each in there}]
        if not waiting.left:
            _await_readers(own.rank, world, room)
            raise ALConfigError(
                f"rank {', '.join(_planned(rank, planned) for rank in missing)} of {world} has not come within "
                f"{waiting.seconds:.0f} s to {_where()} (MASTER_ADDR:MASTER_PORT); "
                f"{', '.join(f'rank {each.name}' for each in there)} came. What the missing ranks print says why; if "
                "they print nothing, start the same command on their hosts, with this address and port and a "
                f"--node_rank of their own. {LATER}"
            )
        waiting.say(
            f"rank {', '.join(_planned(rank, planned) for rank in missing)} of {world}, which has not come to "
            f"{_where()} (MASTER_ADDR:MASTER_PORT). Is the command running there, with this address and port, and with "
            "a --node_rank of its own? If so, its output says why"
        )


def _check_taken(own: Arrival, room: Store) -> None:
    """Checks that it is this process itself that has come with its number before.

    Raises:
        ALConfigError: another one has; all ranks that still wait at the start raise the same.
    """
    try:
        room.wait([str(own.rank)], timedelta(seconds=_READING))
        other = Arrival(**json.loads(room.get(str(own.rank))))
        if (other.network, other.process) == (own.network, own.process):
            return
        where = f"host {other.host}, process {other.process}"
    except RuntimeError:
        where = "another process"
    text = (
        f"two processes are rank {own.rank} of the job at {_where()} (MASTER_ADDR:MASTER_PORT): {where}, and host "
        f"{own.host}, process {own.process}. {_ANOTHER}"
    )
    room.set("twice", text)
    raise ALConfigError(text)


def _await_readers(rank: int, world: int, room: Store) -> None:
    """Lets rank 0, whose end takes the store away, wait until the others have read what it has."""
    room.set(f"read by {rank}", "")
    if rank == 0:
        with contextlib.suppress(RuntimeError):
            came = [str(other) for other in range(world) if room.check([str(other)])]
            room.wait([f"read by {other}" for other in came], timedelta(seconds=_READING))


def _planned(rank: int, hosts: Sequence[str]) -> str:
    return f"{rank} ({hosts[rank]})" if rank < len(hosts) else str(rank)


def _where() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
