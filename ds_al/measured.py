"""What an AL stage knows of its own work: losses, waits, bytes, and how all stages are doing right now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from deepspeed.runtime.pipe.schedule import LoadMicroBatch, PipeInstruction, RecvActivation, SendActivation
from torch import Tensor

from ds_al.schedule import Barrier
from ds_al.trace import Observation, RecordedSchedule, Report, StageStats, Vitals

if TYPE_CHECKING:
    from ds_al.layer import ALLayer
    from ds_al.replicas import Replicas
    from ds_al.transport import Receiver, Sender


@dataclass(slots=True)
class Counters:
    """What a stage counts while it trains. Apart from the engine for the reason of :class:`Progress`."""

    wall: float = 0.0
    wait_data: float = 0.0
    waited_for_data: float = 0.0
    """Seconds of the latest micro-batch."""
    samples: int = 0


class MeasuredStage(RecordedSchedule):
    """Mix-in for :class:`~ds_al.engine.ALPipelineEngine`: its counters, and what is read from them."""

    sender: Sender | None
    receiver: Receiver | None
    layers: list[tuple[int, ALLayer]]
    stage_id: int
    device: torch.device
    if TYPE_CHECKING:

        @property
        def replicas(self) -> Replicas: ...

    _report: Report
    _loss_history: list[Tensor]
    _counters: Counters

    def reset_stats(self) -> None:
        """Starts :meth:`stats` anew."""
        self._counters = Counters()
        for channel in (self.sender, self.receiver):
            if channel is not None:
                channel.waited = 0.0
        self._bytes_before = self.sender.nbytes if self.sender else 0
        self._messages_before = self.sender.messages if self.sender else 0

    def stats(self) -> StageStats:
        """This stage's times and bytes since the last :meth:`reset_stats`."""
        return StageStats(
            stage=self.stage_id,
            wall=self._counters.wall,
            wait_input=self.receiver.waited if self.receiver else 0.0,
            wait_queue=self.sender.waited if self.sender else 0.0,
            wait_data=self._counters.wait_data,
            bytes_sent=self.sender.nbytes - self._bytes_before if self.sender else 0,
            messages_sent=self.sender.messages - self._messages_before if self.sender else 0,
            samples=self._counters.samples,
        )

    def vitals(self) -> dict[int, Vitals]:
        """Latest known vitals by stage, of this stage and those before it; waits for the device, not for a stage."""
        return dict(enumerate(self._report.vitals()[: self.stage_id + 1]))

    def _totals(self) -> dict[str, float]:
        totals = {**self.instruction_seconds, "samples": self._counters.samples}
        if self.sender is not None and self.device.type == "cpu":  # on a GPU the host does not wait for a slot
            totals |= {"messages": self.sender.messages, "found_full": self.sender.found_full}
        return totals

    def gather_losses(self) -> Tensor:
        """Local losses of all layers since the last call, ``(batches, N, 2)``, means over data parallel copies;
        drains the pipeline.

        ``[..., 0]`` is the associated, ``[..., 1]`` the autoencoder loss, each the mean over a batch. Every
        rank must call it.
        """
        history = torch.stack(self._loss_history).cpu() if self._loss_history else torch.zeros(0, len(self.layers), 2)
        self._loss_history = []
        return torch.cat(self.gather(self.replicas.mean(history.to(self.device)).cpu()), dim=1)

    def _observe(self, instruction: PipeInstruction, seconds: float) -> Observation:
        if isinstance(instruction, Barrier):
            return Observation(wait=seconds)
        if isinstance(instruction, LoadMicroBatch):
            return Observation(wait=self._counters.waited_for_data)
        channel = {RecvActivation: self.receiver, SendActivation: self.sender}.get(type(instruction))
        return Observation(*channel.latest) if channel is not None else Observation()
