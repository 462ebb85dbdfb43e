"""Records the batches that a config asks for, and writes one set of files for all ranks when the last one is done."""

from __future__ import annotations

import atexit
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from deepspeed import comm as dist

from ds_al.config.associated_learning import ALConfig, TraceConfig
from ds_al.trace.clock import ClockOffset, align
from ds_al.trace.events import Event
from ds_al.trace.files import merge, write_trace
from ds_al.trace.meter import ActivationMeter
from ds_al.trace.recorder import Recorder

if TYPE_CHECKING:
    from ds_al.trace.recorder import RecordedSchedule


class Tracing:
    """What the ``"trace"`` block of a config does. Every rank makes one, before its engine trains.

    Args:
        engine: whose instructions are recorded.
        config: the block; ``enabled``.
        method: the schedule's name, for readers of the trace.
    """

    def __init__(self, engine: RecordedSchedule, *, config: TraceConfig, method: str) -> None:
        self.engine, self.config, self.method = engine, config, method
        self.folder = Path(config.folder)
        """Where the files go; may be changed until they are written."""
        self.events: list[Event] | None = None
        """Events of all ranks on one clock, on every rank, once recording is over."""
        ranks = list(range(dist.get_world_size()))
        self.clock: ClockOffset = align(ranks, device=engine.device)  # type: ignore[attr-defined]
        """How far this rank's clock is from the first rank's."""
        self._batch = 0
        self._meter: ActivationMeter | None = None
        self._profiler: torch.profiler.profile | None = None
        atexit.register(self._complain)

    @classmethod
    def of(cls, engine: RecordedSchedule, config: ALConfig) -> Tracing | None:
        """What a config asks for: ``None`` where it does not ask."""
        return cls(engine, config=config.trace, method=config.method) if config.trace.enabled else None

    def before_batch(self) -> None:
        """A batch is about to be trained."""
        self._batch += 1
        if self._batch == self.config.batches[0]:
            self._start()

    def after_batch(self) -> None:
        """A batch has been trained. After the last one to record, all ranks meet here."""
        if self._batch == self.config.batches[1]:
            self.finish()

    def finish(self) -> None:
        """Stops recording, and writes what there is. Every rank must call it; does nothing the second time."""
        engine, recorder = self.engine, self.engine.recorder
        if recorder is None:
            return
        engine.recorder = None
        self._stop()
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (recorder.events, self.clock))
        self.events = merge([events for events, _ in parts], [clock for _, clock in parts])
        if self._writes():
            about = {
                "method": self.method,
                "stages": engine.num_stages,
                "copies": len(parts) // engine.num_stages,
                "batches": [self.config.batches[0], self._batch],
                # By rank.
                "clock_offset_seconds": [clock.offset for _, clock in parts],
                "clock_error_seconds": [clock.error for _, clock in parts],
            }
            write_trace(self.folder, self.events, micro_batches=engine.micro_batches, about=about)  # type: ignore[attr-defined]

    def _start(self) -> None:
        engine: Any = self.engine
        if self.config.memory:
            self._meter = ActivationMeter(exclude=engine.module.parameters())
            self._meter.__enter__()
        if engine.global_rank in self.config.profiler_ranks:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
            engine.profiling = True
        copy = engine.grid.get_data_parallel_rank()
        engine.recorder = Recorder(engine.stage_id, copy=copy, device=engine.device, meter=self._meter)

    def _stop(self) -> None:
        engine: Any = self.engine
        if self._meter is not None:
            self._meter.__exit__(None, None, None)
        if self._profiler is not None:
            engine.profiling = False
            self._profiler.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self.folder / f"profiler-rank{engine.global_rank}.json"))

    def _complain(self) -> None:
        """Says so when a process ends while it still records, or before it ever did."""
        if self.events is None and self._batch and self._writes():
            first, last = self.config.batches
            print(
                f'"trace": batches {first} to {last} were to be recorded, and training ended after {self._batch}: '
                "nothing was written. Call engine.tracing.finish() on every rank, or record earlier batches",
                file=sys.stderr,
            )

    def _writes(self) -> bool:
        """Whether this is the rank that writes the files: the last stage of the first copy."""
        engine: Any = self.engine
        return engine.is_last_stage() and engine.grid.get_data_parallel_rank() == 0
