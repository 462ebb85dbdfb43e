"""The simulator for many stages: the same instructions with the same rules, a whole round of stages at a time.

:func:`~ds_al.planner.simulator.simulate` follows one instruction after the other and keeps each as an event.
Here, in every round, each stage that can go on executes one instruction, and numpy does so for all stages, and for all
repetitions of a random run, at once. Which instruction comes after which does not depend on how long they take, so
repetitions with other times pass through the same rounds.

Shapes: ``P`` stages, ``N`` micro-batches of all batches together, ``R`` repetitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ds_al.planner.simulator import RECEIVE_SLOTS, StageCost, instruction_names
from ds_al.schedule import AL_SCHEDULES

Times = NDArray[np.float64]
Places = NDArray[np.int64]

_OPERATIONS = (
    *("ForwardPass", "BackwardPass", "OptimizerStep", "SendActivation", "RecvActivation", "SendGrad", "RecvGrad"),
    *("Barrier", "LossBroadcast", "EndOfBatch", "EndOfRun"),
)  # all others take no time
_CODE = {name: number for number, name in enumerate(_OPERATIONS)}
_COMPUTING = [_CODE[name] for name in ("ForwardPass", "BackwardPass", "OptimizerStep")]


def batch_ends(
    method: str,
    costs: Sequence[StageCost],
    *,
    micro_batches: int,
    batches: int,
    steps_per_batch: int | None = None,
    queue_depth: int = 2,
    latency: ArrayLike = 0.0,
    transfer: ArrayLike = 0.0,
    factors: Times | None = None,
) -> Times:
    """When the computations of each batch were done on all stages, ``(batches, R)`` seconds after the start.

    Arguments and errors: as of :func:`stage_ends`.
    """
    return stage_ends(
        method,
        costs,
        micro_batches=micro_batches,
        batches=batches,
        steps_per_batch=steps_per_batch,
        queue_depth=queue_depth,
        latency=latency,
        transfer=transfer,
        factors=factors,
    ).max(axis=0)


def stage_ends(
    method: str,
    costs: Sequence[StageCost],
    *,
    micro_batches: int,
    batches: int,
    steps_per_batch: int | None = None,
    queue_depth: int = 2,
    latency: ArrayLike = 0.0,
    transfer: ArrayLike = 0.0,
    factors: Times | None = None,
) -> Times:
    """When the computations of each batch were done on each stage, ``(P, batches, R)`` seconds after the start.

    Args:
        method, costs, micro_batches, batches, steps_per_batch, queue_depth: as of
            :func:`~ds_al.planner.simulator.simulate`.
        latency, transfer: as there, or one for each of the ``P - 1`` links.
        factors: ``(P, N, R)``, by which forward and backward of a micro-batch take longer on a stage; without
            them R is 1.

    Raises:
        RuntimeError: the schedules of the stages wait for each other.
    """
    stages = len(costs)
    links = np.zeros(stages) + np.nan  # a stage's link to the next one; the last has none
    run = _Rounds(
        _program(method, micro_batches, stages, batches, steps_per_batch),
        np.array([(cost.forward, cost.backward, cost.step) for cost in costs], dtype=float),
        batches=batches,
        queue_depth=queue_depth if method in AL_SCHEDULES else None,
        latency=_per_link(latency, links),
        transfer=_per_link(transfer, links),
        factors=np.ones((1, 1, 1)) if factors is None else factors,
        total=micro_batches * batches,
    )
    while not run.done():
        if not run.advance():
            raise RuntimeError(f"the stages of {method!r} wait for each other")
    return run.marks


def _per_link(value: ArrayLike, links: Times) -> Times:
    filled = links.copy()
    filled[:-1] = value
    return filled


@lru_cache(maxsize=16)
def _program(method: str, micro_batches: int, stages: int, batches: int, steps_per_batch: int | None) -> NDArray[Any]:
    """Operations of every stage, ``(P, length)`` numbers; a batch's last computation is followed by its end."""
    rows, known = [], {}
    for stage in range(stages):
        names = instruction_names(method, micro_batches, stages, stage, steps_per_batch)
        key = tuple(names)
        if key not in known:
            codes = np.array([_CODE[name] for name in names if name in _CODE], dtype=np.int8)
            last = int(np.flatnonzero(np.isin(codes, _COMPUTING))[-1]) + 1
            known[key] = np.tile(np.insert(codes, last, _CODE["EndOfBatch"]), batches)
        rows.append(known[key])
    program = np.full((stages, max(map(len, rows)) + 1), _CODE["EndOfRun"], dtype=np.int8)
    for stage, row in enumerate(rows):
        program[stage, : len(row)] = row
    return program


class _Rounds:
    """A simulation under way. Of every operation: how often each stage has executed it, and when, where others ask."""

    def __init__(
        self,
        program: NDArray[Any],
        costs: Times,
        *,
        batches: int,
        queue_depth: int | None,
        latency: Times,
        transfer: Times,
        factors: Times,
        total: int,
    ) -> None:
        stages, repeats = len(program), factors.shape[2]
        self.program, self.costs, self.factors = program, costs, factors
        self.latency, self.transfer = latency[:, None], transfer[:, None]
        self.queue_depth = queue_depth
        self.stages = np.arange(stages)
        self.place = np.zeros(stages, dtype=np.int64)
        self.clock = np.zeros((stages, repeats))
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

    def advance(self) -> bool:
        """Executes an operation on every stage that can. Returns whether there was one."""
        operations = self.program[self.stages, self.place]
        moved = False
        for code in np.unique(operations):
            name = _OPERATIONS[code]
            if name != "EndOfRun":
                at = np.flatnonzero(operations == code)
                at = getattr(self, f"_{name}")(at, self.counts[code, at])
                self.counts[code, at] += 1
                self.place[at] += 1
                moved = moved or bool(len(at))
        return moved

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
        freed = taken - RECEIVE_SLOTS  # the micro-batch that the next stage must be through with for that
        able = freed < self.counts[_CODE["BackwardPass"], at + 1]
        at, number, taken, freed = at[able], number[able], taken[able], freed[able]
        arrival = self.activation_sent[at, np.maximum(taken, 0)] + self.latency[at]
        self._wait(at, np.where(taken[:, None] >= 0, arrival, 0.0))
        self._wait(at, np.where(freed[:, None] >= 0, self.backward_end[at + 1, np.maximum(freed, 0)], 0.0))
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
        self.clock[:] = self.clock.max(axis=0)
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
        self.clock[at] = np.maximum(self.clock[at], ready)
