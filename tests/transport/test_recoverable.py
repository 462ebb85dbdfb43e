"""Stages A -> B -> C in processes of their own, which are killed while they send numbers to each other.

Every stage computes from its own state and what it receives, and saves every few micro-batches. This process is what
keeps them: it notices a death, raises the generation of the borders, and starts a new process. The store is in one more
process: one forked beside the threads of a store may inherit a lock that one of them held, and waits for it for ever.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, TCPStore

from ds_al.config.associated_learning import ALConfig
from ds_al.errors import ALConfigError, ALTransportError
from ds_al.parallel.topology import StageTopology
from ds_al.recovery.ending import Ending
from ds_al.transport import neighbours
from ds_al.transport.border import Recovery
from ds_al.transport.log import MessageLog
from ds_al.transport.neighbours import EvaluationChannels, Links
from ds_al.transport.watched import WatchedGroup

MESSAGES, EVERY, REFRESH, SIZE = 40, 6, 4, 1000
FORK = multiprocessing.get_context("fork")


class Kill(NamedTuple):
    """When a process of a stage kills itself: the first time that a process of it is there."""

    stage: int
    at: str
    """``"start"``, ``"received"``, ``"sent"``, ``"decoders"``, ``"saved"``, ``"evaluation"``, ``"done"`` with its own
    messages, or ``"left"`` with all others."""
    micro_batch: int = 0
    life: int = 0
    """Number of the process: 0 is the first one of the stage."""
    pause: float = 0.0
    """Seconds before that, for the other stages to come as far as they can."""


class Case(NamedTuple):
    """What is tried."""

    kills: tuple[Kill, ...]
    config: ALConfig = ALConfig()
    size: int = SIZE
    dynamic: bool = False
    growth: int = 1
    """Numbers that a dynamic message has more than the one before."""
    reset: int = MESSAGES
    """Micro-batch at which shapes change once."""
    files: bool = False
    mib: float = 64.0
    stages: int = 3


# ---- a stage ----------------------------------------------------------------------------------------


def number(micro_batch: int, case: Case) -> Tensor:
    """What the first stage makes a message of."""
    size = case.size + (case.growth * (micro_batch % 3) if case.dynamic else 0) + int(micro_batch >= case.reset)
    return torch.randn(size, generator=torch.Generator().manual_seed(micro_batch))


class Stage:
    """State of a stage, and what it computes."""

    def __init__(self) -> None:
        self.value, self.copy, self.seen = 1.0, 0.0, list[float]()

    def step(self, s: Tensor) -> Tensor:
        """Trains on a message, and returns the one for the next stage."""
        self.value = 0.9 * self.value + s.double().sum().item() + self.copy
        self.seen.append(self.value)
        return s * 0.5 + self.value


def expected(case: Case) -> list[list[float]]:
    """What the stages see where nobody dies."""
    stages = [Stage() for _ in range(case.stages)]
    for k in range(MESSAGES):
        if k % REFRESH == 0:
            copy = 0.0
            for stage in stages:
                stage.copy = copy
                copy += stage.value
        s = number(k, case)
        for stage in stages:
            s = stage.step(s)
    return [stage.seen for stage in stages]


def connect(port: int) -> Store:
    """A connection to the store of the job."""
    return PrefixStore("job", TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False))


def restart_point(store: Store, stage: int, case: Case) -> int:
    """The newest save that a stage and all later ones have."""
    return min(store.add(f"saved/{later}", 0) for later in range(stage, case.stages))


def run(port: int, index: int, life: int, case: Case, folder: str) -> None:
    """Runs one process of a stage."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    neighbours.check_one_host = lambda topology: None  # it asks a group of all ranks
    store, state = connect(port), Stage()

    def die(at: str, micro_batch: int = 0) -> None:
        for kill in case.kills:
            if kill[:4] == (index, at, micro_batch, life):
                time.sleep(kill.pause)
                os.kill(os.getpid(), signal.SIGKILL)

    die("start")
    start, decoders = restart_point(store, index, case), (0, 0)
    if start:
        saved = json.loads(store.get(f"state/{index}/{start}"))
        decoders = saved.pop("decoders")
        vars(state).update(saved)
    links = Links(
        StageTopology(
            rank=index, stage=index, stages=case.stages, replica=0, replicas=1,
            pipeline=tuple(range(case.stages)), same_stage=(index,),
        ),
        config=case.config, device=torch.device("cpu"), dynamic=case.dynamic, decoders=True,
        recovery=Recovery(
            open_store=lambda: connect(port), start=start,
            restart_point=lambda stage: restart_point(store, stage, case),
            interval=EVERY, check=lambda stage: None, log_mib=case.mib, decoders=tuple(decoders),
            folder=Path(folder) if case.files else None,
        ),
    )  # fmt: skip
    (sender, receiver), copies = links.training, links.decoders
    store.set(f"pid/{index}/{life}", str(os.getpid()))
    exchanged = list(decoders)
    for k in range(start, MESSAGES):
        if k == case.reset:
            links.reset()
        if receiver is not None and (k % EVERY == 0 or k == start):
            receiver.expect(min(EVERY - k % EVERY, MESSAGES - k))
        if k % REFRESH == 0:
            state.copy = 0.0
            if copies.receiver is not None:
                copies.receiver.expect(1)
                state.copy = copies.receiver.receive()[0].item()
                copies.receiver.release()
                exchanged[0] += 1
            die("decoders", k)
            if copies.sender is not None:
                copies.sender.send((torch.tensor([state.copy + state.value], dtype=torch.float64),))
                exchanged[1] += 1
        s = receiver.receive()[0] if receiver is not None else number(k, case)
        die("received", k)
        s = state.step(s)
        if sender is not None:
            sender.send((s, torch.tensor([k])))
        die("sent", k)
        if receiver is not None:
            receiver.release()
        if (k + 1) % EVERY == 0:
            store.set(f"state/{index}/{k + 1}", json.dumps({**vars(state), "decoders": exchanged}))
            store.add(f"saved/{index}", max(0, k + 1 - store.add(f"saved/{index}", 0)))
            die("saved", k)
    store.set(f"seen/{index}", json.dumps(state.seen))
    done = 0
    while not store.check(["evaluated"]):
        deaths = store.add("deaths", 0) + 1
        links.attend()
        if deaths > done:  # as evaluation does: what has begun is begun again
            links.renew(deaths)
            try:
                evaluate(links.evaluation, index, state, store, die)
                done = deaths
            except ALTransportError as error:
                assert error.lost
        time.sleep(0.01)
    die("done")
    Ending(index, case.stages, store=store).leave(0, while_waiting=links.attend)
    die("left")
    os._exit(0)


def evaluate(channels: EvaluationChannels, index: int, state: Stage, store: Store, die: Callable[..., None]) -> None:
    """Sends three numbers through all stages, each of which adds its own."""
    sender, receiver = channels
    if receiver is not None:
        receiver.expect(3)
    values = []
    for k in range(3):
        values.append(state.value + (receiver.receive()[0].item() if receiver is not None else k))
        die("evaluation", k)
        if sender is not None:
            sender.send((torch.tensor([values[-1]], dtype=torch.float64),))
        if receiver is not None:
            receiver.release()
    if sender is None:
        store.set("evaluated", json.dumps(values))


# ---- what keeps the stages -----------------------------------------------------------------------------


def host(told: Connection) -> None:
    """Holds the store, and tells its port."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told.send(store.port)
    signal.pause()


def keep(case: Case, folder: Path, *, meanwhile: Callable[[Store, list[Any]], None] | None = None) -> tuple[Any, Any]:
    """Runs all stages until they are done; returns what they have seen, and how many processes each has had."""
    tell, told = FORK.Pipe(duplex=False)
    server = FORK.Process(target=host, args=(told,), daemon=True)
    server.start()
    port = tell.recv()
    store, lives = connect(port), [0] * case.stages
    endings = [Ending(stage, case.stages, store=store) for stage in range(case.stages)]

    def begin(stage: int) -> Any:
        process = FORK.Process(target=run, args=(port, stage, lives[stage], case, str(folder)), daemon=True)
        process.start()
        return process

    processes, deadline, done = [begin(stage) for stage in range(case.stages)], time.monotonic() + 60, set[int]()
    try:
        while len(done) < case.stages:
            assert time.monotonic() < deadline, (lives, [process.exitcode for process in processes])
            for stage, process in enumerate(processes):
                if process.exitcode is None or stage in done:
                    continue
                assert process.exitcode in (0, -signal.SIGKILL), (stage, process.exitcode)
                if process.exitcode == 0 or endings[stage].is_over():
                    done.add(stage)
                else:
                    for border in {max(stage - 1, 0), min(stage, case.stages - 2)}:
                        store.add(f"generation/{border}", 1)
                    store.add("deaths", 1)
                    lives[stage] += 1
                    processes[stage] = begin(stage)
            if meanwhile is not None:
                meanwhile(store, processes)
            time.sleep(0.005)
    finally:
        for process in processes:
            process.kill()
            process.join()
        keys = [*(f"seen/{stage}" for stage in range(case.stages)), "evaluated"]
        found = store.multi_get(keys) if len(done) == case.stages else []
        server.kill()
        server.join()
    *seen, evaluated = map(json.loads, found)
    assert evaluated == [sum((values[-1] for values in seen), k) for k in range(3)]
    return seen, lives


A, B, C, D = range(4)
FULL = Case((), dynamic=True, growth=SIZE, mib=54000 / 2**20)
"""A log that holds the messages between two saves and hardly more."""
CASES = {
    "nobody": Case(()),
    "before the first message": Case((Kill(B, "start"),)),
    "with a message in use": Case((Kill(B, "received", 15),)),
    "right after a message": Case((Kill(B, "sent", 15),)),
    "in the middle of a large message": Case((Kill(B, "sent", 9),), size=2**20),
    "while it replays": Case((Kill(B, "received", 16), Kill(B, "received", 13, 1), Kill(B, "start", 0, 2))),
    "between the copies of decoders": Case((Kill(B, "decoders", 16), Kill(C, "decoders", 16))),
    "in evaluation": Case((Kill(B, "evaluation", 1), Kill(C, "evaluation", 2, 0))),
    "at the end": Case((Kill(A, "done"), Kill(C, "done"), Kill(A, "left", 0, 1), Kill(B, "left"))),
    "after a save": Case((Kill(B, "saved", 17),)),
    "the first stage": Case((Kill(A, "sent", 20),)),
    "the last stage": Case((Kill(C, "received", 20),)),
    "two neighbours": Case((Kill(A, "sent", 16), Kill(B, "received", 16))),
    "all": Case((Kill(A, "sent", 16), Kill(B, "received", 16), Kill(C, "received", 16))),
    "with shapes that change": Case((Kill(B, "received", 16), Kill(C, "received", 17)), dynamic=True),
    "with shapes that are reset": Case(
        (Kill(B, "received", 22), Kill(C, "received", 26), Kill(B, "sent", 27, 1)), reset=24
    ),
    "with a log in files": Case((Kill(B, "received", 16), Kill(A, "sent", 30)), files=True),
    "over a slow link": Case((Kill(B, "received", 9),), config=ALConfig(link={"delay_ms": 2, "mbit": 100})),
    "with checksums": Case((Kill(B, "sent", 9),), config=ALConfig(message_checksum=True, queue_depth=1)),
    "with a log that is full": Case((Kill(B, "received", 16), Kill(C, "sent", 25)), mib=10 * 4160 / 2**20),
    # A waits for the save that C dies before, B for a message of A, and the new C for B.
    "before a save that the first stage waits for": FULL._replace(kills=(Kill(C, "received", 5, pause=0.5),)),
    "two before it": FULL._replace(kills=(Kill(C, "sent", 5, pause=0.4), Kill(D, "received", 5, pause=0.5)), stages=4),
    "two before it, one between them": FULL._replace(
        kills=(Kill(B, "sent", 6, pause=0.4), Kill(D, "received", 5, pause=0.5)), stages=4
    ),
    "the same, later": FULL._replace(
        kills=(Kill(A, "sent", 12), Kill(C, "sent", 11, pause=0.4), Kill(D, "received", 11, pause=0.5)), stages=4
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_message_arrives_once_and_in_order(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    seen, lives = keep(case, tmp_path)
    assert seen == expected(case)
    kills = [kill.stage for kill in case.kills if kill.at != "left"]  # at the end of all, nobody is replaced
    assert lives == [kills.count(stage) for stage in range(case.stages)]


@pytest.mark.slow
@pytest.mark.parametrize("case", [
    Case((), config=ALConfig(link={"delay_ms": 5})),
    FULL._replace(config=ALConfig(link={"delay_ms": 5}), stages=4),
], ids=["slow link", "full log"])  # fmt: skip
def test_processes_may_be_killed_at_any_moment(case: Case, tmp_path: Path) -> None:
    draw, killed = torch.Generator().manual_seed(0), [0]

    def kill(store: Store, processes: list[Any]) -> None:
        if torch.rand((), generator=draw) < 0.05 and killed[0] < 12:
            killed[0] += 1
            processes[torch.randint(case.stages, (), generator=draw)].kill()

    seen, lives = keep(case, tmp_path, meanwhile=kill)
    assert seen == expected(case) and sum(lives) > 5


# ---- a message of which a part has been transferred ------------------------------------------------------


def transfer(port: int, *, sends: bool) -> None:
    """Begins to send or to receive a large message, and waits to be killed."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = connect(port)
    group = ProcessGroupGloo(PrefixStore("pair", store), 1, 2, timedelta(seconds=60))
    tensors = [torch.ones(2**24)]
    _ = group.send(tensors, 0, 0) if sends else group.recv(tensors, 0, 0)
    store.set("begun", "")
    time.sleep(60)


@pytest.mark.parametrize("sends", [True, False])
def test_a_wait_ends_when_the_other_process_dies_in_the_middle_of_a_message(
    sends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gloo's own does not, on either side."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store, is_dead = PrefixStore("job", server), threading.Event()
    peer = FORK.Process(target=transfer, args=(server.port,), kwargs={"sends": sends}, daemon=True)
    peer.start()
    group = WatchedGroup(ProcessGroupGloo(PrefixStore("pair", store), 0, 2, timedelta(seconds=60)), lost=is_dead.is_set)
    store.wait(["begun"])
    tensors = [torch.zeros(2**24)]
    work = group.recv(tensors, 1, 0) if sends else group.send(tensors, 1, 0)
    time.sleep(0.002)
    peer.kill()
    peer.join()
    is_dead.set()
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        while time.monotonic() < start + 5:  # a transfer that was complete before is no matter
            work.wait()
            work = group.recv(tensors, 1, 0) if sends else group.send(tensors, 1, 0)
    assert time.monotonic() < start + 5


# ---- the log ---------------------------------------------------------------------------------------------


def log(*, mib: float, points: list[int]) -> MessageLog:
    """A log whose neighbour saves every 4 micro-batches."""
    return MessageLog(mib=mib, interval=4, ahead=2, restart_point=lambda: points[0], folder=None)


def append(messages: MessageLog, k: int, *, kib: int, idle: Callable[[], None] = lambda: None) -> float:
    return messages.append("training", (torch.zeros(kib, 256),), number=k, micro_batch=k, shapes=0, idle=idle)


def test_a_log_waits_at_its_limit_until_the_neighbour_has_saved() -> None:
    points, waits = [0], list[int]()
    messages = log(mib=6 / 1024, points=points)

    def save() -> None:
        waits.append(k)
        if len(waits) == 3:
            points[0] = 4

    for k in range(9):
        waited = append(messages, k, kib=1, idle=save)
        assert (waited > 0.02) == (k == 6)
    assert waits == [6, 6, 6] and messages.nbytes == 5 * 1024
    assert [entry.number for entry, _ in messages.since({"training": 6})] == [6, 7, 8]


def test_a_log_that_cannot_hold_what_is_sent_between_two_saves_is_refused() -> None:
    with pytest.raises(
        ALConfigError, match=r"between two saves, 4 micro-batches apart.* take 0.01172 MiB: raise its limit to 1 MiB"
    ):
        append(log(mib=11 / 1024, points=[0]), 0, kib=2)
    messages = log(mib=11 / 1024, points=[0])
    append(messages, 0, kib=1)
    append(messages, 1, kib=5)
    with pytest.raises(ALConfigError, match="raise its limit"):  # messages that grow: the neighbour never saves
        append(messages, 2, kib=6)
