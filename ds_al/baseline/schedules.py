"""The back-propagation schedules that DeepSpeed lacks, for the backprop twin; diagrams as in :mod:`ds_al.schedule`."""

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

from ds_al.schedule import Step


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


BACKPROP_SCHEDULES: dict[str, type[PipeSchedule]] = {
    "bp_1f1b": TrainSchedule,
    "bp_gpipe": GPipeSchedule,
    "bp_naive": NaiveSchedule,
}
