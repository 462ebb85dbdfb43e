"""The schedules of associated learning: generators of DeepSpeed's pipeline instructions, each with its diagram.

Diagrams: stages downwards, time to the right, two micro-batches. ``F`` forward, ``B`` local backward,
``S`` optimizer step, ``|`` barrier. A stage sends right after ``F``.

The four AL schedules end on identical weights: on every stage, micro-batch m's forward runs on weights
that have stepped on all micro-batches before it, and on none after it.
"""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    LoadMicroBatch,
    OptimizerStep,
    PipeInstruction,
    PipeSchedule,
    RecvActivation,
    ReduceGrads,
    SendActivation,
)

Step = list[PipeInstruction]


class Barrier(PipeInstruction):
    """All stages of the pipeline wait for each other. Never part of ``streaming``."""


class RefreshDecoders(PipeInstruction):
    """The stage takes over its predecessor's copies of earlier decoders and adds its own, where that is due."""


class SendDecoders(PipeInstruction):
    """The stage sends these copies on, where that is due."""


class Repeated(PipeSchedule):
    """A schedule whose instructions are made once, for every batch that it runs again.

    Args:
        reduce_gradients: put a ``ReduceGrads`` before each ``OptimizerStep``, for data parallel copies.
        refresh_decoders: put ``RefreshDecoders`` and, but for the last stage, ``SendDecoders`` before each
            ``ForwardPass``, for objectives that decode while they train.
    """

    def __init__(
        self, schedule: PipeSchedule, *, reduce_gradients: bool = False, refresh_decoders: bool = False
    ) -> None:
        super().__init__(schedule.micro_batches, schedule.stages, schedule.stage_id)
        before: dict[type[PipeInstruction], Step] = {}
        if reduce_gradients:
            before[OptimizerStep] = [ReduceGrads()]
        if refresh_decoders:
            before[ForwardPass] = [RefreshDecoders(), *([] if self.is_last_stage else [SendDecoders()])]
        self._buffers = schedule.num_pipe_buffers()
        self._steps = [
            [each for one in step for each in (*before.get(type(one), ()), one)] for step in schedule.steps()
        ]

    def num_pipe_buffers(self) -> int:
        """Those of the schedule."""
        return self._buffers

    def steps(self) -> Iterator[Step]:
        """The same instructions, from the first."""
        return iter(self._steps)


class ALSchedule(PipeSchedule):
    """What the AL schedules share: messages go forward only, and one autograd graph is alive at a time.

    Args:
        micro_batches: micro-batches per batch, M.
        stages: stages of the pipeline, P.
        stage_id: this stage, from 0.
        steps_per_batch: optimizer steps per batch, which divides M; by default M.
    """

    def __init__(self, micro_batches: int, stages: int, stage_id: int, steps_per_batch: int | None = None) -> None:
        super().__init__(micro_batches, stages, stage_id)
        self.micro_batches_per_step = micro_batches // (steps_per_batch or micro_batches)

    def num_pipe_buffers(self) -> int:
        """One: a micro-batch's graph is gone before the next forward, whatever P and M are."""
        return 1

    def forward_and_send(self) -> Step:
        """Takes a micro-batch in, and sends its activation on at once."""
        source = LoadMicroBatch(buffer_id=0) if self.is_first_stage else RecvActivation(buffer_id=0)
        send = [] if self.is_last_stage else [SendActivation(buffer_id=0)]
        return [source, ForwardPass(buffer_id=0), *send]

    def local_step(self, micro_batch: int) -> Step:
        """The optimizer step, where this micro-batch ends a group of accumulated gradients."""
        return [OptimizerStep()] if (micro_batch + 1) % self.micro_batches_per_step == 0 else []


class StreamingSchedule(ALSchedule):
    """No stage waits for a later one, within a batch or between batches.

    ::

        stage 0   F0 B0 S0 F1 B1 S1 F0 B0 S0 F1 B1 S1          <- the next batch follows at once
        stage 1      F0 B0 S0 F1 B1 S1 F0 B0 S0 F1 B1 S1
        stage 2         F0 B0 S0 F1 B1 S1 F0 B0 S0 F1 B1 S1
    """

    def steps(self) -> Iterator[Step]:
        """Receive, forward, send, local backward, step; M times."""
        for m in range(self.micro_batches):
            yield [*self.forward_and_send(), BackwardPass(buffer_id=0), *self.local_step(m)]


class ForwardFirstSchedule(StreamingSchedule):
    """As ``streaming``, and the pipeline drains after every batch. The thesis's AL-P.

    ::

        stage 0   F0 B0 S0 F1 B1 S1       |F0 B0 S0 F1 B1 S1       |
        stage 1      F0 B0 S0 F1 B1 S1    |   F0 B0 S0 F1 B1 S1    |
        stage 2         F0 B0 S0 F1 B1 S1 |      F0 B0 S0 F1 B1 S1 |
    """

    def steps(self) -> Iterator[Step]:
        """The streaming steps, then one barrier."""
        yield from super().steps()
        yield [Barrier()]


class ParallelBackwardSchedule(ALSchedule):
    """All stages run backward and step at once, when the last forward is done. The thesis's AL-M.

    ::

        stage 0   F0       |B0 S0 F1       |B1 S1
        stage 1      F0    |B0 S0    F1    |B1 S1
        stage 2         F0 |B0 S0       F1 |B1 S1
    """

    def steps(self) -> Iterator[Step]:
        """Forward through all stages, barrier, backward and step."""
        for m in range(self.micro_batches):
            yield [*self.forward_and_send(), Barrier()]
            yield [BackwardPass(buffer_id=0), *self.local_step(m)]


class SequentialSchedule(ALSchedule):
    """Nothing overlaps: all forwards, then each backward, then each step. The thesis's AL.

    ::

        stage 0   F0       |B0|  |  |S0|  |  |F1       |B1| ...
        stage 1      F0    |  |B0|  |  |S0|  |   F1    |  |B1 ...
        stage 2         F0 |  |  |B0|  |  |S0|      F1 |  |  |B1
    """

    def steps(self) -> Iterator[Step]:
        """Each stage takes its turn in the backward, then in the step."""
        for m in range(self.micro_batches):
            yield self.forward_and_send()
            yield from self._in_turn([BackwardPass(buffer_id=0)])
            if self.local_step(m):
                yield from self._in_turn(self.local_step(m))
            yield [Barrier()]

    def _in_turn(self, work: Step) -> Iterator[Step]:
        for turn in range(self.stages):
            yield [Barrier(), *(work if turn == self.stage_id else [])]


AL_SCHEDULES: dict[str, type[ALSchedule]] = {
    "streaming": StreamingSchedule,
    "forward_first": ForwardFirstSchedule,
    "parallel_backward": ParallelBackwardSchedule,
    "sequential": SequentialSchedule,
}
