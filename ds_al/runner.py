"""Executes the instructions of a schedule, counts and times them, and records them while a recorder is set.

::

    schedule --- steps ---> runner --- each instruction ---> handler of the engine
                               |
                               +---> progress    always: what is executed now, counts, seconds
                               +---> recorder    while recording: start, end, wait, bytes of each instruction

Both engines, of associated learning and of back-propagation, execute their schedules here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from deepspeed.runtime.pipe.schedule import PipeInstruction, PipeSchedule

from ds_al.trace.events import LABELS
from ds_al.trace.recorder import Observation, Progress, Recording

Observe = Callable[[PipeInstruction, float], Observation | None]
"""``(instruction, seconds of the host) -> what to record of it``; ``None`` where it had nothing to do."""


class Runner:
    """Executes schedules.

    Args:
        handlers: executes an instruction of each type; called with the instruction's keyword arguments.
        observe: asked only while recording, right after an instruction.
        recording: what to record.
    """

    def __init__(
        self,
        handlers: Mapping[type[PipeInstruction], Callable[..., None]],
        *,
        observe: Observe,
        recording: Recording,
    ) -> None:
        self.recording = recording
        self.progress = Progress()
        self._handlers = handlers
        self._observe = observe

    def run(self, schedule: PipeSchedule) -> None:
        """Executes all steps of a schedule in their order.

        Whatever a handler raises is raised; the progress then still names the instruction.
        """
        for step in schedule:
            for instruction in step:
                self._execute(instruction)
        self.progress.instruction = None

    def _execute(self, instruction: PipeInstruction) -> None:
        handler, recorder = self._handlers[type(instruction)], self.recording.recorder
        name, progress = type(instruction).__name__, self.progress
        begin = recorder.mark() if recorder is not None else None
        start = time.perf_counter()
        progress.since, progress.instruction = start, instruction
        if self.recording.profiling:
            with torch.profiler.record_function(LABELS[name]):
                handler(**instruction.kwargs)
        else:
            handler(**instruction.kwargs)
        seconds = time.perf_counter() - start
        progress.seconds[name] += seconds
        progress.executed[name] += 1
        if recorder is not None:
            end, observed = recorder.mark(), self._observe(instruction, seconds)
            if observed is None:
                recorder.skip(name)
            else:
                recorder.add(name, begin, end, observed)

    @contextlib.contextmanager
    def timed(self, name: str, *, waiting: bool = False) -> Iterator[None]:
        """Times what runs inside, and records it while recording, as an instruction of this name."""
        recorder = self.recording.recorder
        begin: Any = recorder.mark() if recorder is not None else None
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.progress.seconds[name] += seconds
        self.progress.timed += 1
        if recorder is not None:
            recorder.add(name, begin, recorder.mark(), Observation(wait=seconds if waiting else 0.0))
