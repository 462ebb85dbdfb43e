"""What is recorded of an instruction that a stage has executed."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.pipe.schedule import (
    LoadMicroBatch,
    OptimizerStep,
    PipeInstruction,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    SendActivation,
    SendGrad,
)

from ds_al.schedule import Barrier, RefreshDecoders, SendDecoders
from ds_al.trace import Observation, StageCounters
from ds_al.training.parts import StageParts
from ds_al.transport.neighbours import Links


def observed(
    instruction: PipeInstruction, seconds: float, *, parts: StageParts, links: Links, counters: StageCounters
) -> Observation | None:
    """Returns what to record of an instruction that has just been executed; ``None`` where it had nothing to do."""
    channel: Any = None
    match instruction:
        case Barrier() | ReduceGrads():
            return Observation(wait=seconds)
        case OptimizerStep() if parts.together is not None:
            return Observation(wait=parts.together.take_waited())
        case LoadMicroBatch():
            return Observation(wait=counters.waited_for_data)
        case RecvActivation():
            channel = links.training.receiver
        case SendActivation():
            channel = links.training.sender
        case RecvGrad():
            channel = links.gradients.receiver
        case SendGrad():
            channel = links.gradients.sender
        case RefreshDecoders() | SendDecoders():
            assert parts.decoder_copies is not None
            if not parts.decoder_copies.due(parts.stage.next_micro_batch):
                return None
            sends = isinstance(instruction, SendDecoders)
            channel = parts.decoder_copies.sender if sends else parts.decoder_copies.receiver
    return Observation() if channel is None else Observation(*channel.latest)
