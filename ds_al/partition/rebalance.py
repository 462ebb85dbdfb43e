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

from ds_al.partition.plan import balance
from ds_al.trace.events import Event

IN_A_ROW = 2
"""Number of checks, one after the other, that must promise a gain before layers move: one may be noise."""


class Rebalance:
    """Decides when layers move, on every rank alike.

    Args:
        every: number of batches between two checks.
        threshold: ratio of the slowest stage's time now to that after the move, above which layers move.
    """

    def __init__(self, *, every: int, threshold: float) -> None:
        self.every, self.threshold = every, threshold
        self._normal: list[float] = []
        self._promised = 0

    def due(self, batch: int) -> bool:
        """Whether a batch is recorded, counted from 1; never the first one, in which layers warm up."""
        return batch > 1 and batch % self.every == 0

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
        self._promised = self._promised + 1 if gain > self.threshold else 0
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
