"""Records what an engine executes, for associated learning and for back-propagation alike."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.pipe.schedule import PipeInstruction

from ds_al.trace.events import MESSAGES, Event
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


class Recording:
    """What is recorded now; shared by what executes instructions, by the stage, and by what switches recording."""

    __slots__ = ("profiling", "recorder")

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        """Gets every executed instruction, and each layer's part of forward and backward, where it is set."""
        self.profiling = False
        """Whether a ``torch.profiler`` runs, which then gets a named range per instruction."""


class Progress:
    """What an engine executes now, and what it has executed. A class of its own, since an engine is an ``nn.Module``,
    whose attributes are slow to set, and these change several times per micro-batch."""

    __slots__ = ("__weakref__", "executed", "instruction", "seconds", "since")

    def __init__(self) -> None:
        self.instruction: PipeInstruction | None = None
        """The instruction that the stage executes now."""
        self.since = 0.0
        """When it began."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Seconds by instruction; whoever reports them resets them."""
        self.executed: defaultdict[str, int] = defaultdict(int)
        """Instructions executed so far, by name; never reset."""

    @property
    def current(self) -> tuple[PipeInstruction, float] | None:
        """The present instruction, and when it began; read by the watchdog's thread."""
        instruction = self.instruction
        return None if instruction is None else (instruction, self.since)
