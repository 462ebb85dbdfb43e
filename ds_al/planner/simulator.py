"""Simulator of schedules: executes their instructions on stages with given costs, and returns when each one runs.

The instructions come from the generators that the engines execute (:mod:`ds_al.schedule`, :mod:`ds_al.group_schedule`),
so each schedule is defined once. In every round each stage that is not blocked executes one instruction
(:mod:`ds_al.planner.clocks`): 1,024 stages take seconds. The order of instructions does not depend on their duration,
so repetitions with different times share the same rounds.

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
from ds_al.group_schedule import GROUP_SCHEDULES, Place
from ds_al.planner.clocks import CODE, COMPUTING, Clocks, Times
from ds_al.schedule import AL_SCHEDULES
from ds_al.trace import Event

ZERO_BUBBLE = {"bp_zb_h1": "zb_h1", "bp_zb_h2": "zb_h2"}
"""Schedules of back-propagation that are those of one group of all stages."""


@dataclass(frozen=True)
class StageCost:
    """Cost of one stage's instructions in seconds."""

    forward: float
    """Forward of one micro-batch."""
    backward: float
    """Backward of one micro-batch."""
    step: float = 0.0
    """One optimizer step."""
    weights: float | None = None
    """Part of the backward that computes the gradients of weights, which a split backward puts off; by default half."""

    @property
    def parts(self) -> tuple[float, float, float, float, float]:
        """Forward, backward, its two halves for the input and for the weights, step."""
        weights = self.backward / 2 if self.weights is None else self.weights
        return self.forward, self.backward, self.backward - weights, weights, self.step


def simulate(
    method: str,
    costs: Sequence[StageCost],
    *,
    micro_batches: int,
    batches: int,
    steps_per_batch: int | None = None,
    groups: Sequence[int] = (),
    queue_depth: int = 2,
    receive_slots: int = 2,
    latency: ArrayLike = 0.0,
    transfer: ArrayLike = 0.0,
) -> list[Event]:
    """Simulates the events of all stages if only forwards, backwards, steps and messages take time.

    The events have the format of a recorded run, so the same functions draw and analyse both. Instructions that take
    no time and wait for nothing have no event.

    Args:
        method: a name of :data:`~ds_al.schedule.AL_SCHEDULES`, :data:`~ds_al.baseline.schedules.BACKPROP_SCHEDULES`,
            :data:`~ds_al.group_schedule.GROUP_SCHEDULES` or :data:`ZERO_BUBBLE`.
        costs: cost of each stage, in order; they may differ.
        micro_batches: micro-batches per batch, M.
        batches: number of consecutive batches.
        steps_per_batch: optimizer steps per batch; by default M with an AL schedule, and 1 inside groups.
        groups: number of stages of each group, for a schedule inside groups; by default one group of all stages.
        queue_depth: maximum number of messages that an AL stage has in flight.
        receive_slots: messages that an AL stage buffers of its predecessor: one in use, the others received ahead.
        latency: latency of a message in seconds, independent of its size; one for all, or one for each of the
            ``P - 1`` links.
        transfer: seconds for which a message occupies the link, which is full duplex; one for all, or ``P - 1``. An AL
            stage and a stage of a group compute meanwhile; back-propagation sends with DeepSpeed's calls, which block
            for as long.

    Raises:
        RuntimeError: the schedules deadlock.
    """
    run = _run(
        method,
        costs,
        micro_batches=micro_batches,
        batches=batches,
        steps_per_batch=steps_per_batch,
        groups=groups,
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
    groups: Sequence[int] = (),
    queue_depth: int = 2,
    receive_slots: int = 2,
    latency: ArrayLike = 0.0,
    transfer: ArrayLike = 0.0,
    factors: Times | None = None,
) -> Times:
    """Returns when each stage completed the computations of each batch, ``(P, batches, R)`` seconds after the start.

    Args:
        method, costs, micro_batches, batches, steps_per_batch, groups, queue_depth, receive_slots, latency, transfer:
            as for :func:`simulate`.
        factors: ``(P, N, R)``, multiply the time of forward and backward of a micro-batch on a stage; R is 1 without
            factors.

    Raises:
        RuntimeError: the schedules deadlock.
    """
    return _run(
        method,
        costs,
        micro_batches=micro_batches,
        batches=batches,
        steps_per_batch=steps_per_batch,
        groups=groups,
        queue_depth=queue_depth,
        receive_slots=receive_slots,
        latency=latency,
        transfer=transfer,
        factors=factors,
    ).marks


def instruction_names(
    method: str,
    micro_batches: int,
    stages: int,
    stage: int,
    steps_per_batch: int | None = None,
    groups: Sequence[int] = (),
) -> list[str]:
    """Returns the class names of a stage's instructions for one batch."""
    schedule: PipeSchedule
    if (inside := ZERO_BUBBLE.get(method, method)) in GROUP_SCHEDULES:
        place = places(groups or (stages,))[stage]
        grouped = GROUP_SCHEDULES[inside](micro_batches, place, steps_per_batch or 1)
        return [type(instruction).__name__ for step in grouped.steps() for instruction in step]
    if method in AL_SCHEDULES:
        schedule = AL_SCHEDULES[method](micro_batches, stages, stage, steps_per_batch or micro_batches)
    else:
        schedule = BACKPROP_SCHEDULES[method](micro_batches, stages, stage)
    names = [type(instruction).__name__ for step in schedule for instruction in step]
    # DeepSpeed's last stage broadcasts the loss of every batch.
    return names if method in AL_SCHEDULES else [*names, "LossBroadcast"]


def places(groups: Sequence[int]) -> list[Place]:
    """Returns the place of every stage, from the number of stages of each group."""
    stages = sum(groups)
    positions = [(position, size) for size in groups for position in range(size)]
    return [Place(stage, stages, position, size) for stage, (position, size) in enumerate(positions)]


@lru_cache(maxsize=16)
def _program(
    method: str,
    micro_batches: int,
    stages: int,
    batches: int,
    steps_per_batch: int | None,
    groups: tuple[int, ...],
) -> NDArray[Any]:
    """Returns the operation codes of every stage, ``(P, length)``; EndOfBatch follows a batch's last computation."""
    rows, known = [], {}
    for stage in range(stages):
        names = instruction_names(method, micro_batches, stages, stage, steps_per_batch, groups)
        key = tuple(names)
        if key not in known:
            codes = np.array([CODE[name] for name in names if name in CODE], dtype=np.int8)
            last = int(np.flatnonzero(np.isin(codes, COMPUTING)).max(initial=-1)) + 1
            known[key] = np.tile(np.insert(codes, last, CODE["EndOfBatch"]), batches)
        rows.append(known[key])
    program = np.full((stages, max(map(len, rows)) + 1), CODE["EndOfRun"], dtype=np.int8)
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
    groups: Sequence[int],
    queue_depth: int,
    receive_slots: int,
    latency: ArrayLike,
    transfer: ArrayLike,
    factors: Times | None = None,
    events: list[Event] | None = None,
) -> Clocks:
    """Simulates until all stages have finished."""
    stages = len(costs)
    links = np.full(stages, np.nan)  # link of each stage to the next one; the last has none
    grouped = ZERO_BUBBLE.get(method, method) in GROUP_SCHEDULES
    # Channels of a group hold the messages of two micro-batches per stage (ds_al/transport/neighbours.py).
    graphs = np.array([2 * place.size if grouped else 0 for place in places(tuple(groups) or (stages,))])
    run = Clocks(
        _program(method, micro_batches, stages, batches, steps_per_batch, tuple(groups)),
        np.array([cost.parts for cost in costs], dtype=float),
        batches=batches,
        blocking=not (grouped or method in AL_SCHEDULES),
        queue_depth=np.maximum(queue_depth, graphs),
        receive_slots=np.maximum(receive_slots, graphs),
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
