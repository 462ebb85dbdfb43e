"""Every schedule, as a generator of DeepSpeed's pipeline instructions, beneath its diagram.

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
    RecvGrad,
    ReduceGrads,
    ReduceTiedGrads,
    SendActivation,
    SendGrad,
    TrainSchedule,
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


class EvaluationSchedule(PipeSchedule):
    """Micro-batches go forward once; each stage scores its own exits. Nothing travels back.

    ::

        stage 0   F0 F1
        stage 1      F0 F1
    """

    def num_pipe_buffers(self) -> int:
        """One."""
        return 1

    def steps(self) -> Iterator[Step]:
        """Take in, forward, send; M times."""
        for _ in range(self.micro_batches):
            source = LoadMicroBatch(buffer_id=0) if self.is_first_stage else RecvActivation(buffer_id=0)
            send = [] if self.is_last_stage else [SendActivation(buffer_id=0)]
            yield [source, ForwardPass(buffer_id=0), *send]


class BackpropSchedule(PipeSchedule):
    """What the back-propagation schedules beside DeepSpeed's own share; for the backprop twin."""

    def forward(self, buffer_id: int) -> Step:
        """Forward of one micro-batch; inputs are read on the first stage, labels on the last."""
        load = [LoadMicroBatch(buffer_id=buffer_id)] if self.is_first_stage or self.is_last_stage else []
        receive = [] if self.is_first_stage else [RecvActivation(buffer_id=buffer_id)]
        send = [] if self.is_last_stage else [SendActivation(buffer_id=buffer_id)]
        return [*load, *receive, ForwardPass(buffer_id=buffer_id), *send]

    def backward(self, buffer_id: int) -> Step:
        """Backward of one micro-batch; its gradient comes from the next stage and goes to the previous."""
        receive = [] if self.is_last_stage else [RecvGrad(buffer_id=buffer_id)]
        send = [] if self.is_first_stage else [SendGrad(buffer_id=buffer_id)]
        return [*receive, BackwardPass(buffer_id=buffer_id), *send]

    def end(self) -> Step:
        """One optimizer step for the whole batch."""
        return [ReduceTiedGrads(), ReduceGrads(), OptimizerStep()]


class GPipeSchedule(BackpropSchedule):
    """All forwards, then all backwards; every micro-batch's activations are held until then.

    ::

        stage 0   F0 F1       B0 B1 S
        stage 1      F0 F1 B0 B1    S
    """

    def num_pipe_buffers(self) -> int:
        """One per micro-batch."""
        return self.micro_batches

    def steps(self) -> Iterator[Step]:
        """M forwards, M backwards, one step."""
        for m in range(self.micro_batches):
            yield self.forward(m)
        for m in range(self.micro_batches):
            yield self.backward(m)
        yield self.end()


class NaiveSchedule(BackpropSchedule):
    """One micro-batch at a time through all stages and back. The thesis's baseline.

    ::

        stage 0   F0       B0 F1       B1 S
        stage 1      F0 B0       F1 B1    S
    """

    def num_pipe_buffers(self) -> int:
        """One."""
        return 1

    def steps(self) -> Iterator[Step]:
        """Forward and backward of each micro-batch, then one step."""
        for _ in range(self.micro_batches):
            yield [*self.forward(0), *self.backward(0)]
        yield self.end()


AL_SCHEDULES: dict[str, type[ALSchedule]] = {
    "streaming": StreamingSchedule,
    "forward_first": ForwardFirstSchedule,
    "parallel_backward": ParallelBackwardSchedule,
    "sequential": SequentialSchedule,
}
BACKPROP_SCHEDULES: dict[str, type[PipeSchedule]] = {
    "bp_1f1b": TrainSchedule,
    "bp_gpipe": GPipeSchedule,
    "bp_naive": NaiveSchedule,
}
