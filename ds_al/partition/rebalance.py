"""When layers move between stages by themselves: rules on the seconds that each layer takes where it is.

::

    every n batches    a batch is recorded, and all ranks learn the seconds of every layer: a drain
    a check            the slowest stage now, against the slowest one of the best partition
    two in a row       that promise a gain of more than the threshold: the layers move

What a layer would take on another stage is what it took at the first check, times the slowdown of that stage since: the
seconds of its layers now, divided by those at the first check. Every rank computes the same from the same numbers.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from deepspeed import comm as dist

from ds_al.config.associated_learning import RepartitionConfig
from ds_al.layer import ALLayer
from ds_al.parallel.topology import StageTopology
from ds_al.partition.plan import balance
from ds_al.trace.events import Event
from ds_al.trace.recorder import Recorder, Recording

IN_A_ROW = 2
"""Number of checks, one after the other, that must promise a gain before layers move: one may be noise."""


class Rebalance:
    """Measures the layers of all stages, and decides when they move. Every rank must create one.

    Args:
        config: how often, and for which gain.
        topology: place of this rank.
        device: device of the stage.
        recording: holds a recorder during the batch of a check; one that is traced anyway is not checked.
    """

    def __init__(
        self, config: RepartitionConfig, *, topology: StageTopology, device: torch.device, recording: Recording
    ) -> None:
        self.config = config
        self._topology, self._device, self._recording = topology, device, recording
        self._recorder: Recorder | None = None
        self._batch = self._promised = 0
        self._normal: list[float] = []

    def before_batch(self) -> None:
        """Records the batch that begins if it is to be checked; never the first one, in which layers warm up."""
        self._batch += 1
        if self._batch > 1 and self._batch % self.config.every == 0 and self._recording.recorder is None:
            self._recording.recorder = self._recorder = Recorder(self._topology.stage, device=self._device)

    def after_batch(
        self, layers: Sequence[tuple[int, ALLayer]], bounds: Sequence[int], *, micro_batches: int
    ) -> list[int] | None:
        """Returns the bounds of a better partition, the same on every rank, or ``None`` if the layers stay.

        A check drains the pipeline: every rank waits until all have ended the batch.

        Args:
            layers: ``(index in the network, layer)`` of this stage.
            bounds: the partition now, ``[0, ..., N]``.
            micro_batches: number of micro-batches of the batch.
        """
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return None
        self._recording.recorder = None
        weights = {index: sum(weight.numel() for weight in layer.parameters()) for index, layer in layers}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, layer_seconds(recorder.events, micro_batches=micro_batches, weights=weights))
        seconds = [max(own[layer] for own in everyone if layer in own) for layer in range(bounds[-1])]  # of replicas
        return self.decide(seconds, bounds)

    def decide(self, seconds: Sequence[float], bounds: Sequence[int]) -> list[int] | None:
        """Returns the bounds of a better partition, or ``None`` if the layers stay.

        Args:
            seconds: what every layer takes per micro-batch where it is now.
            bounds: the partition now, ``[0, ..., N]``.
        """
        if not self._normal:
            self._normal = list(seconds)
        costs = []
        for start, stop in pairwise(bounds):
            slowdown = sum(seconds[start:stop]) / sum(self._normal[start:stop])
            costs.append([seconds[i] if start <= i < stop else slowdown * self._normal[i] for i in range(len(seconds))])
        best = balance(costs)
        gain = _slowest(costs, bounds) / _slowest(costs, best)
        self._promised = self._promised + 1 if gain > self.config.threshold else 0
        if self._promised < IN_A_ROW:
            return None
        self._promised = 0
        return best


def _slowest(costs: Sequence[Sequence[float]], bounds: Sequence[int]) -> float:
    return max(sum(row[start:stop]) for row, (start, stop) in zip(costs, pairwise(bounds), strict=True))


def layer_seconds(events: Sequence[Event], *, micro_batches: int, weights: Mapping[int, int]) -> dict[int, float]:
    """Returns the seconds of each layer per micro-batch, from the recorded events of a batch of one stage.

    Forward and backward are medians over the micro-batches. The time of optimizer steps is divided among the layers by
    their numbers of weights.

    Args:
        weights: number of weights of each layer of the stage.
    """
    parts: dict[tuple[int, str], list[float]] = defaultdict(list)
    for event in events:
        if event.layer is not None:
            parts[event.layer, event.instruction].append(event.seconds)
    steps = sum(event.seconds for event in events if event.instruction == "OptimizerStep") / micro_batches
    share = steps / max(sum(weights.values()), 1)
    found = {layer: share * count for layer, count in weights.items()}
    for (layer, _), seconds in parts.items():
        found[layer] += statistics.median(seconds)
    return found
