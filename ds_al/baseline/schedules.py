"""Backprop schedules that DeepSpeed lacks, for the twin: GPipe, naive, zero bubble; diagrams as in ds_al.schedule."""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    LoadMicroBatch,
    OptimizerStep,
    PipeSchedule,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    ReduceTiedGrads,
    SendActivation,
    SendGrad,
    TrainSchedule,
)

from ds_al.group_schedule import GroupSchedule, Place, ZeroBubbleH1, ZeroBubbleH2
from ds_al.schedule import Step


class BackpropSchedule(PipeSchedule):
    """Base class of the backprop schedules that DeepSpeed lacks."""

    def forward(self, buffer_id: int) -> Step:
        """Returns the forward of one micro-batch; the first stage loads inputs, the last one labels."""
        load = [LoadMicroBatch(buffer_id=buffer_id)] if self.is_first_stage or self.is_last_stage else []
        receive = [] if self.is_first_stage else [RecvActivation(buffer_id=buffer_id)]
        send = [] if self.is_last_stage else [SendActivation(buffer_id=buffer_id)]
        return [*load, *receive, ForwardPass(buffer_id=buffer_id), *send]

    def backward(self, buffer_id: int) -> Step:
        """Returns the backward of one micro-batch, with gradients from the next stage and to the previous one."""
        receive = [] if self.is_last_stage else [RecvGrad(buffer_id=buffer_id)]
        send = [] if self.is_first_stage else [SendGrad(buffer_id=buffer_id)]
        return [*receive, BackwardPass(buffer_id=buffer_id), *send]

    def end(self) -> Step:
        """Returns the optimizer step of the whole batch."""
        return [ReduceTiedGrads(), ReduceGrads(), OptimizerStep()]


class GPipeSchedule(BackpropSchedule):
    """All forwards, then all backwards; the activations of all micro-batches are held.

    ::

        stage 0   F0 F1       B0 B1 S
        stage 1      F0 F1 B0 B1    S
    """

    def num_pipe_buffers(self) -> int:
        """Returns one buffer per micro-batch."""
        return self.micro_batches

    def steps(self) -> Iterator[Step]:
        """Yields M forwards, M backwards, one step."""
        for m in range(self.micro_batches):
            yield self.forward(m)
        for m in range(self.micro_batches):
            yield self.backward(m)
        yield self.end()


class NaiveSchedule(BackpropSchedule):
    """One micro-batch at a time through all stages and back; the thesis's baseline.

    ::

        stage 0   F0       B0 F1       B1 S
        stage 1      F0 B0       F1 B1    S
    """

    def num_pipe_buffers(self) -> int:
        """Returns one buffer."""
        return 1

    def steps(self) -> Iterator[Step]:
        """Yields forward and backward of each micro-batch, then one step."""
        for _ in range(self.micro_batches):
            yield [*self.forward(0), *self.backward(0)]
        yield self.end()


class WholePipeline(GroupSchedule):
    """A schedule inside a group whose one group is the pipeline: the last stage loads labels, and weights that are tied
    or replicated average their gradients before a step."""

    def __init__(self, micro_batches: int, stages: int, stage_id: int) -> None:
        super().__init__(micro_batches, Place(stage_id, stages, stage_id, stages))

    def _forward(self, m: int) -> Step:
        forward = super()._forward(m)
        if self.is_first_stage or not self.is_last_stage:
            return forward
        return [LoadMicroBatch(buffer_id=m % self.num_pipe_buffers()), *forward]

    def _rest(self) -> Step:
        return [*super()._rest(), ReduceTiedGrads(), ReduceGrads()]


class BackpropZeroBubbleH1(WholePipeline, ZeroBubbleH1):
    """``bp_zb_h1``: :class:`~ds_al.group_schedule.ZeroBubbleH1` over all stages."""


class BackpropZeroBubbleH2(WholePipeline, ZeroBubbleH2):
    """``bp_zb_h2``: :class:`~ds_al.group_schedule.ZeroBubbleH2` over all stages."""


BACKPROP_SCHEDULES: dict[str, type[PipeSchedule]] = {
    "bp_1f1b": TrainSchedule,
    "bp_gpipe": GPipeSchedule,
    "bp_naive": NaiveSchedule,
    "bp_zb_h1": BackpropZeroBubbleH1,
    "bp_zb_h2": BackpropZeroBubbleH2,
}
