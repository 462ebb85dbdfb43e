"""Trace event of one executed instruction, and the categories and labels of instructions."""

from __future__ import annotations

from dataclasses import dataclass

COMPUTING = ("ForwardPass", "BackwardPass", "BackwardInput", "BackwardWeight", "OptimizerStep")
"""Instructions in which a stage computes. In all others it transfers data, or waits."""

LABELS: dict[str, str] = {
    "ForwardPass": "forward",
    "BackwardPass": "backward",
    "BackwardInput": "backward of input",
    "BackwardWeight": "backward of weights",
    "OptimizerStep": "update",
    "RecvActivation": "receive",
    "RecvGrad": "receive gradient",
    "SendActivation": "send",
    "SendGrad": "send gradient",
    "CommitP2P": "exchange",
    "LoadMicroBatch": "load data",
    "Barrier": "barrier",
    "RefreshDecoders": "refresh decoders",
    "SendDecoders": "send decoders",
    "ReduceGrads": "reduce gradients",
    "ReduceTiedGrads": "reduce tied gradients",
    "LossBroadcast": "broadcast loss",
    "Evaluation": "evaluate",
    "Repartition": "repartition",
}
"""Display names; forward, backward and update as in the published profiler study."""

MESSAGES: dict[str, tuple[str, int]] = {
    "SendActivation": ("RecvActivation", 1),
    "SendGrad": ("RecvGrad", -1),
    "SendDecoders": ("RefreshDecoders", 1),
}
"""Maps a sending instruction to the receiving one, and to the offset of the stage that executes it."""


def place_name(place: tuple[int, int], *, replicas: int) -> str:
    """Returns the display name of a (replica, stage); the replica is omitted if there is one only."""
    replica, stage = place
    return f"replica {replica}, stage {stage}" if replicas > 1 else f"stage {stage}"


@dataclass(frozen=True)
class Event:
    """One executed instruction of a stage, or one layer's part of it.

    Times are seconds of a monotonic clock: of the host, or of the device if a GPU computes. Each rank has its own
    clock until :func:`ds_al.trace.files.merge` aligns them.
    """

    stage: int
    instruction: str
    """Class name of the instruction."""
    micro_batch: int
    """Index of the micro-batch over all recorded batches: number of earlier instructions of this class on the stage."""
    start: float
    end: float
    layer: int | None = None
    """Index of the AL layer, if the event is one layer's part of an instruction."""
    wait: float = 0.0
    """Seconds from the start of the event in which the stage waited."""
    nbytes: int | None = None
    """Bytes sent or received."""
    memory: int | None = None
    """Peak bytes held by autograd for backward during the event."""
    queue: int | None = None
    """For a send or a receive: number of messages in flight after it. Set when ranks are merged."""
    copy: int = 0
    """Index of the data parallel replica of the pipeline; ``copy`` is its column in ``trace.csv``."""

    @property
    def place(self) -> tuple[int, int]:
        """Replica and stage, which identify the rank."""
        return self.copy, self.stage

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.end - self.start
