"""One executed instruction, and how instructions fall into computing, waiting and the rest."""

from __future__ import annotations

from dataclasses import dataclass

COMPUTING = ("ForwardPass", "BackwardPass", "OptimizerStep")
"""Instructions in which a stage computes. In all others it moves data, or waits."""

LABELS: dict[str, str] = {
    "ForwardPass": "forward",
    "BackwardPass": "backward",
    "OptimizerStep": "update",
    "RecvActivation": "receive",
    "RecvGrad": "receive gradient",
    "SendActivation": "send",
    "SendGrad": "send gradient",
    "LoadMicroBatch": "load data",
    "Barrier": "barrier",
    "RefreshDecoders": "refresh decoders",
    "SendDecoders": "send decoders",
    "ReduceGrads": "reduce gradients",
    "ReduceTiedGrads": "reduce tied gradients",
    "LossBroadcast": "broadcast loss",
    "Evaluation": "evaluate",
}
"""What a reader is shown; forward, backward and update as the published profiler study names them."""

MESSAGES: dict[str, tuple[str, int]] = {
    "SendActivation": ("RecvActivation", 1),
    "SendGrad": ("RecvGrad", -1),
    "SendDecoders": ("RefreshDecoders", 1),
}
"""Sending instruction: the receiving one, and how many stages further on it is executed."""


def place_name(place: tuple[int, int], *, copies: int) -> str:
    """What a reader is shown for a copy and stage; the copy where there are several."""
    copy, stage = place
    return f"copy {copy}, stage {stage}" if copies > 1 else f"stage {stage}"


@dataclass(frozen=True)
class Event:
    """One executed instruction of a stage, or the part of it that one layer took.

    Times are seconds of a monotonic clock: the host's, or the device's where a GPU computes. They are of one
    rank until :func:`ds_al.trace.files.merge` has brought all ranks to one clock.
    """

    stage: int
    instruction: str
    """Name of the instruction's class."""
    micro_batch: int
    """How many instructions of this kind the stage had executed before, since recording began: the micro-batch,
    counted over batches."""
    start: float
    end: float
    layer: int | None = None
    """Index of the AL layer, where this is one layer's part of an instruction."""
    wait: float = 0.0
    """Seconds of it, from its start, in which the stage waited."""
    nbytes: int | None = None
    """Bytes that the instruction moved between stages."""
    memory: int | None = None
    """Most bytes that autograd held for backward during it."""
    queue: int | None = None
    """Of a send or a receive: messages after it that are sent and not yet received. Known once stages are merged."""
    copy: int = 0
    """Which data parallel copy of the pipeline the stage is part of."""

    @property
    def place(self) -> tuple[int, int]:
        """Copy and stage: the rank."""
        return self.copy, self.stage

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start
