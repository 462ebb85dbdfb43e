"""Watchdog for stalls: if no stage makes progress, every rank prints its instruction, what it waits for, and its stack.

It is a daemon thread per rank, only if ``stall_seconds`` is set. The training thread only sets the current instruction
(:class:`~ds_al.trace.recorder.Progress`), and the watchdog reads it. Ranks exchange their progress through the
key-value store of the process group, over a separate connection, so that the watchdog never waits for a message or a
collective of the training.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal

from deepspeed import comm as dist
from torch.distributed import PrefixStore, Store, TCPStore

from ds_al.parallel.topology import StageTopology
from ds_al.trace.recorder import Progress

_CHECKS = 4  # of all ranks' progress, within ``stall_seconds``
_STORE_SECONDS = 5.0  # timeout after which the store counts as unreachable
_watches = 0  # watchdogs of this process so far: the same number identifies the same engine on every rank

Place = tuple[int, bool]
"""Progress of a rank: number of executed instructions, and whether it is inside one."""


class Stillness:
    """Detects a stall: no rank has made progress for ``seconds``, and a rank is inside an instruction.

    A stall is reported once, then again after twice ``seconds``, four times, and so on, until a rank makes progress.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._last: tuple[int | None, ...] | None = None
        self._since = self._due = 0.0
        self._reports = 0

    def update(self, places: Sequence[Place | None], now: float) -> float | None:
        """Updates the progress of all ranks; ``None`` is a rank that has not reported yet.

        Returns:
            Seconds since the last progress if a stall is to be reported now, else ``None``.
        """
        moved = tuple(None if place is None else place[0] for place in places)
        # Time that all ranks spend outside of instructions, in the user's code, does not count either.
        if moved != self._last or not any(place is not None and place[1] for place in places):
            self._last, self._since, self._due, self._reports = moved, now, now + self.seconds, 0
        if now < self._due:
            return None
        self._reports += 1
        self._due = now + self.seconds * 2**self._reports
        return now - self._since


def waits_for(
    instruction: str | None,
    micro_batch: int,
    *,
    stage: int,
    rank_of: Callable[[int], int],
    queue: bool,
    others: Sequence[int] = (),
) -> str:
    """Describes what a stage waits for in an instruction, and on which rank.

    Args:
        instruction: class name of the instruction; ``None`` outside of all.
        micro_batch: number of earlier instructions of this class.
        stage: index of the stage that executes it.
        rank_of: returns the global rank of a stage of the same replica of the pipeline.
        queue: whether messages are queued, as with AL; DeepSpeed's own engine waits until they are received.
        others: global ranks of the same stage in other data parallel replicas.
    """

    def name(neighbour: int) -> str:
        return f"stage {neighbour} (rank {rank_of(neighbour)})"

    if instruction is None:
        return "is outside of train_batch()" if queue else "is outside of train_batch(), or at its end, between stages"
    if instruction == "RecvActivation":
        return f"waits for the activations of micro-batch {micro_batch} from {name(stage - 1)}"
    if instruction == "SendActivation":
        what = (
            "a free slot in its queue to" if queue else f"its activations of micro-batch {micro_batch} to be taken by"
        )
        return f"waits for {what} {name(stage + 1)}"
    if instruction == "RecvGrad":
        return f"waits for the gradients of micro-batch {micro_batch} from {name(stage + 1)}"
    if instruction == "SendGrad":
        return f"waits for its gradients of micro-batch {micro_batch} to be taken by {name(stage - 1)}"
    if instruction == "LoadMicroBatch":
        return "waits for the data iterator"
    if instruction == "Barrier":
        return "waits for all stages"
    if instruction in ("ReduceGrads", "ReduceTiedGrads"):
        ranks = f": {', '.join(map(str, others))}" if others else ""
        return f"waits for the ranks that hold the same weights{ranks}"
    if instruction == "RefreshDecoders" and stage:
        return f"waits for copies of decoders for micro-batch {micro_batch} from {name(stage - 1)}"
    if instruction == "SendDecoders":
        return f"waits for a free slot in its queue of copies of decoders to {name(stage + 1)}"
    return "computes"


class Watchdog:
    """Monitors one engine from a separate thread; created by :meth:`start`, ended by :meth:`stop`.

    Args:
        progress: progress of the engine, held by a weak reference.
        topology: place of this rank.
        seconds: timeout without progress on any rank.
        on_stall: ``"continue"`` reports and continues; ``"end"`` reports and ends this process with exit code 1.
        sends_ahead: whether messages are queued, as with AL; DeepSpeed's own engine waits until they are received.
    """

    def __init__(
        self,
        progress: Progress,
        *,
        topology: StageTopology,
        seconds: float,
        on_stall: Literal["continue", "end"] = "continue",
        sends_ahead: bool = True,
    ) -> None:
        global _watches
        self.seconds, self.on_stall = seconds, on_stall
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._progress, self._topology, self._sends_ahead = weakref.ref(progress), topology, sends_ahead
        self._trains = threading.get_ident()
        self._prefix = f"ds_al/stall/{_watches}"
        _watches += 1
        self._store: Store | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ds_al watchdog", daemon=True)
        self._thread.start()
        # A daemon thread that returns from the store while the interpreter shuts down would abort it.
        atexit.register(self.stop)

    @classmethod
    def start(cls, progress: Progress, *, seconds: float | None, **options: Any) -> Watchdog | None:
        """Returns a running watchdog; ``None``, without a thread, if ``seconds`` is ``None``."""
        return None if seconds is None else cls(progress, seconds=seconds, **options)

    def stop(self) -> None:
        """Ends the thread. May be called more than once."""
        self._stopped.set()
        atexit.unregister(self.stop)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=2 * _STORE_SECONDS)

    def _run(self) -> None:
        self._store = self._connect()
        rule = Stillness(self.seconds)
        while not self._stopped.wait(self.seconds / _CHECKS):
            progress = self._progress()
            if progress is None:
                return
            still = rule.update(self._places(_place(progress)), time.perf_counter())
            if still is not None:
                self._report(progress, still)
            del progress

    # ---- the other ranks ---------------------------------------------------------------------------

    def _connect(self) -> Store | None:
        try:
            client = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=_STORE_SECONDS),
            )
        except (KeyError, ValueError, RuntimeError):
            return None
        return PrefixStore(self._prefix, client)

    def _places(self, own: Place) -> list[Place | None]:
        """Returns the progress of all ranks; of this one alone, once the store is unreachable."""
        places: list[Place | None] = [None] * self.world
        if self._store is not None:
            try:
                self._store.set(str(self.rank), f"{own[0]} {int(own[1])}")
                for rank in range(self.world):
                    if rank != self.rank and self._store.check([str(rank)]):
                        executed, inside = self._store.get(str(rank)).split()
                        places[rank] = int(executed), inside == b"1"
            except RuntimeError:
                self._store = None
        places[self.rank] = own
        return places

    # ---- the report --------------------------------------------------------------------------------

    def _report(self, progress: Progress, still: float) -> None:
        current, topology = progress.current, self._topology
        name = None if current is None else type(current[0]).__name__
        micro_batch = 0 if name is None else progress.executed.get(name, 0)
        what = waits_for(
            name,
            micro_batch,
            stage=topology.stage,
            rank_of=topology.pipeline.__getitem__,
            queue=self._sends_ahead,
            others=[rank for rank in topology.same_stage if rank != self.rank],
        )
        replica = f"replica {topology.replica}, " if topology.replicas > 1 else ""
        where = "" if current is None else f"{name}, micro-batch {micro_batch}, "
        since = "" if current is None else f", for {time.perf_counter() - current[1]:.1f} s"
        frame = sys._current_frames().get(self._trains)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else "  (its thread has ended)\n"
        ends = self.on_stall == "end"
        # One write, so that the blocks of several ranks do not mix.
        sys.stderr.write(
            f"\n--- stall: no stage moved for {still:.1f} s\n"
            f"{replica}stage {topology.stage}, rank {self.rank}: {where}{what}{since}\n"
            f"Python stack, most recent call last:\n{stack}"
            f'--- {replica}stage {topology.stage} {"ends" if ends else "continues"} ("on_stall": "{self.on_stall}")\n'
        )
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        if ends:
            # Others detect the same stall up to three checks later, and should report it before this exit breaks them.
            time.sleep(self.seconds)
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(1)


def _place(progress: Progress) -> Place:
    return sum(tuple(progress.executed.values())), progress.current is not None
