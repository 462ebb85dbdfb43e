"""Observers of a run: who shows its progress, writes its files and logs it. They get values, never the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_al.trace import Event, StageMetrics


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a run is: method, sizes, partition, length and folder. Known before its first batch, on every rank."""

    name: str
    """Name of the experiment."""
    method: str
    """Training method."""
    folder: Path
    """Folder of the run's files."""
    stages: int
    """Stages of the pipeline, P."""
    replicas: int
    """Data parallel replicas, R."""
    partition: list[int]
    """Bounds: stage p holds the layers from ``partition[p]`` up to ``partition[p + 1]``."""
    partition_method: str
    """How the bounds were chosen."""
    partition_table: str | None
    """Times that the bounds were chosen by, where they were measured."""
    parameters: list[int]
    """Parameters per stage."""
    seed: int
    """Seed of the run."""
    training_samples: int
    """Samples of the training part."""
    micro_batch_size: int
    """Samples per micro-batch."""
    micro_batches: int
    """The config's ``gradient_accumulation_steps``."""
    micro_batches_per_batch: int
    """Micro-batches that all replicas together train per batch."""
    batches_per_epoch: int
    """Batches of one pass over the training part."""
    total_batches: int
    """Batches from the first epoch to the last one."""
    epochs: int
    """Epochs of the whole run."""
    first_epoch: int
    """Epochs that were trained before this run, which resumes after them."""

    @property
    def batch_samples(self) -> int:
        """Samples per batch."""
        return self.micro_batch_size * self.micro_batches_per_batch


@dataclass(frozen=True)
class Snapshot:
    """How the stages are doing after a batch, as far as this process knows.

    Attributes:
        stage_metrics: latest metrics by stage.
        losses: latest losses, one list per entry of ``stage_metrics``.
        learning_rate: latest one.
    """

    stage_metrics: Mapping[int, StageMetrics]
    losses: Sequence[Sequence[float]]
    learning_rate: float


class Observer:
    """Is called as a run goes on, on the rank that writes. Every method does nothing here; override those needed."""

    def started(self, info: RunInfo) -> None:
        """Called once, before the first batch."""

    def batch(self, epoch: int, snapshot: Callable[[], Snapshot]) -> None:
        """Called after every batch.

        Args:
            epoch: its epoch, from 0.
            snapshot: returns how the stages are doing; it waits for the device, so call it rarely.
        """

    def losses(self, epoch: int, losses: Tensor) -> None:
        """Called after the batches of an epoch of associated learning, with their local losses ``(batches, N, 2)``."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Called at the end of an epoch, with its metrics, those of its evaluation included."""

    def trained(self, events: Sequence[Event]) -> None:
        """Called after the last epoch, with the events of a traced run, before the final evaluation."""

    def finished(self, summary: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """Called at the end of the run, with its summary and the metrics of its epochs."""

    def failed(self) -> None:
        """Called where training or evaluation raises, in place of the calls that would have followed."""


class Observers(Observer):
    """Calls several observers, in their order; without any, as on ranks that do not write, it does nothing."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def started(self, info: RunInfo) -> None:
        """See :class:`Observer`."""
        for observer in self._observers:
            observer.started(info)

    def batch(self, epoch: int, snapshot: Callable[[], Snapshot]) -> None:
        """See :class:`Observer`."""
        for observer in self._observers:
            observer.batch(epoch, snapshot)

    def losses(self, epoch: int, losses: Tensor) -> None:
        """See :class:`Observer`."""
        for observer in self._observers:
            observer.losses(epoch, losses)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """See :class:`Observer`."""
        for observer in self._observers:
            observer.epoch(row)

    def trained(self, events: Sequence[Event]) -> None:
        """See :class:`Observer`."""
        for observer in self._observers:
            observer.trained(events)

    def finished(self, summary: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """See :class:`Observer`."""
        for observer in self._observers:
            observer.finished(summary, history)

    def failed(self) -> None:
        """See :class:`Observer`."""
        for observer in self._observers:
            observer.failed()
