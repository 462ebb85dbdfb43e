"""Records what an engine executes, and brings it together: for AL and for back-propagation alike."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from deepspeed import comm as dist
from deepspeed.runtime.pipe.schedule import PipeInstruction, PipeSchedule

from ds_al.trace.events import LABELS, MESSAGES, Event
from ds_al.trace.meter import ActivationMeter


class Observation(NamedTuple):
    """What an engine can say of an instruction that it has just executed; see :class:`Event`."""

    wait: float = 0.0
    nbytes: int | None = None


NOTHING = Observation()
_RECEIVING = {receiving for receiving, _ in MESSAGES.values()}


class Recorder:
    """Collects the events of one rank.

    Args:
        stage: the rank's stage.
        copy: its data parallel copy of the pipeline.
        device: where it computes. On a GPU times are taken by events of its current stream, without waiting
            for it, and laid on the host's clock when :attr:`events` are read.
        meter: counts activations, if memory is to be recorded.
    """

    def __init__(
        self,
        stage: int,
        *,
        copy: int = 0,
        device: torch.device | None = None,
        meter: ActivationMeter | None = None,
    ) -> None:
        self.stage, self.copy = stage, copy
        self.meter = meter
        self._seen: Counter[str] = Counter()
        self._raw: list[tuple[Any, ...]] = []
        self.mark: Any = time.perf_counter
        self._origin: tuple[torch.cuda.Event, float] | None = None
        if device is not None and device.type == "cuda":
            self.mark = _cuda_mark
            torch.cuda.synchronize(device)
            self._origin = _cuda_mark(), time.perf_counter()

    def add(self, name: str, start: Any, end: Any, observed: Observation = NOTHING) -> None:
        """Appends one executed instruction.

        Args:
            name: name of its class.
            start, end: what :attr:`mark` returned before and after it.
        """
        memory = None if self.meter is None else self.meter.take_peak()
        self._raw.append((name, self._seen[name], start, end, None, *observed, memory))
        self._seen[name] += 1

    def skip(self, name: str) -> None:
        """Counts an instruction that had nothing to do, and appends none."""
        self._seen[name] += 1

    def add_layer(self, name: str, layer: int, start: Any, end: Any) -> None:
        """Appends one layer's part of the instruction that is being executed."""
        self._raw.append((name, self._seen[name], start, end, layer, *NOTHING, None))

    @property
    def events(self) -> list[Event]:
        """All events, by their start. On a GPU this waits for it."""
        events = []
        for name, number, begin, finish, layer, wait, nbytes, memory in self._raw:
            start, end = self._seconds(begin), self._seconds(finish)
            if self._origin is not None and name in _RECEIVING:
                wait = end - start  # the host goes on at once, and the stream waits
            event = Event(self.stage, name, number, start, end, layer, wait, nbytes, memory, copy=self.copy)
            events.append(event)
        return sorted(events, key=lambda event: (event.start, -event.end))

    def _seconds(self, mark: Any) -> float:
        if self._origin is None:
            return mark
        mark.synchronize()
        event, host = self._origin
        return host + event.elapsed_time(mark) / 1000


def _cuda_mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Progress:
    """What an engine is doing and has done. Apart from it: an engine is an ``nn.Module``, whose attributes are slow
    to set, and these change several times per micro-batch."""

    __slots__ = ("executed", "instruction", "instruction_seconds", "since")

    def __init__(self) -> None:
        self.instruction: PipeInstruction | None = None
        """The instruction that the stage is in."""
        self.since = 0.0
        """When it began."""
        self.instruction_seconds: defaultdict[str, float] = defaultdict(float)
        self.executed: defaultdict[str, int] = defaultdict(int)


class RecordedSchedule:
    """Mix-in for a ``PipelineEngine``: executes schedules, and records them while :attr:`recorder` is set."""

    recorder: Recorder | None = None
    profiling = False
    """Whether a ``torch.profiler`` runs, which is then told what is executed."""
    num_stages: int
    grid: Any
    _INSTRUCTION_MAP: ClassVar[dict[Any, Any]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.progress = Progress()
        super().__init__(*args, **kwargs)

    @property
    def instruction_seconds(self) -> defaultdict[str, float]:
        """Seconds by instruction, whether recorded or not; whoever reports them resets them."""
        return self.progress.instruction_seconds

    @property
    def executed(self) -> defaultdict[str, int]:
        """Instructions executed so far, by name; never reset."""
        return self.progress.executed

    @property
    def current(self) -> tuple[PipeInstruction, float] | None:
        """The instruction that this stage is in, and when it began; read by the watchdog's thread."""
        instruction = self.progress.instruction
        return None if instruction is None else (instruction, self.progress.since)

    def _exec_schedule(self, pipe_schedule: PipeSchedule) -> None:
        self._reserve_pipe_buffers(pipe_schedule.num_pipe_buffers())  # type: ignore[attr-defined]
        self.fwd_outputs: list[Any] = []
        for instructions in pipe_schedule:
            for instruction in instructions:
                self._execute(instruction)
        self.progress.instruction = None

    def _execute(self, instruction: PipeInstruction) -> None:
        handler, recorder = self._INSTRUCTION_MAP[type(instruction)], self.recorder
        name, progress = type(instruction).__name__, self.progress
        begin = recorder.mark() if recorder is not None else None
        start = time.perf_counter()
        progress.since, progress.instruction = start, instruction
        if self.profiling:
            with torch.profiler.record_function(LABELS[name]):
                handler(self, **instruction.kwargs)
        else:
            handler(self, **instruction.kwargs)
        seconds = time.perf_counter() - start
        progress.instruction_seconds[name] += seconds
        progress.executed[name] += 1
        if recorder is not None:
            end, observed = recorder.mark(), self._observe(instruction, seconds)
            if observed is None:
                recorder.skip(name)
            else:
                recorder.add(name, begin, end, observed)

    def _observe(self, instruction: PipeInstruction, seconds: float) -> Observation | None:
        """Asked only while recording, right after an instruction that took so many seconds of the host.

        ``None`` says that it had nothing to do.
        """
        raise NotImplementedError

    @contextlib.contextmanager
    def recorded(self, name: str, *, waiting: bool = False) -> Iterator[None]:
        """Times what runs inside, and records it while recording, as an instruction of this name."""
        recorder = self.recorder
        begin = recorder.mark() if recorder is not None else None
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.instruction_seconds[name] += seconds
        if recorder is not None:
            recorder.add(name, begin, recorder.mark(), Observation(wait=seconds if waiting else 0.0))

    def gather(self, value: Any) -> list[Any]:
        """Values of all stages, in their order; so it drains the pipeline. Every rank must call it."""
        values: list[Any] = [None] * self.num_stages
        dist.all_gather_object(values, value, group=self.grid.get_pipe_parallel_group())
        return values
