"""What an AL stage knows of its own work: losses, waits, bytes, and how all stages are doing right now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from deepspeed.runtime.pipe.schedule import (
    LoadMicroBatch,
    PipeInstruction,
    RecvActivation,
    ReduceGrads,
    SendActivation,
)
from torch import Tensor

from ds_al.schedule import Barrier, RefreshDecoders, SendDecoders
from ds_al.trace import Observation, RecordedSchedule, Report, StageMetrics, StageStats

if TYPE_CHECKING:
    from ds_al.decoders import DecoderCopies
    from ds_al.layer import ALLayer
    from ds_al.parallel.replicas import Replicas
    from ds_al.stage import LocalStage
    from ds_al.transport.channel import Receiver, Sender


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
    decoder_copies: DecoderCopies | None
    stage: LocalStage
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
        for channel in (*self._senders(), *self._receivers()):
            channel.waited = 0.0
        self._bytes_before = sum(sender.nbytes for sender in self._senders())
        self._messages_before = sum(sender.messages for sender in self._senders())

    def stats(self) -> StageStats:
        """This stage's times and bytes since the last :meth:`reset_stats`."""
        return StageStats(
            stage=self.stage_id,
            wall=self._counters.wall,
            wait_input=sum(receiver.waited for receiver in self._receivers()),
            wait_queue=sum(sender.waited for sender in self._senders()),
            wait_data=self._counters.wait_data,
            bytes_sent=sum(sender.nbytes for sender in self._senders()) - self._bytes_before,
            messages_sent=sum(sender.messages for sender in self._senders()) - self._messages_before,
            samples=self._counters.samples,
        )

    def _senders(self) -> list[Sender]:
        """Of micro-batches, and where the objective asks for them, of copies of decoders."""
        both = self.sender, None if self.decoder_copies is None else self.decoder_copies.sender
        return [sender for sender in both if sender is not None]

    def _receivers(self) -> list[Receiver]:
        both = self.receiver, None if self.decoder_copies is None else self.decoder_copies.receiver
        return [receiver for receiver in both if receiver is not None]

    def stage_metrics(self) -> dict[int, StageMetrics]:
        """Latest known metrics by stage, of this stage and those before it; waits for the device, not for a stage."""
        return dict(enumerate(self._report.stage_metrics()[: self.stage_id + 1]))

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

    def _observe(self, instruction: PipeInstruction, seconds: float) -> Observation | None:
        if isinstance(instruction, (Barrier, ReduceGrads)):
            return Observation(wait=seconds)
        if isinstance(instruction, LoadMicroBatch):
            return Observation(wait=self._counters.waited_for_data)
        channel: Sender | Receiver | None = None
        if isinstance(instruction, (RefreshDecoders, SendDecoders)):
            assert self.decoder_copies is not None
            if not self.decoder_copies.due(self.stage.trained_micro_batches):
                return None
            sends = isinstance(instruction, SendDecoders)
            channel = self.decoder_copies.sender if sends else self.decoder_copies.receiver
        elif isinstance(instruction, (RecvActivation, SendActivation)):
            channel = self.sender if isinstance(instruction, SendActivation) else self.receiver
        return Observation(*channel.latest) if channel is not None else Observation()
