"""Partition of a network into stages by layer costs, which are measured on the ranks that will run the layers.

The slowest stage determines the throughput of a pipeline, so the best partition is the one whose slowest stage is the
fastest. It is computed exactly, by dynamic programming: ``best(p, j)``, the slowest of the first p stages when they
hold the first j layers, is the minimum over i of ``max(best(p - 1, i), cost of layers i .. j on stage p)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

from ds_al.errors import ALConfigError
from ds_al.partition.layer_times import LayerTime


def balance(
    costs: Sequence[Sequence[float]],
    *,
    memory: Sequence[float] | None = None,
    limit: float | Sequence[float] = math.inf,
) -> list[int]:
    """Returns the partition into contiguous stages that minimizes the cost of the slowest stage.

    Args:
        costs: cost of every layer on every stage, ``costs[stage][layer]``; rows differ if ranks differ in speed.
        memory: memory of every layer, in any unit.
        limit: maximum memory of a stage, or of each stage, in the same unit.

    Returns:
        Bounds ``[0, ..., N]``, one more than stages; every stage has at least one layer. Of equal partitions, the
        first.

    Raises:
        ALConfigError: there are fewer layers than stages, or no partition satisfies the memory limit.
    """
    stages, layers = len(costs), len(costs[0])
    if layers < stages:
        raise ALConfigError(f"got {layers} layers for {stages} stages: expected a layer for each")
    sums = [[0.0, *accumulate(row)] for row in costs]
    limits = list(limit) if isinstance(limit, Sequence) else [limit] * stages
    held = [0.0, *accumulate(memory if memory is not None else [0.0] * layers)]
    best = [[math.inf] * (layers + 1) for _ in range(stages + 1)]
    cut = [[0] * (layers + 1) for _ in range(stages + 1)]
    best[0][0] = 0.0
    for p in range(1, stages + 1):
        for j in range(p, layers - (stages - p) + 1):
            for i in range(p - 1, j):
                if held[j] - held[i] > limits[p - 1]:
                    continue
                slowest = max(best[p - 1][i], sums[p - 1][j] - sums[p - 1][i])
                if slowest < best[p][j]:
                    best[p][j], cut[p][j] = slowest, i
    if best[stages][layers] == math.inf:
        assert memory is not None
        evenest = balance([memory] * stages)
        needed = max(held[stop] - held[start] for start, stop in pairwise(evenest))
        raise ALConfigError(
            f"no cut into {stages} stages keeps each within the memory limit of {_numbers(limits)}: the cut that needs "
            f"least, at layers {evenest[1:-1]}, needs {needed:.12g} on its fullest stage. Raise the limit, take more "
            "stages or smaller micro-batches, or turn activation checkpointing on"
        )
    bounds = [layers]
    for p in range(stages, 0, -1):
        bounds.append(cut[p][bounds[-1]])
    return bounds[::-1]


def _numbers(limits: Sequence[float]) -> str:
    return ", ".join(f"{limit:.12g}" for limit in dict.fromkeys(limits))


def explicit(text: str, *, layers: int, stages: int) -> list[int]:
    """Parses the bounds of ``"cuts:2,5"``, the first layers of stages 1, 2, ...

    Raises:
        ALConfigError: the numbers are not increasing, or their count does not match the stages.
    """
    numbers = text.removeprefix("cuts:").split(",") if text != "cuts:" else []
    try:
        bounds = [0, *(int(number) for number in numbers), layers]
    except ValueError:
        bounds = []
    if len(bounds) != stages + 1 or any(a >= b for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ALConfigError(
            f"got partition_method={text!r}: expected 'cuts:' and {stages - 1} rising numbers between 0 and {layers}, "
            f"where the stages after the first one begin"
        )
    return bounds


def describe(
    times: Sequence[Sequence[LayerTime]], bounds: Sequence[int], names: Sequence[str], *, steps: float = 1.0
) -> str:
    """Formats a table of the measurement and the partition: per layer, milliseconds on its stage, memory and stage;
    then the expected bubble.

    Args:
        times: ``times[stage][layer]``.
        bounds: bounds as returned by :func:`balance`.
        names: names of the layers.
        steps: optimizer steps per micro-batch.
    """
    lines = ["layer                      forward  backward   step       u      MiB   stage   (ms)"]
    busy = []
    for stage, (start, stop) in enumerate(pairwise(bounds)):
        own = times[stage][start:stop]
        busy.append(sum(each.cost(steps) for each in own))
        for index, each in enumerate(own, start=start):
            parts = " ".join(f"{1000 * value:8.2f}" for value in (each.forward, each.backward, each.step))
            lines.append(
                f"{index:3d} {names[index][:20]:20s} {parts} {each.u:7.2f} {each.memory / 2**20:8.1f} {stage:7d}"
            )
    slowest = max(busy)
    bubbles = ", ".join(f"{1 - each / slowest:.0%}" for each in busy)
    lines.append(f"the slowest stage takes {1000 * slowest:.2f} ms per micro-batch; idle by imbalance: {bubbles}")
    speeds = [1 / sum(each.cost(steps) for each in rank) for rank in times]
    lines.append(f"speed of each rank, of the fastest: {', '.join(f'{speed / max(speeds):.2f}' for speed in speeds)}")
    return "\n".join(lines)
