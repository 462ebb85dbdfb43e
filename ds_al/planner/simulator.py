"""Runs the schedules themselves, on stages whose instructions take given times: who would compute what when.

The instructions come from the generators that the engines execute (:mod:`ds_al.schedule`), so a schedule is
described once. A simulated run is a list of events, like a recorded one: what draws and analyses the one takes
the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from deepspeed.runtime.pipe.schedule import PipeSchedule

from ds_al.baseline.schedules import BACKPROP_SCHEDULES
from ds_al.schedule import AL_SCHEDULES
from ds_al.trace import Event

RECEIVE_SLOTS = 2
"""Messages that a :class:`ds_al.transport.channel.Receiver` holds by default: one in use, one received ahead."""


@dataclass(frozen=True)
class StageCost:
    """Seconds that the instructions of one stage take."""

    forward: float
    """Of one micro-batch."""
    backward: float
    """Of one micro-batch."""
    step: float = 0.0
    """Of one optimizer step."""


def simulate(
    method: str,
    costs: Sequence[StageCost],
    *,
    micro_batches: int,
    batches: int,
    steps_per_batch: int | None = None,
    queue_depth: int = 2,
    latency: float = 0.0,
    transfer: float = 0.0,
) -> list[Event]:
    """Events of all stages, if nothing but forwards, backwards, steps and messages took time.

    Args:
        method: a name of :data:`~ds_al.schedule.AL_SCHEDULES` or :data:`~ds_al.schedule.BACKPROP_SCHEDULES`.
        costs: of each stage, in their order; they need not be equal.
        micro_batches: micro-batches per batch, M.
        batches: batches that follow one another.
        steps_per_batch: optimizer steps per batch of an AL schedule; by default M.
        queue_depth: messages that an AL stage may have under way.
        latency: seconds that a message takes to arrive, whatever its size.
        transfer: seconds for which a message occupies the link, one of each direction between neighbours. An AL
            stage computes meanwhile; back-propagation sends as DeepSpeed does, by calls that block for as long.

    Raises:
        RuntimeError: the schedules of the stages wait for each other.
    """
    run = _Run(method, costs, micro_batches, batches, steps_per_batch, queue_depth, latency, transfer)
    while any(run.left(stage) for stage in range(run.stages)):
        if not any([run.advance(stage) for stage in range(run.stages)]):
            raise RuntimeError(f"the stages of {method!r} wait for each other: {run.waiting()}")
    return sorted(run.events, key=lambda event: (event.start, event.stage))


class _Run:
    """A simulation under way: where each stage is, and when what has been sent, received and given back."""

    def __init__(
        self,
        method: str,
        costs: Sequence[StageCost],
        micro_batches: int,
        batches: int,
        steps_per_batch: int | None,
        queue_depth: int,
        latency: float,
        transfer: float,
    ) -> None:
        self.costs, self.latency, self.transfer, self.stages = costs, latency, transfer, len(costs)
        self.queue_depth = queue_depth if method in AL_SCHEDULES else None
        self.events: list[Event] = []
        self._clock = [0.0] * self.stages
        self._place = [0] * self.stages
        self._counts: list[defaultdict[str, int]] = [defaultdict(int) for _ in costs]
        # When each instruction that is done was come to, and when it was done, by stage, name and number.
        self._starts: dict[tuple[int, str, int], float] = {}
        self._ends: dict[tuple[int, str, int], float] = {}
        self._transferred: dict[tuple[int, int], float] = {}  # when an AL stage's message had left, by its number
        self._names = [
            instruction_names(method, micro_batches, self.stages, stage, steps_per_batch) * batches
            for stage in range(self.stages)
        ]

    def left(self, stage: int) -> bool:
        """Whether the stage has instructions left."""
        return self._place[stage] < len(self._names[stage])

    def waiting(self) -> str:
        """What each stage that is not through waits in."""
        return ", ".join(f"stage {s} in {self._names[s][self._place[s]]}" for s in range(self.stages) if self.left(s))

    def advance(self, stage: int) -> bool:
        """Executes all that this stage can execute now. Returns whether that was anything."""
        before = self._place[stage]
        while self.left(stage):
            name = self._names[stage][self._place[stage]]
            number, start = self._counts[stage][name], self._clock[stage]
            ready = self._ready(stage, name, number)
            if ready is None:
                break
            end = max(start, ready) + self._seconds(stage, name)
            self.events.append(Event(stage, name, number, start, end, wait=max(ready - start, 0.0)))
            self._starts[stage, name, number] = start
            self._ends[stage, name, number] = self._clock[stage] = end
            if name == "SendActivation" and self.queue_depth is not None:
                self._put_on_link(stage, number, end)
            self._counts[stage][name] += 1
            self._place[stage] += 1
        return self._place[stage] > before

    def _seconds(self, stage: int, name: str) -> float:
        cost = self.costs[stage]
        if name in ("SendActivation", "SendGrad") and self.queue_depth is None:
            return self.transfer
        return {"ForwardPass": cost.forward, "BackwardPass": cost.backward, "OptimizerStep": cost.step}.get(name, 0.0)

    def _ready(self, stage: int, name: str, number: int) -> float | None:
        """From when on an instruction may run; ``None`` as long as that is not known."""
        if name == "RecvActivation":
            return self._arrival(stage - 1, "SendActivation", number)
        if name == "RecvGrad":
            return self._arrival(stage + 1, "SendGrad", number)
        if name == "SendActivation" and self.queue_depth is not None and number >= self.queue_depth:
            return self._taken(stage, number - self.queue_depth)
        if name == "LossBroadcast":
            return self._reached(self.stages - 1, name, number)
        if name == "Barrier":
            times = [self._reached(other, name, number) for other in range(self.stages)]
            return None if None in times else max(time for time in times if time is not None)
        return 0.0

    def _put_on_link(self, stage: int, number: int, sent: float) -> None:
        """A message of an AL stage goes out when those before it have."""
        before = self._transferred.get((stage, number - 1), 0.0)
        self._transferred[stage, number] = max(sent, before) + self.transfer

    def _arrival(self, stage: int, name: str, number: int) -> float | None:
        sent = self._transferred.get((stage, number)) if self.queue_depth is not None else None
        sent = self._ends.get((stage, name, number)) if self.queue_depth is None else sent
        return None if sent is None else sent + self.latency

    def _taken(self, stage: int, number: int) -> float | None:
        """When the next stage had a free buffer for a message, and the message was there."""
        if number < RECEIVE_SLOTS:
            return self._arrival(stage, "SendActivation", number)
        freed = self._ends.get((stage + 1, "BackwardPass", number - RECEIVE_SLOTS))
        sent = self._arrival(stage, "SendActivation", number)
        return None if freed is None or sent is None else max(freed, sent)

    def _reached(self, stage: int, name: str, number: int) -> float | None:
        """When a stage came to an instruction that others wait for."""
        if (stage, name, number) in self._starts:
            return self._starts[stage, name, number]
        at_it = self.left(stage) and self._names[stage][self._place[stage]] == name
        return self._clock[stage] if at_it and self._counts[stage][name] == number else None


def instruction_names(
    method: str, micro_batches: int, stages: int, stage: int, steps_per_batch: int | None = None
) -> list[str]:
    """The instructions of a stage for one batch, by the names of their classes."""
    schedule: PipeSchedule
    if method in AL_SCHEDULES:
        schedule = AL_SCHEDULES[method](micro_batches, stages, stage, steps_per_batch or micro_batches)
    else:
        schedule = BACKPROP_SCHEDULES[method](micro_batches, stages, stage)
    names = [type(instruction).__name__ for step in schedule for instruction in step]
    # DeepSpeed's last stage tells all others the loss of every batch.
    return names if method in AL_SCHEDULES else [*names, "LossBroadcast"]
