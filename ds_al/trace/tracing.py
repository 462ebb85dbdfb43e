"""Tracing of the batches selected in the config; writes one set of files for all ranks after the last one."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from ds_al.config.associated_learning import ALConfig
from ds_al.parallel.topology import StageTopology
from ds_al.trace.clock import ClockOffset, align
from ds_al.trace.events import Event
from ds_al.trace.files import merge, write_trace
from ds_al.trace.meter import ActivationMeter
from ds_al.trace.recorder import Recorder, Recording


class Tracing:
    """Implements the ``"trace"`` block of a config. Every rank must create one, before its engine trains.

    Args:
        config: the ``"associated_learning"`` block; its ``trace`` is enabled.
        topology: place of this rank.
        device: device of the stage.
        recording: holds the recorder while the selected batches are trained.
        parameters: returns the module's parameters, which do not count as activations.
    """

    def __init__(
        self,
        config: ALConfig,
        *,
        topology: StageTopology,
        device: torch.device,
        recording: Recording,
        parameters: Callable[[], Iterable[Tensor]],
    ) -> None:
        self.config, self.method = config.trace, config.method
        self.folder = Path(config.trace.folder)
        """Folder for the files; may be changed until they are written."""
        self.events: list[Event] | None = None
        """Events of all ranks on one clock, on every rank, after recording."""
        self._topology, self._device, self._recording, self._parameters = topology, device, recording, parameters
        self.clock: ClockOffset = align(list(range(dist.get_world_size())))
        """Offset of this rank's clock from the first rank's."""
        self._batch = self._micro_batches = 0
        self._meter: ActivationMeter | None = None
        self._profiler: torch.profiler.profile | None = None
        atexit.register(self._complain)

    @classmethod
    def of(cls, config: ALConfig, **parts: Any) -> Tracing | None:
        """Returns a tracing if the config enables it, else ``None``."""
        return cls(config, **parts) if config.trace.enabled else None

    def before_batch(self, *, micro_batches: int) -> None:
        """Starts recording if the batch about to be trained is the first one selected."""
        self._batch, self._micro_batches = self._batch + 1, micro_batches
        if self._batch == self.config.batches[0]:
            self._start()

    def after_batch(self) -> None:
        """Finishes recording after the last selected batch, for which all ranks gather their events."""
        if self._batch == self.config.batches[1]:
            self.finish()

    def finish(self) -> None:
        """Stops recording, and writes the recorded events. Every rank must call it; a second call does nothing."""
        recorder = self._recording.recorder
        if recorder is None:
            return
        self._recording.recorder = None
        self._stop()
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (recorder.events, self.clock))
        self.events = merge([events for events, _ in parts], [clock for _, clock in parts])
        if self._writes():
            about = {
                "method": self.method,
                "stages": self._topology.stages,
                "copies": len(parts) // self._topology.stages,
                "batches": [self.config.batches[0], self._batch],
                # By rank.
                "clock_offset_seconds": [clock.offset for _, clock in parts],
                "clock_error_seconds": [clock.error for _, clock in parts],
            }
            write_trace(self.folder, self.events, micro_batches=self._micro_batches, about=about)

    def _start(self) -> None:
        if self.config.memory:
            self._meter = ActivationMeter(exclude=self._parameters())
            self._meter.__enter__()
        if self._topology.rank in self.config.profiler_ranks:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
            self._recording.profiling = True
        self._recording.recorder = Recorder(
            self._topology.stage, replica=self._topology.replica, device=self._device, meter=self._meter
        )

    def _stop(self) -> None:
        if self._meter is not None:
            self._meter.__exit__(None, None, None)
        if self._profiler is not None:
            self._recording.profiling = False
            self._profiler.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self.folder / f"profiler-rank{self._topology.rank}.json"))

    def _complain(self) -> None:
        """Prints a warning if the process ends before the selected batches were recorded."""
        if self.events is None and self._batch and self._writes():
            first, last = self.config.batches
            print(
                f'"trace": batches {first} to {last} were to be recorded, and training ended after {self._batch}: '
                "nothing was written. Call engine.tracing.finish() on every rank, or record earlier batches",
                file=sys.stderr,
            )

    def _writes(self) -> bool:
        """Whether this is the rank that writes the files: the last stage of the first replica."""
        return self._topology.is_last and self._topology.replica == 0
