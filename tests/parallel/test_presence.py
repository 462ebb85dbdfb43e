"""What ranks notice of each other: the cause of a failure, a stopped process, a launcher that has gone, and sockets."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_al.launch.ranks import RankFailure, run_ranks
from ds_al.parallel import presence, store
from ds_al.parallel.world import join_world
from tests.support.engines import MICRO_BATCHES, make_engine
from tests.support.networks import NETWORKS
from tests.support.ranks import ROOT
from tests.support.sockets import listening_here

pytestmark = pytest.mark.distributed


# ---- the cause of a failure ----------------------------------------------------------------------------


def fault(kind: str) -> None:
    """Fails as a user's code may."""
    match kind:
        case "an error of torch":
            torch.zeros(2) @ torch.zeros(3)
        case "MemoryError":
            raise MemoryError("no memory is left")
        case "Ctrl-C":
            raise KeyboardInterrupt
        case "sys.exit(0)":
            sys.exit(0)
        case "os._exit(0)":
            os._exit(0)


def trains(*, kind: str, where: str) -> None:
    """Worker: rank 0 fails in the second batch, in a layer or in its iterator or between batches."""
    engine = make_engine()
    first = engine.is_first_stage()
    if first and where == "layer":
        hooked = iter(range(1000))
        engine.layers[0][1].f.register_forward_hook(
            lambda *_: fault(kind) if next(hooked) == MICRO_BATCHES + 1 else None
        )

    def batches() -> Iterator[Any]:
        for number, batch in enumerate(NETWORKS["mlp"].batches(8 * MICRO_BATCHES)):
            if where == "iterator" and number == MICRO_BATCHES + 1:
                fault(kind)
            yield batch

    data = batches()
    for number in range(8):
        engine.train_batch(data)
        if first and where == "callback" and number == 1:
            fault(kind)


@pytest.mark.parametrize(
    ("kind", "where", "cause"),
    [
        ("an error of torch", "layer", r"failed: ALLayerError: .*RuntimeError: .*size"),
        ("MemoryError", "iterator", r"failed: MemoryError: no memory is left"),
        ("Ctrl-C", "callback", r"failed: KeyboardInterrupt"),
        ("sys.exit(0)", "layer", r"failed: ALLayerError: .*sys.exit\(0\) was called inside train_batch"),
        ("sys.exit(0)", "callback", r"had come to the end of its script"),
        (
            "os._exit(0)",
            "layer",
            r"process of rank 0 \(.*\) has gone without a word: it was killed, or left by os._exit",
        ),
    ],
)
def test_the_neighbour_tells_the_cause(kind: str, where: str, cause: str) -> None:
    with pytest.raises(RankFailure) as caught:
        run_ranks(f"{__name__}:trains", 2, kind=kind, where=where, timeout=60)
    text = caught.value.outputs[1]
    last = next(line for line in reversed(text.splitlines()) if "ALTransportError" in line)
    assert contains(cause, last), text
    assert caught.value.codes[1] == 1
    if kind not in ("os._exit(0)", "sys.exit(0)") or (where == "layer" and kind == "sys.exit(0)"):
        assert caught.value.codes[0] not in (0, None)


def contains(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None


def trains_fewer() -> None:
    """Worker: a script in which the last stage trains one batch fewer; no rank waits to be killed."""
    engine = make_engine()
    data = iter(NETWORKS["mlp"].batches(4 * MICRO_BATCHES))
    for _ in range(4 if engine.is_first_stage() else 2):
        engine.train_batch(data)
    sys.exit(0)


def test_a_stage_that_trains_fewer_batches_fails_the_job() -> None:
    with pytest.raises(RankFailure) as caught:
        run_ranks(f"{__name__}:trains_fewer", 2, timeout=60)
    assert caught.value.codes[0] == 1
    assert "had come to the end of its script: every rank has to train as long" in caught.value.outputs[0]


# ---- processes that are stopped, launchers that have gone ----------------------------------------------


def stops() -> None:
    """Worker: the process of one rank is stopped between two batches. Nothing would ever end it."""
    presence.STOPPED = 1.0
    engine = make_engine()
    data = iter(NETWORKS["mlp"].batches(4 * MICRO_BATCHES))
    engine.train_batch(data)
    time.sleep(1.0)
    if not engine.is_first_stage():
        os.kill(os.getpid(), signal.SIGSTOP)
    engine.evaluate(NETWORKS["mlp"].batches(4))


def test_a_stopped_process_ends_the_job() -> None:
    with pytest.raises(RankFailure) as caught:
        run_ranks(f"{__name__}:stops", 2, timeout=60)
    assert caught.value.codes == [1, -signal.SIGKILL]
    assert (
        "the process of rank 1 (" in caught.value.outputs[0] and "is stopped: the job ends" in caught.value.outputs[0]
    )


def waits_alone() -> None:
    """Worker: one rank is killed while the other does not talk to it, as in a long computation of its own."""
    presence.STOPPED = 1.0
    engine = make_engine()
    engine.train_batch(iter(NETWORKS["mlp"].batches(MICRO_BATCHES)))
    engine.gather(None)
    if engine.is_first_stage():
        time.sleep(600)
    time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_has_gone_ends_a_rank_that_does_not_wait_for_it() -> None:
    """Rank 0 once went on for as long as its own work took: minutes in which nobody knew."""
    with pytest.raises(RankFailure) as caught:
        run_ranks(f"{__name__}:waits_alone", 2, timeout=60)
    assert caught.value.codes == [1, -signal.SIGKILL] and caught.value.seconds < 30
    why = r"process of rank 1 \(.*\) has gone without a word: it was killed, .*: the job ends"
    assert re.search(why, caught.value.outputs[0])


def pauses() -> str:
    """Worker: the process of rank 0, which holds the store, is paused for longer than a connection may take."""
    join_world()
    here = presence.here()
    torch.distributed.barrier()
    rank = here.rank
    if rank == 0:
        seconds = store.SECONDS + 2.5
        subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    torch.distributed.barrier()
    heard = here.own.read[1 - rank]
    time.sleep(4 * presence._TICK)
    return "talks" if here._talks and here.own.read[1 - rank] > heard else "is silent"


def test_ranks_talk_on_after_a_pause_of_the_one_that_holds_the_store() -> None:
    """A pause of five seconds once ended the talk of all others, and the job 300 s later: they were not heard of."""
    assert run_ranks(f"{__name__}:pauses", 2, timeout=60) == ["talks", "talks"]


def leaves_twice() -> None:
    """Worker: rank 0 is ended by its thread that looks, and by its script at the same time; rank 1 reads slowly."""
    rank = int(os.environ["RANK"])
    presence._TICK = 1.5 if rank else presence._TICK
    join_world()
    here = presence.here()
    torch.distributed.barrier()
    if rank == 0:
        threading.Thread(target=here._exit, args=("the process of rank 2 is stopped",)).start()
        time.sleep(0.8)
        raise RuntimeError("lost rank 2")
    time.sleep(3.0)
    print(f"rank 1 knows: {here.failed()!r}", flush=True)


def test_a_rank_that_ends_for_two_reasons_stays_until_all_know_the_first() -> None:
    """Its script once left while its thread still waited for the others, to which it had then gone without a word."""
    with pytest.raises(RankFailure) as caught:
        run_ranks(f"{__name__}:leaves_twice", 2, timeout=60)
    text = caught.value.outputs[1]
    assert re.search(
        r"rank 1 knows: 'rank 0 \(.*\) failed: ALTransportError: the process of rank 2 is stopped'", text
    ), text


def ends_late() -> None:
    """Worker: rank 0 ends its script, and the other one works on for longer than a lost rank may."""
    presence.STOPPED = 1.0
    engine = make_engine()
    engine.train_batch(iter(NETWORKS["mlp"].batches(MICRO_BATCHES)))
    engine.gather(None)
    if engine.is_first_stage():
        sys.exit(0)
    time.sleep(4.0)
    sys.exit(3)


def test_a_rank_may_work_on_after_the_others_have_come_to_their_end() -> None:
    with pytest.raises(RankFailure) as caught:
        run_ranks(f"{__name__}:ends_late", 2, timeout=60)
    assert caught.value.codes == [0, 3], caught.value


LAUNCHER = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[2]])
print(rank.pid, flush=True)
rank.wait()
"""
RANK = """
import time
from ds_al.parallel import presence
presence.start(0, 1)
print("started", flush=True)
time.sleep(120)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_rank_ends_with_its_launcher(number: signal.Signals) -> None:
    command = [sys.executable, "-c", LAUNCHER, "deepspeed.launcher.launch", RANK]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    rank = int(launcher.stdout.readline())
    try:
        assert launcher.stdout.readline().strip() == "started"
        launcher.send_signal(number)
        launcher.wait()
        limit = time.monotonic() + 20
        while alive(rank) and time.monotonic() < limit:
            time.sleep(0.05)
        assert not alive(rank)
        assert "the launcher that started this rank has gone" in launcher.communicate()[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- sockets -------------------------------------------------------------------------------------------


def listening(*, by_deepspeed: bool) -> set[str]:
    """Worker: addresses that this process listens on while it starts, trains, evaluates and trains again."""
    if by_deepspeed:
        import deepspeed

        deepspeed.init_distributed()
    engine = make_engine()
    found = listening_here()
    data = NETWORKS["mlp"]
    for _ in range(2):
        engine.train_batch(iter(data.batches(MICRO_BATCHES)))
        found |= listening_here()
        engine.evaluate(data.batches(2))
        found |= listening_here()
    engine.flush()
    return found


@pytest.mark.parametrize("by_deepspeed", [False, True])
def test_ranks_of_one_host_listen_on_its_loopback_alone(by_deepspeed: bool) -> None:
    for addresses in run_ranks(f"{__name__}:listening", 2, by_deepspeed=by_deepspeed):
        assert addresses and addresses <= {"127.0.0.1", "::1"}
