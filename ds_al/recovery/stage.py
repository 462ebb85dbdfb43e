"""What a stage does so that a new process can take its place: it saves, writes down results, and repeats them.

A new process runs the script from its start::

    train_batch   before the restart point    moves counters, LR schedule and data, returns the loss written down
                  at the restart point        restores the state of the stage
                  after it                    trains, on messages that the stage before sends again
    joint call    made before                 returns the result written down (:mod:`ds_al.recovery.calls`)
    anything else                             as the first time
"""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_al.config.associated_learning import RecoveryConfig
from ds_al.errors import ALRecoveryError
from ds_al.parallel import meetings, presence, worker
from ds_al.parallel.topology import StageTopology
from ds_al.recovery import events
from ds_al.recovery.calls import JointCalls
from ds_al.recovery.ending import Ending, exit_code
from ds_al.recovery.place import Place
from ds_al.recovery.saves import Saves
from ds_al.transport.border import Recovery

_BATCH = "train_batch"


class StageRecovery:
    """Recovery of one stage; the engine of a worker makes one before its channels.

    Args:
        config: the ``"recovery"`` block.
        topology: place of this rank.
        group: the stages whose processes are replaced together with this one.
    """

    def __init__(self, config: RecoveryConfig, topology: StageTopology, *, group: range) -> None:
        room = meetings.room()
        assert room is not None
        self._config, self._room, self._journal = config, room, room.journal
        folder, stage = worker.folder(), topology.stage
        self._root = folder.parents[1]
        self._place = Place(folder / "place")
        self._rank = topology.rank
        self._saves = Saves(folder / "saves", stage=stage, stages=topology.stages, group=group)
        self._start, self._until = self._saves.restart_point, self._place.micro_batches
        refreshed = self._saves.decoders(self._start)
        self._position = 0
        self._restores = self._saves.has(self._start)
        self._began = self._trains = time.time()
        self.borders = Recovery(
            open_store=worker.open_store,
            start=self._start,
            restart_point=lambda stage: self._saves.next_restart_point,
            interval=config.every,
            check=lambda stage: None,
            log_mib=config.log_mib,
            folder=folder / "log" if config.log == "disk" else None,
            decoders=(refreshed, refreshed),
        )
        self._engine: Any = None

    def attach(self, engine: Any) -> None:
        """Begins, once the engine is complete."""
        self._engine = engine
        engine.calls.joint = JointCalls(engine, self._room).call
        self._room.while_waiting = engine.links.attend
        self._exit_code = exit_code()
        atexit.register(self._finish)
        if self._restores:
            events.tell(self._root, "ready", rank=self._rank, restart_point=self._start, seconds=self._seconds())

    # ---- batches -----------------------------------------------------------------------------------

    def train_batch(self, train: Callable[[], Tensor]) -> Tensor:
        """Trains a batch, or does what is left of one that a process before this one has trained.

        Raises:
            ALRecoveryError: training again has given another loss.
        """
        entry = self._journal.take("batch", _BATCH)
        if self._position < self._start:
            if entry is None:
                raise ALRecoveryError(f"recovery: the journal ends before micro-batch {self._start}, the restart point")
            loss = self._skip(entry.value)
            if self._position == self._start:
                self._restore()
            return loss
        if self._position == 0:
            if self._restores:
                self._restore()
            else:
                self._save()
        loss = train()
        self._position += self._engine.micro_batches
        self._place.micro_batches = self._position
        value = [float(loss), str(loss.dtype).removeprefix("torch.")]
        if entry is None:
            self._journal.add("batch", _BATCH, value)
        elif entry.value != value:
            raise ALRecoveryError(
                f"recovery: trained again up to micro-batch {self._position}, the loss is {value[0]!r} and was "
                f"{entry.value[0]!r}: a layer or the data depends on more than the seeds"
            )
        if self._position % self._config.every == 0:
            self._save()
        if self._until and self._position >= self._until:
            self._report()
        return loss

    def _skip(self, value: list[Any]) -> Tensor:
        """Does what training a batch does beside the stage's own state."""
        engine = self._engine
        engine.skip_batch()
        self._position += engine.micro_batches
        loss = torch.tensor(value[0], dtype=getattr(torch, value[1]), device=engine.device)
        engine.agg_train_loss = loss
        return loss

    # ---- the state of the stage ----------------------------------------------------------------------

    def _save(self) -> None:
        engine = self._engine
        engine.stage.finite.settle()
        self._journal.flush()
        copies, trained, decoders = engine.decoder_copies, engine.stage.trained_micro_batches, 0
        if copies is not None:
            decoders = copies.refreshed_before(trained) - copies.refreshed_before(trained - self._position)
        self._saves.save(
            engine.state(),
            self._position,
            decoders=decoders,
            more={
                "report": engine.whole_report,
                "passes": engine.inference.passes,
                "watched": engine.generators.watched,
            },
        )

    def _restore(self) -> None:
        engine, start = self._engine, time.perf_counter()
        state = engine.state()
        more = self._saves.load(state, self._start)
        engine.set_counters(state)
        engine.whole_report.copy_(more["report"])
        engine.inference.passes = more["passes"]
        engine.generators.watched = tuple(more["watched"])
        if self._start:
            engine.unused.end()
        seconds = time.perf_counter() - start
        events.tell(self._root, "loaded", rank=self._rank, position=self._start, load=seconds)
        self._trains = time.time()
        if self._until and self._position >= self._until:
            self._report()

    def _report(self) -> None:
        """Tells that this process has come as far as the one before it."""
        until, self._until = self._until, 0
        made = self._engine.links.reformed
        told = [event for event in events.read(self._root) if event["rank"] == self._rank]
        death = next(event["moment"] for event in reversed(told) if event["event"] in events.ENDS)
        ready = next(event["moment"] for event in reversed(told) if event["event"] == "ready")
        events.tell(
            self._root,
            "recovered",
            rank=self._rank,
            micro_batch=until,
            recomputed=until - self._start,
            start=ready - death,
            reform=sum(each.met + each.connected for each in made),
            replay=time.time() - self._trains,
            replayed_bytes=sum(each.nbytes for each in made),
            seconds=self._seconds(),
        )

    def _seconds(self) -> float:
        return time.time() - self._began

    # ---- the end -----------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Waits at the end of the script until no stage can need messages of this one any more."""
        if not presence.here().own.failed:
            room = self._room
            room.gather(None)
            Ending(room.rank, room.world, store=room.store).leave(self._exit_code(), while_waiting=room.while_waiting)
        sys.stdout.flush()
        sys.stderr.flush()
