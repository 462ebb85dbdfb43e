"""Records what an engine executes, and brings it together: for AL and for back-propagation alike."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

from deepspeed import comm as dist
from deepspeed.runtime.pipe.schedule import PipeInstruction, PipeSchedule


@dataclass(frozen=True)
class Event:
    """One executed instruction. Times are seconds of the host's monotonic clock."""

    stage: int
    instruction: str
    micro_batch: int
    """How many instructions of this kind the stage had executed before: the micro-batch, counted over batches."""
    start: float
    end: float


class Recorder:
    """Collects the events of one rank."""

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self.events: list[Event] = []
        self._seen: Counter[str] = Counter()

    def add(self, instruction: PipeInstruction, start: float, end: float) -> None:
        """Appends one executed instruction."""
        name = type(instruction).__name__
        self.events.append(Event(self.stage, name, self._seen[name], start, end))
        self._seen[name] += 1


class RecordedSchedule:
    """Mix-in for a ``PipelineEngine``: executes schedules, and records them while :attr:`recorder` is set."""

    recorder: Recorder | None = None
    current: tuple[PipeInstruction, float] | None = None
    """The instruction that this stage is in, and when it began; read by the stall watch's thread."""
    num_stages: int
    grid: Any
    _INSTRUCTION_MAP: ClassVar[dict[Any, Any]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.instruction_seconds: defaultdict[str, float] = defaultdict(float)
        """Seconds by instruction, whether recorded or not; whoever reports them resets them."""
        self.executed: defaultdict[str, int] = defaultdict(int)
        """Instructions executed so far, by name; never reset."""
        super().__init__(*args, **kwargs)

    def _exec_schedule(self, pipe_schedule: PipeSchedule) -> None:
        self._reserve_pipe_buffers(pipe_schedule.num_pipe_buffers())  # type: ignore[attr-defined]
        self.fwd_outputs: list[Any] = []
        handlers, recorder, seconds = self._INSTRUCTION_MAP, self.recorder, self.instruction_seconds
        for instructions in pipe_schedule:
            for instruction in instructions:
                start = time.perf_counter()
                self.current = instruction, start
                handlers[type(instruction)](self, **instruction.kwargs)
                end = time.perf_counter()
                seconds[type(instruction).__name__] += end - start
                self.executed[type(instruction).__name__] += 1
                if recorder is not None:
                    recorder.add(instruction, start, end)
        self.current = None

    def gather(self, value: Any) -> list[Any]:
        """Values of all stages, in their order; so it drains the pipeline. Every rank must call it."""
        values: list[Any] = [None] * self.num_stages
        dist.all_gather_object(values, value, group=self.grid.get_pipe_parallel_group())
        return values
