"""Runs the schedules themselves, on stages whose instructions take given times: which stage would compute what when.

The instructions come from the generators that the engines execute (:mod:`ds_al.schedule`), so a schedule is
described once. In every round each stage that can go on executes one instruction, and numpy does so for all stages,
and for all repetitions of a random run, at once: 1,024 stages take seconds. Which instruction comes after which does
not depend on how long they take, so repetitions with other times pass through the same rounds.

Shapes: ``P`` stages, ``N`` micro-batches of all batches together, ``R`` repetitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from deepspeed.runtime.pipe.schedule import PipeSchedule
from numpy.typing import ArrayLike, NDArray

from ds_al.baseline.schedules import BACKPROP_SCHEDULES
from ds_al.schedule import AL_SCHEDULES
from ds_al.trace import Event

Times = NDArray[np.float64]
Places = NDArray[np.int64]

_OPERATIONS = (
    *("ForwardPass", "BackwardPass", "OptimizerStep", "SendActivation", "RecvActivation", "SendGrad", "RecvGrad"),
    *("Barrier", "LossBroadcast", "EndOfBatch", "EndOfRun"),
)  # all others take no time
_CODE = {name: number for number, name in enumerate(_OPERATIONS)}
_COMPUTING = [_CODE[name] for name in ("ForwardPass", "BackwardPass", "OptimizerStep")]


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
    receive_slots: int = 2,
    latency: ArrayLike = 0.0,
    transfer: ArrayLike = 0.0,
) -> list[Event]:
    """Events of all stages, if nothing but forwards, backwards, steps and messages took time.

    The events are like those of a recorded run, so the same functions draw and analyse both. Instructions that take
    no time and wait for nothing have no event.

    Args:
        method: a name of :data:`~ds_al.schedule.AL_SCHEDULES` or :data:`~ds_al.schedule.BACKPROP_SCHEDULES`.
        costs: of each stage, in their order; they need not be equal.
        micro_batches: micro-batches per batch, M.
        batches: batches that follow one another.
        steps_per_batch: optimizer steps per batch of an AL schedule; by default M.
        queue_depth: messages that an AL stage may have under way.
        receive_slots: messages that an AL stage holds of its predecessor: one in use, the others received ahead.
        latency: seconds that a message takes to arrive, whatever its size; one for all, or one for each of the
            ``P - 1`` links.
        transfer: seconds for which a message occupies the link, one of each direction between neighbours; one for
            all, or ``P - 1``. An AL stage computes meanwhile; back-propagation sends as DeepSpeed does, by calls that
            block for as long.

    Raises:
        RuntimeError: the schedules of the stages wait for each other.
    """
    run = _run(
        method,
        costs,
        micro_batches=micro_batches,
        batches=batches,
        steps_per_batch=steps_per_batch,
        queue_depth=queue_depth,
        receive_slots=receive_slots,
        latency=latency,
        transfer=transfer,
        events=[],
    )
    assert run.events is not None
    return sorted(run.events, key=lambda event: (event.start, event.stage))


def stage_ends(
    method: str,
    costs: Sequence[StageCost],
    *,
    micro_batches: int,
    batches: int,
    steps_per_batch: int | None = None,
    queue_depth: int = 2,
    receive_slots: int = 2,
    latency: ArrayLike = 0.0,
    transfer: ArrayLike = 0.0,
    factors: Times | None = None,
) -> Times:
    """When the computations of each batch were done on each stage, ``(P, batches, R)`` seconds after the start.

    Args:
        method, costs, micro_batches, batches, steps_per_batch, queue_depth, receive_slots, latency, transfer: as of
            :func:`simulate`.
        factors: ``(P, N, R)``, by which forward and backward of a micro-batch take longer on a stage; without
            them R is 1.

    Raises:
        RuntimeError: the schedules of the stages wait for each other.
    """
    return _run(
        method,
        costs,
        micro_batches=micro_batches,
        batches=batches,
        steps_per_batch=steps_per_batch,
        queue_depth=queue_depth,
        receive_slots=receive_slots,
        latency=latency,
        transfer=transfer,
        factors=factors,
    ).marks


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


@lru_cache(maxsize=16)
def _program(method: str, micro_batches: int, stages: int, batches: int, steps_per_batch: int | None) -> NDArray[Any]:
    """Operations of every stage, ``(P, length)`` numbers; a batch's last computation is followed by its end."""
    rows, known = [], {}
    for stage in range(stages):
        names = instruction_names(method, micro_batches, stages, stage, steps_per_batch)
        key = tuple(names)
        if key not in known:
            codes = np.array([_CODE[name] for name in names if name in _CODE], dtype=np.int8)
            last = int(np.flatnonzero(np.isin(codes, _COMPUTING)).max(initial=-1)) + 1
            known[key] = np.tile(np.insert(codes, last, _CODE["EndOfBatch"]), batches)
        rows.append(known[key])
    program = np.full((stages, max(map(len, rows)) + 1), _CODE["EndOfRun"], dtype=np.int8)
    for stage, row in enumerate(rows):
        program[stage, : len(row)] = row
    return program


def _run(
    method: str,
    costs: Sequence[StageCost],
    *,
    micro_batches: int,
    batches: int,
    steps_per_batch: int | None,
    queue_depth: int,
    receive_slots: int,
    latency: ArrayLike,
    transfer: ArrayLike,
    factors: Times | None = None,
    events: list[Event] | None = None,
) -> _Simulation:
    """Simulates until no stage has anything left."""
    links = np.full(len(costs), np.nan)  # a stage's link to the next one; the last has none
    run = _Simulation(
        _program(method, micro_batches, len(costs), batches, steps_per_batch),
        np.array([(cost.forward, cost.backward, cost.step) for cost in costs], dtype=float),
        batches=batches,
        queue_depth=queue_depth if method in AL_SCHEDULES else None,
        receive_slots=receive_slots,
        latency=_per_link(latency, links),
        transfer=_per_link(transfer, links),
        factors=np.ones((1, 1, 1)) if factors is None else factors,
        total=micro_batches * batches,
        events=events,
    )
    while not run.done():
        if not run.advance():
            raise RuntimeError(f"the stages of {method!r} wait for each other: {run.waiting()}")
    return run


def _per_link(value: ArrayLike, links: Times) -> Times:
    filled = links.copy()
    filled[:-1] = value
    return filled


class _Simulation:
    """Simulator state: per-stage clocks and execution counts and, where other stages depend on them, completion times.

    Args:
        queue_depth: of an AL schedule; ``None`` for back-propagation, whose sends block.
        events: where executed operations are recorded, of a simulation with ``R = 1``.
    """

    def __init__(
        self,
        program: NDArray[Any],
        costs: Times,
        *,
        batches: int,
        queue_depth: int | None,
        receive_slots: int,
        latency: Times,
        transfer: Times,
        factors: Times,
        total: int,
        events: list[Event] | None,
    ) -> None:
        stages, repeats = len(program), factors.shape[2]
        self.program, self.costs, self.factors, self.events = program, costs, factors, events
        self.latency, self.transfer = latency[:, None], transfer[:, None]
        self.queue_depth, self.receive_slots = queue_depth, receive_slots
        self.stages = np.arange(stages)
        self.place = np.zeros(stages, dtype=np.int64)
        self.clock = np.zeros((stages, repeats))
        self.waited = np.zeros((stages, repeats))  # in the operation that was executed last
        self.counts = np.zeros((len(_OPERATIONS), stages), dtype=np.int64)
        self.marks = np.zeros((stages, batches, repeats))
        self.broadcast = np.zeros((batches, repeats))  # when the last stage came to tell the loss
        shape = (stages, total, repeats)
        self.activation_sent = np.zeros(shape)  # through the link but for its latency
        self.gradient_sent = np.zeros(shape if queue_depth is None else (1, 1, 1))
        self.backward_end = np.zeros(shape if queue_depth is not None else (1, 1, 1))

    def done(self) -> bool:
        """Whether no stage has anything left."""
        return bool((self.program[self.stages, self.place] == _CODE["EndOfRun"]).all())

    def waiting(self) -> str:
        """The operation in which each stage waits that has any left."""
        names = [_OPERATIONS[code] for code in self.program[self.stages, self.place]]
        return ", ".join(f"stage {stage} in {name}" for stage, name in enumerate(names) if name != "EndOfRun")

    def advance(self) -> bool:
        """Executes an operation on every stage that can. Returns whether there was one."""
        operations = self.program[self.stages, self.place]
        moved = False
        for code in np.unique(operations):
            name = _OPERATIONS[code]
            if name != "EndOfRun":
                at = np.flatnonzero(operations == code)
                if self.events is None:
                    at = self._execute(name, at)
                else:
                    at = self._recorded(self.events, name, at)
                self.counts[code, at] += 1
                self.place[at] += 1
                moved = moved or bool(len(at))
        return moved

    def _execute(self, name: str, at: Places) -> Places:
        executed: Places = getattr(self, f"_{name}")(at, self.counts[_CODE[name], at])
        return executed

    def _recorded(self, events: list[Event], name: str, at: Places) -> Places:
        before = self.clock.copy()
        self.waited[:] = 0.0
        at = self._execute(name, at)
        if name != "EndOfBatch":
            for stage in at.tolist():
                number = int(self.counts[_CODE[name], stage])
                start, end, wait = (float(times[stage, 0]) for times in (before, self.clock, self.waited))
                events.append(Event(stage, name, number, start, end, wait=wait))
        return at

    # Each takes the stages that have come to an operation and how often they have executed it before, and returns
    # those of them that could.

    def _compute(self, at: Places, number: Places, column: int) -> None:
        factors = self.factors[at, number] if self.factors.size > 1 else self.factors[0]
        self.clock[at] += self.costs[at, column, None] * factors

    def _ForwardPass(self, at: Places, number: Places) -> Places:
        self._compute(at, number, 0)
        return at

    def _BackwardPass(self, at: Places, number: Places) -> Places:
        self._compute(at, number, 1)
        if self.queue_depth is not None:
            self.backward_end[at, number] = self.clock[at]
        return at

    def _OptimizerStep(self, at: Places, number: Places) -> Places:
        self.clock[at] += self.costs[at, 2, None]
        return at

    def _SendActivation(self, at: Places, number: Places) -> Places:
        if self.queue_depth is None:
            self.clock[at] += self.transfer[at]
            self.activation_sent[at, number] = self.clock[at]
            return at
        taken = number - self.queue_depth  # the message that must have been taken before this one may go
        freed = taken - self.receive_slots  # the micro-batch that the next stage must be through with for that
        able = freed < self.counts[_CODE["BackwardPass"], at + 1]
        at, number, taken, freed = at[able], number[able], taken[able], freed[able]
        arrival = self.activation_sent[at, np.maximum(taken, 0)] + self.latency[at]
        arrival = np.where(taken[:, None] >= 0, arrival, 0.0)
        free = np.where(freed[:, None] >= 0, self.backward_end[at + 1, np.maximum(freed, 0)], 0.0)
        self._wait(at, np.maximum(arrival, free))
        before = np.where(number[:, None] > 0, self.activation_sent[at, np.maximum(number - 1, 0)], 0.0)
        self.activation_sent[at, number] = np.maximum(self.clock[at], before) + self.transfer[at]
        return at

    def _SendGrad(self, at: Places, number: Places) -> Places:
        self.clock[at] += self.transfer[at - 1]
        self.gradient_sent[at, number] = self.clock[at]
        return at

    def _RecvActivation(self, at: Places, number: Places) -> Places:
        able = number < self.counts[_CODE["SendActivation"], at - 1]
        at, number = at[able], number[able]
        self._wait(at, self.activation_sent[at - 1, number] + self.latency[at - 1])
        return at

    def _RecvGrad(self, at: Places, number: Places) -> Places:
        able = number < self.counts[_CODE["SendGrad"], at + 1]
        at, number = at[able], number[able]
        self._wait(at, self.gradient_sent[at + 1, number] + self.latency[at])
        return at

    def _Barrier(self, at: Places, number: Places) -> Places:
        if len(at) < len(self.stages):
            return at[:0]
        self._wait(at, self.clock.max(axis=0))
        return at

    def _LossBroadcast(self, at: Places, number: Places) -> Places:
        last = self.stages[-1]
        if at[-1] == last:
            self.broadcast[number[-1]] = self.clock[last]
            return at[-1:]
        able = number < self.counts[_CODE["LossBroadcast"], last]
        self._wait(at[able], self.broadcast[number[able]])
        return at[able]

    def _EndOfBatch(self, at: Places, number: Places) -> Places:
        self.marks[at, number] = self.clock[at]
        return at

    def _wait(self, at: Places, ready: Times) -> None:
        if self.events is not None:
            self.waited[at] = np.maximum(ready - self.clock[at], 0.0)
        self.clock[at] = np.maximum(self.clock[at], ready)
