"""Clocks of all stages: each handler of :class:`Clocks` says when an instruction ends, and what it waits for.

Vectorized by numpy over the stages whose next instruction is the same, and over repetitions, whose order of
instructions is the same. Shapes as in :mod:`ds_al.planner.simulator`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ds_al.trace import Event

Times = NDArray[np.float64]
Places = NDArray[np.int64]

OPERATIONS = (
    *("ForwardPass", "BackwardPass", "BackwardInput", "BackwardWeight", "OptimizerStep"),
    *("SendActivation", "RecvActivation", "SendGrad", "RecvGrad"),
    *("Barrier", "LossBroadcast", "EndOfBatch", "EndOfRun"),
)
"""Instructions that take time, or mark an end; all others take none."""
CODE = {name: number for number, name in enumerate(OPERATIONS)}
COMPUTING = [CODE[name] for name in OPERATIONS[:5]]
_ENDS = [CODE[name] for name in ("BackwardPass", "BackwardWeight")]  # the last computation of a micro-batch


class Clocks:
    """A clock per stage, counts of executed instructions and, where other stages depend on them, completion times.

    Args:
        program: operation codes of every stage, ``(P, length)``, each row ended by ``EndOfRun``.
        costs: seconds of the computing operations, ``(P, 5)``.
        batches: number of batches.
        blocking: whether sends block, as with DeepSpeed's back-propagation.
        queue_depth, receive_slots: of each stage, ``(P,)``; without meaning where sends block.
        latency, transfer: seconds per link, ``(P,)``; the last stage has none.
        factors: of the costs, ``(P, N, R)``, or ``(1, 1, 1)``.
        total: micro-batches of all batches together, N.
        events: list to append executed operations to, for a simulation with ``R = 1``.
    """

    def __init__(
        self,
        program: NDArray[Any],
        costs: Times,
        *,
        batches: int,
        blocking: bool,
        queue_depth: Places,
        receive_slots: Places,
        latency: Times,
        transfer: Times,
        factors: Times,
        total: int,
        events: list[Event] | None,
    ) -> None:
        stages, repeats = len(program), factors.shape[2]
        self.program, self.costs, self.factors, self.events = program, costs, factors, events
        self.latency, self.transfer = latency[:, None], transfer[:, None]
        self.blocking, self.queue_depth, self.receive_slots = blocking, queue_depth, receive_slots
        self.stages = np.arange(stages)
        self.place = np.zeros(stages, dtype=np.int64)
        self.clock = np.zeros((stages, repeats))
        self.waited = np.zeros((stages, repeats))  # in the latest operation
        self.counts = np.zeros((len(OPERATIONS), stages), dtype=np.int64)
        self.marks = np.zeros((stages, batches, repeats))
        self.broadcast = np.zeros((batches, repeats))  # start of the loss broadcast on the last stage
        shape = (stages, total, repeats)
        self.activation_sent = np.zeros(shape)  # end of the transfer, before the latency
        returns = bool((program == CODE["SendGrad"]).any())
        self.gradient_sent = np.zeros(shape if returns else (1, 1, 1))
        self.backward_end = np.zeros((1, 1, 1) if blocking else shape)

    def done(self) -> bool:
        """Whether all stages have finished."""
        return bool((self.program[self.stages, self.place] == CODE["EndOfRun"]).all())

    def waiting(self) -> str:
        """Describes the operation in which each unfinished stage waits."""
        names = [OPERATIONS[code] for code in self.program[self.stages, self.place]]
        return ", ".join(f"stage {stage} in {name}" for stage, name in enumerate(names) if name != "EndOfRun")

    def advance(self) -> bool:
        """Executes one operation on every stage that is not blocked. Returns whether there was any."""
        operations = self.program[self.stages, self.place]
        moved = False
        for code in np.unique(operations):
            name = OPERATIONS[code]
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
        executed: Places = getattr(self, f"_{name}")(at, self.counts[CODE[name], at])
        return executed

    def _recorded(self, events: list[Event], name: str, at: Places) -> Places:
        before = self.clock.copy()
        self.waited[:] = 0.0
        at = self._execute(name, at)
        if name != "EndOfBatch":
            for stage in at.tolist():
                number = int(self.counts[CODE[name], stage])
                start, end, wait = (float(times[stage, 0]) for times in (before, self.clock, self.waited))
                events.append(Event(stage, name, number, start, end, wait=wait))
        return at

    # Each handler gets the stages whose next operation this is, and how often they have executed it before, and
    # returns those that were not blocked.

    def _compute(self, at: Places, number: Places, column: int) -> None:
        factors = self.factors[at, number] if self.factors.size > 1 else self.factors[0]
        self.clock[at] += self.costs[at, column, None] * factors

    def _ForwardPass(self, at: Places, number: Places) -> Places:
        self._compute(at, number, 0)
        return at

    def _BackwardPass(self, at: Places, number: Places) -> Places:
        self._compute(at, number, 1)
        return self._ended(at, number)

    def _BackwardInput(self, at: Places, number: Places) -> Places:
        self._compute(at, number, 2)
        return at

    def _BackwardWeight(self, at: Places, number: Places) -> Places:
        self._compute(at, number, 3)
        return self._ended(at, number)

    def _ended(self, at: Places, number: Places) -> Places:
        if not self.blocking:
            self.backward_end[at, number] = self.clock[at]
        return at

    def _OptimizerStep(self, at: Places, number: Places) -> Places:
        self.clock[at] += self.costs[at, 4, None]
        return at

    def _SendActivation(self, at: Places, number: Places) -> Places:
        if self.blocking:
            self.clock[at] += self.transfer[at]
            self.activation_sent[at, number] = self.clock[at]
            return at
        received = number - self.queue_depth[at]  # the message that must be received before this one can be sent
        freed = received - self.receive_slots[at + 1]  # the micro-batch that the next stage must have completed for it
        able = freed < self.counts[_ENDS][:, at + 1].sum(axis=0)
        at, number, received, freed = at[able], number[able], received[able], freed[able]
        arrival = self.activation_sent[at, np.maximum(received, 0)] + self.latency[at]
        arrival = np.where(received[:, None] >= 0, arrival, 0.0)
        free = np.where(freed[:, None] >= 0, self.backward_end[at + 1, np.maximum(freed, 0)], 0.0)
        self._wait(at, np.maximum(arrival, free))
        before = np.where(number[:, None] > 0, self.activation_sent[at, np.maximum(number - 1, 0)], 0.0)
        self.activation_sent[at, number] = np.maximum(self.clock[at], before) + self.transfer[at]
        return at

    def _SendGrad(self, at: Places, number: Places) -> Places:
        if self.blocking:
            self.clock[at] += self.transfer[at - 1]
            self.gradient_sent[at, number] = self.clock[at]
            return at
        before = np.where(number[:, None] > 0, self.gradient_sent[at, np.maximum(number - 1, 0)], 0.0)
        self.gradient_sent[at, number] = np.maximum(self.clock[at], before) + self.transfer[at - 1]
        return at

    def _RecvActivation(self, at: Places, number: Places) -> Places:
        able = number < self.counts[CODE["SendActivation"], at - 1]
        at, number = at[able], number[able]
        self._wait(at, self.activation_sent[at - 1, number] + self.latency[at - 1])
        return at

    def _RecvGrad(self, at: Places, number: Places) -> Places:
        able = number < self.counts[CODE["SendGrad"], at + 1]
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
        able = number < self.counts[CODE["LossBroadcast"], last]
        self._wait(at[able], self.broadcast[number[able]])
        return at[able]

    def _EndOfBatch(self, at: Places, number: Places) -> Places:
        self.marks[at, number] = self.clock[at]
        return at

    def _wait(self, at: Places, ready: Times) -> None:
        if self.events is not None:
            self.waited[at] = np.maximum(ready - self.clock[at], 0.0)
        self.clock[at] = np.maximum(self.clock[at], ready)
