"""Recorder of executed instructions, and their progress, for AL and backprop engines."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.pipe.schedule import PipeInstruction

from ds_al.trace.events import MESSAGES, Event
from ds_al.trace.meter import ActivationMeter


class Observation(NamedTuple):
    """Waiting time and bytes of the instruction that has just been executed; see :class:`Event`."""

    wait: float = 0.0
    nbytes: int | None = None


NOTHING = Observation()
_RECEIVING = {receiving for receiving, _ in MESSAGES.values()}


class Recorder:
    """Collects the events of one rank.

    Args:
        stage: index of the rank's stage.
        replica: index of its data parallel replica of the pipeline.
        device: device of the stage. On a GPU, times are CUDA events on its current stream, recorded without
            synchronization, and converted to the host's clock when :attr:`events` is read.
        meter: counts activations, to record memory.
    """

    def __init__(
        self,
        stage: int,
        *,
        replica: int = 0,
        device: torch.device | None = None,
        meter: ActivationMeter | None = None,
    ) -> None:
        self.stage, self.replica = stage, replica
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
            name: class name of the instruction.
            start, end: values of :attr:`mark` before and after it.
        """
        memory = None if self.meter is None else self.meter.take_peak()
        self._raw.append((name, self._seen[name], start, end, None, *observed, memory))
        self._seen[name] += 1

    def skip(self, name: str) -> None:
        """Counts an instruction that had nothing to do, without an event."""
        self._seen[name] += 1

    def add_layer(self, name: str, layer: int, start: Any, end: Any) -> None:
        """Appends one layer's part of the current instruction."""
        self._raw.append((name, self._seen[name], start, end, layer, *NOTHING, None))

    @property
    def events(self) -> list[Event]:
        """All events, sorted by start. Waits for a GPU."""
        events = []
        for name, number, begin, finish, layer, wait, nbytes, memory in self._raw:
            start, end = self._seconds(begin), self._seconds(finish)
            if self._origin is not None and name in _RECEIVING:
                wait = end - start  # the host continues at once, and the stream waits
            event = Event(self.stage, name, number, start, end, layer, wait, nbytes, memory, copy=self.replica)
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


class Recording:
    """Current recorder and profiler state, shared by runner, stage and tracing."""

    __slots__ = ("profiling", "recorder")

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        """Recorder of every executed instruction, and of each layer's part of forward and backward, while recording."""
        self.profiling = False
        """Whether a ``torch.profiler`` runs; each instruction is then a named range."""


class Progress:
    """Current instruction of an engine, and counts and seconds of executed ones.

    It is a separate class since attributes of an engine, an ``nn.Module``, are slow to set, and these change several
    times per micro-batch.
    """

    __slots__ = ("__weakref__", "executed", "instruction", "seconds", "since", "timed")

    def __init__(self) -> None:
        self.instruction: PipeInstruction | None = None
        """The current instruction."""
        self.since = 0.0
        """Start time of the current instruction."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Seconds by instruction, since their reader last reset them."""
        self.executed: defaultdict[str, int] = defaultdict(int)
        """Number of executed instructions by name; never reset."""
        self.timed = 0
        """Number of other timed parts, such as the batches of an evaluation; never reset."""

    @property
    def total(self) -> int:
        """Number of all that has been executed: while it grows, the engine moves."""
        return sum(tuple(self.executed.values())) + self.timed

    @property
    def current(self) -> tuple[PipeInstruction, float] | None:
        """The current instruction and its start time, read by the watchdog's thread; ``None`` outside of all."""
        instruction = self.instruction
        return None if instruction is None else (instruction, self.since)
