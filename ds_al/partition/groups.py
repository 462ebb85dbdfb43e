"""Partition of K AL layers over P > K stages: each layer spans a group of stages that hold runs of its blocks.

A layer's bridge, g and h are on the last stage of its group. The slowest stage determines the throughput, as in
:mod:`ds_al.partition.plan`: of all sizes of groups and all cuts inside layers, those whose slowest stage is fastest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

from ds_al.errors import ALConfigError
from ds_al.partition.plan import balance

Run = tuple[int, range]
"""Index of an AL layer, and a run of its blocks."""


def spread(costs: Sequence[Sequence[float]], stages: int) -> list[Run]:
    """Returns what each stage holds.

    Args:
        costs: cost of every block of every layer, ``costs[layer][block]``; that of a last block includes b, g and h.
        stages: P, at least the number of layers.

    Raises:
        ALConfigError: the layers have fewer blocks than there are stages.
    """
    blocks = [len(row) for row in costs]
    if sum(blocks) < stages:
        raise ALConfigError(
            f"got {stages} stages for {len(costs)} AL layers of {blocks} blocks, {sum(blocks)} in all: a stage needs a "
            "block of f (a child of nn.Sequential) of its own. Use fewer processes, or divide f into more blocks"
        )
    cuts = [[balance([row] * size) for size in range(1, len(row) + 1)] for row in costs]
    # best[p]: the slowest of the first p stages when they hold all layers so far
    best, sizes = [0.0, *[math.inf] * stages], [[0] * (stages + 1) for _ in costs]
    for layer, row in enumerate(costs):
        now = [math.inf] * (stages + 1)
        for p in range(stages + 1):
            for size in range(1, min(len(row), p) + 1):
                slowest = max(best[p - size], max(sum(row[a:b]) for a, b in pairwise(cuts[layer][size - 1])))
                if slowest < now[p]:
                    now[p], sizes[layer][p] = slowest, size
        best = now
    runs: list[Run] = []
    p = stages
    for layer in reversed(range(len(costs))):
        bounds = cuts[layer][sizes[layer][p] - 1]
        runs = [*((layer, range(a, b)) for a, b in pairwise(bounds)), *runs]
        p -= sizes[layer][p]
    return runs


def explicit_runs(text: str, *, blocks: Sequence[int], stages: int) -> list[Run]:
    """Parses the runs of ``"cuts:2,5"``, the first blocks of stages 1, 2, ..., counted over all layers.

    Raises:
        ALConfigError: the numbers are not increasing, their count does not match the stages, or a stage would hold
            blocks of two layers.
    """
    starts = [0, *accumulate(blocks)]
    try:
        bounds = [0, *(int(number) for number in text.removeprefix("cuts:").split(",")), starts[-1]]
    except ValueError:
        bounds = []
    if len(bounds) != stages + 1 or any(a >= b for a, b in pairwise(bounds)) or not set(starts) <= set(bounds):
        raise ALConfigError(
            f"got partition_method={text!r}: expected 'cuts:' and {stages - 1} rising numbers between 0 and "
            f"{starts[-1]}, the first blocks of the stages after the first one, {starts[1:-1]} among them, where AL "
            "layers begin"
        )
    runs = []
    for a, b in pairwise(bounds):
        layer = max(i for i, start in enumerate(starts[:-1]) if start <= a)
        runs.append((layer, range(a - starts[layer], b - starts[layer])))
    return runs
