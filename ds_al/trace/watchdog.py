"""Watchdog for stalls: if no stage makes progress, every rank prints its instruction, what it waits for, and its stack.

A stall is also where ranks have left the common order of calls (:mod:`ds_al.trace.calls`), which is certain at once.
The watchdog is a daemon thread per rank, unless ``stall_seconds`` is ``null``. The training thread only sets the
current instruction (:class:`~ds_al.trace.recorder.Progress`), and the watchdog reads it. Ranks exchange their progress
through the key-value store of the process group, over a separate connection, so that the watchdog never waits for a
message or a collective of the training.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from deepspeed import comm as dist
from torch.distributed import Store

from ds_al.errors import ALTransportError
from ds_al.parallel import presence, store
from ds_al.parallel.topology import StageTopology
from ds_al.trace.calls import Calls, Position, out_of_order
from ds_al.trace.recorder import Progress

_CHECKS = 4  # of all ranks' progress, within ``stall_seconds``
_LONGEST = 1.0  # seconds between two checks
_watches = 0  # watchdogs of this process so far: the same number identifies the same engine on every rank


class Place(NamedTuple):
    """Progress of a rank: how much it has executed, whether it is inside a call, and its place among the calls."""

    executed: int
    inside: bool
    position: Position = Position()


class Stillness:
    """Detects a stall: no rank has made progress for ``seconds``, and a rank is inside a call.

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
        # Time that all ranks spend outside of calls, in the user's code, does not count either.
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
        what = "a free slot in its queue to" if queue else f"its gradients of micro-batch {micro_batch} to be taken by"
        return f"waits for {what} {name(stage - 1)}"
    if instruction == "CommitP2P":
        return "waits for the messages that it exchanges with its neighbours"
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
        calls: calls of the engine.
        topology: place of this rank.
        seconds: timeout without progress on any rank.
        on_stall: ``"continue"`` reports and continues; ``"end"`` reports and ends this process with exit code 1.
        sends_ahead: whether messages are queued, as with AL; DeepSpeed's own engine waits until they are received.
    """

    def __init__(
        self,
        progress: Progress,
        *,
        calls: Calls,
        topology: StageTopology,
        seconds: float,
        on_stall: Literal["continue", "end"] = "continue",
        sends_ahead: bool = True,
    ) -> None:
        global _watches
        self.seconds, self.on_stall = seconds, on_stall
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._progress, self._topology, self._sends_ahead = weakref.ref(progress), topology, sends_ahead
        self._calls = calls
        self._every = min(seconds / _CHECKS, _LONGEST)
        self._told = ""
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
            self._thread.join(timeout=2 * store.SECONDS)

    def _run(self) -> None:
        self._store = store.connect(self._prefix) if self.world > 1 else None
        rule, last = Stillness(self.seconds), time.perf_counter()
        while not self._stopped.wait(self._every):
            progress, now = self._progress(), time.perf_counter()
            if progress is None:
                return
            if now - last > self._every + self.seconds / 2:  # this process was stopped itself: nothing is known
                rule = Stillness(self.seconds)
            last = now
            places = self._places(Place(progress.total, self._calls.current is not None, self._calls.position))
            wrong = out_of_order({r: place.position for r, place in enumerate(places) if place is not None})
            still = rule.update(places, now)
            if wrong and wrong != self._told:
                self._told = wrong
                self._report(progress, wrong)
            elif still is not None:
                self._report(progress, f"no stage moved for {still:.1f} s")
            del progress

    # ---- the other ranks ---------------------------------------------------------------------------

    def _places(self, own: Place) -> list[Place | None]:
        """Returns the progress of all ranks; of this one alone, once the store is unreachable."""
        places: list[Place | None] = [None] * self.world
        if self._store is not None:
            try:
                self._store.set(str(self.rank), json.dumps(own))
                for rank in range(self.world):
                    if rank != self.rank and self._store.check([str(rank)]):
                        executed, inside, position = json.loads(self._store.get(str(rank)))
                        places[rank] = Place(executed, inside, Position(*position))
            except RuntimeError:
                self._store = None
        places[self.rank] = own
        return places

    # ---- the report --------------------------------------------------------------------------------

    def _report(self, progress: Progress, what_happened: str) -> None:
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
        call = self._calls.current
        if current is None and call is not None:
            what = f"is in {call}()"
        where = "" if current is None else f"{name}, micro-batch {micro_batch}, "
        since = "" if current is None else f", for {time.perf_counter() - current[1]:.1f} s"
        frame = sys._current_frames().get(self._trains)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else "  (its thread has ended)\n"
        ends = self.on_stall == "end"
        # One write, so that the blocks of several ranks do not mix.
        sys.stderr.write(
            f"\n--- stall: {what_happened}\n"
            f"{replica}stage {topology.stage}, rank {self.rank}: {where}{what}{since}\n"
            f"Python stack, most recent call last:\n{stack}"
            f'--- {replica}stage {topology.stage} {"ends" if ends else "continues"} ("on_stall": "{self.on_stall}")\n'
        )
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        if ends:
            presence.here().fail(ALTransportError(f"stall: {what_happened}"))
            # Others detect the same stall up to three checks later, and should report it before this exit breaks them.
            time.sleep(3 * self._every)
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            presence.here().end()  # rank 0 would take the store from those that do not know yet
            os._exit(1)
