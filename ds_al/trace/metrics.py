"""Stage metrics: measured by each stage once per batch, and sent downstream with its losses."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_WAITS = (
    *("RecvActivation", "SendActivation", "RecvGrad", "SendGrad", "RefreshDecoders", "SendDecoders"),
    *("CommitP2P", "Barrier", "LossBroadcast", "ReduceGrads"),
)  # for other ranks


class StageMetrics(NamedTuple):
    """Metrics of one stage; NaN if unknown. Shares are of the time in its last ``train_batch()``.

    Times are the host's: on a GPU, where the host runs ahead of the device, all stages appear busy.
    """

    micro_batches: float
    """Number of trained micro-batches (exact up to 2^24, since metrics are sent as float32)."""
    busy: float
    """Share of time in which the stage waited neither for other stages nor for its replicas."""
    data: float
    """Share of time in which the stage waited for the data iterator or loaded from it; part of :attr:`busy`."""
    queue_full: float
    """Share of its messages that had to wait for a free slot in the queue to the next stage."""
    samples_per_second: float
    skipped: float = 0.0
    """Number of steps that its layers have left out."""


class StageMeter:
    """Computes the metrics of one ``train_batch()`` from an engine's running totals."""

    def __init__(self) -> None:
        self._start = 0.0
        self._before: dict[str, float] = {}

    def start(self, totals: Mapping[str, float]) -> None:
        """Starts a batch, with the same totals as for :meth:`stop`."""
        self._start, self._before = time.perf_counter(), dict(totals)

    def stop(self, totals: Mapping[str, float], *, micro_batches: int, skipped: int = 0) -> StageMetrics:
        """Ends a batch, and returns its metrics.

        Args:
            totals: seconds by instruction, ``"samples"`` trained, and, if the engine has send queues, ``"messages"``
                sent and those ``"found_full"``.
            micro_batches: number of trained micro-batches.
            skipped: number of steps that layers have left out.
        """
        seconds = time.perf_counter() - self._start
        since = {key: total - self._before.get(key, 0.0) for key, total in totals.items()}
        waits = sum(since.get(name, 0.0) for name in _WAITS)
        messages = since.get("messages", 0)
        return StageMetrics(
            micro_batches=micro_batches,
            busy=min(max(1 - waits / seconds, 0.0), 1.0),
            data=min(since.get("LoadMicroBatch", 0.0) / seconds, 1.0),
            queue_full=since["found_full"] / messages if messages else math.nan,
            samples_per_second=since["samples"] / seconds,
            skipped=skipped,
        )


LOSSES_KEPT = 65_536
"""Number of batches whose losses a stage keeps until they are gathered."""


class Report:
    """Losses and metrics of all stages up to this one: one flat float32 tensor, part of every message.

    ::

        | metrics of stage P-1 | ... | metrics of stage 0 | losses of layer 1 | ... | losses of layer N |
                          `---- stage p copies this slice from the message of stage p - 1 ----´

    Args:
        stages: number of stages, P.
        layers: number of AL layers, N.
        stage: index of this stage, p.
        first_layer: index of the stage's first layer.
        device: device of the tensor.
    """

    def __init__(self, *, stages: int, layers: int, stage: int, first_layer: int, device: torch.device) -> None:
        width = len(StageMetrics._fields)
        self.flat = torch.full((width * stages + 2 * layers,), math.nan, device=device)
        self.losses = self.flat[width * stages :].view(layers, 2)
        """``(N, 2)``, a view: ``(A_i, E_i)`` of every layer."""
        self.history: list[Tensor] = []
        """Losses ``(layers of this stage, 2)`` of the latest batches since they were gathered, at most
        :data:`LOSSES_KEPT`."""
        self._metrics = self.flat[: width * stages].view(stages, width)
        self._own = stages - 1 - stage
        self._earlier = slice(width * (stages - stage), width * stages + 2 * first_layer)

    def continue_from(self, former: Report, *, layers: int) -> None:
        """Takes over what is known of the first ``layers`` layers, and of all stages."""
        self.flat.copy_(former.flat)
        self.losses[layers:] = math.nan

    def remember(self, losses: Tensor) -> None:
        """Adds the losses of a batch to the history."""
        self.history.append(losses)
        del self.history[:-LOSSES_KEPT]

    def take_over(self, flat: Tensor) -> None:
        """Copies losses and metrics of all earlier stages from the previous stage's report."""
        self.flat[self._earlier] = flat[self._earlier]

    def set_metrics(self, metrics: StageMetrics) -> None:
        """Sets this stage's metrics, without waiting for the device."""
        pinned = self.flat.device.type == "cuda"
        self._metrics[self._own].copy_(torch.tensor(metrics, dtype=torch.float32, pin_memory=pinned), non_blocking=True)

    def stage_metrics(self) -> list[StageMetrics]:
        """Returns the metrics of all stages, in order; waits for the device."""
        return [StageMetrics(*row) for row in reversed(self._metrics.tolist())]
