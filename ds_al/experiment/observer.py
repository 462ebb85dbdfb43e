"""Observers of a run: who shows its progress, writes its files and logs it. They get values, never the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_al.trace import Event, StageMetrics


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a run is, known before its first batch, on every rank.

    Attributes:
        folder: folder of the run's files.
        stages: stages of the pipeline, P.
        groups: stages of each AL layer, where layers span several, K < P; otherwise empty.
        group_schedule: schedule inside these groups; empty where there are none.
        replicas: data parallel replicas, R.
        partition: bounds; stage p has the losses of the layers from ``partition[p]`` up to ``partition[p + 1]``: of
            those that it holds, or of the one that ends there where layers span several stages.
        partition_table: times that the bounds were chosen by, where they were measured.
        parameters: parameters per stage.
        micro_batch_size: samples per micro-batch.
        micro_batches: the config's ``gradient_accumulation_steps``.
        micro_batches_per_batch: micro-batches that all replicas together train per batch.
        optimizer_steps: optimizer steps of each layer per batch.
        loss: what the losses that are shown are.
        writer: rank that shows progress and writes files.
        total_batches: batches from the first epoch to the last one.
        epochs: epochs of the whole run.
        first_epoch: epochs that were trained before this run, which resumes after them.
        first_batch: batches that were trained before this run.
    """

    name: str
    method: str
    folder: Path
    stages: int
    replicas: int
    partition: list[int]
    partition_method: str
    partition_table: str | None
    parameters: list[int]
    seed: int
    training_samples: int
    micro_batch_size: int
    micro_batches: int
    micro_batches_per_batch: int
    batches_per_epoch: int
    total_batches: int
    epochs: int
    first_epoch: int
    first_batch: int = 0
    optimizer_steps: int = 1
    loss: str = ""
    writer: int = 0
    groups: tuple[int, ...] = ()
    group_schedule: str = ""

    def batches_until(self, epoch: int) -> int:
        """Number of batches of the whole run up to the end of an epoch, counted from 0."""
        return min((epoch + 1) * self.batches_per_epoch, self.total_batches)

    @property
    def batch_samples(self) -> int:
        """Samples per batch."""
        return self.micro_batch_size * self.micro_batches_per_batch


def stage_means(values: Sequence[float], bounds: Sequence[int]) -> list[float]:
    """Computes the mean over the layers of each stage; stage p has the losses of ``bounds[p]`` up to ``bounds[p + 1]``.

    It is NaN for a stage that computes no loss, as the first stages of a layer that spans several.
    """
    return [
        sum(values[start:stop]) / (stop - start) if stop > start else math.nan
        for start, stop in zip(bounds, bounds[1:], strict=False)
    ]


@dataclass(frozen=True)
class Snapshot:
    """State of the stages after a batch, as far as this process knows it."""

    stage_metrics: Mapping[int, StageMetrics]
    """Latest metrics by stage."""
    losses: Sequence[Sequence[float]]
    """Latest losses, one list per entry of ``stage_metrics``."""
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

    def logged(self, row: Mapping[str, Any]) -> None:
        """Called every ``experiment.log_every`` batches.

        Args:
            row: ``epoch``, ``batch``, both from 1, ``learning_rate``, ``samples_per_second``, and ``losses`` by AL
                layer, ``(N, 2)`` with NaN where not known yet, or the ``loss`` of a twin.
        """

    def losses(self, epoch: int, losses: Tensor) -> None:
        """Called after the batches of an epoch of associated learning, with their local losses ``(batches, N, 2)``.

        The last one is that of the epoch's last batch; in a resumed run the first ones may be from before.
        """

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Called at the end of an epoch, with its metrics, those of its evaluation included."""

    def trained(self, events: Sequence[Event]) -> None:
        """Called after the last epoch, with the events of a traced run, before the final evaluation."""

    def finished(self, summary: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """Called at the end of the run, with its summary and the metrics of its epochs."""

    def failed(self) -> None:
        """Called where training or evaluation raises, in place of the calls that would have followed."""


class Observers:
    """Several observers as one: calls each of them, in their order; none on ranks that do not write."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def __getattr__(self, event: str) -> Callable[..., None]:
        """Returns a method of :class:`Observer` for all of them."""
        getattr(Observer, event)  # an unknown event is an error without observers, too

        def call(*args: Any) -> None:
            for observer in self._observers:
                getattr(observer, event)(*args)

        return call
