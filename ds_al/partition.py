"""Cuts a network into stages by what its layers cost: measured, on the ranks that will run them.

A pipeline runs at the pace of its slowest stage, so of all ways to cut, the one with the smallest slowest stage is
the best. It is found exactly, by dynamic programming: ``best(p, j)``, the slowest of the first p stages when they hold
the first j layers, is the smallest over i of ``max(best(p - 1, i), cost of layers i .. j on stage p)``.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_al.errors import ALConfigError
from ds_al.layer import Activation, ALLayer, first, stop_gradient


@dataclass(frozen=True)
class LayerTime:
    """Seconds that one AL layer takes for a micro-batch, bridge and target side included."""

    forward: float
    backward: float
    """Local losses and their backward."""
    step: float
    """An AdamW step on all parameters, which stands for the optimizer that is not known yet."""

    @property
    def total(self) -> float:
        """All three."""
        return self.forward + self.backward + self.step


def balance(
    costs: Sequence[Sequence[float]], *, memory: Sequence[float] | None = None, limit: float = math.inf
) -> list[int]:
    """Finds the cut into contiguous stages with the smallest slowest stage.

    Args:
        costs: of every layer on every stage, ``costs[stage][layer]``: rows differ where ranks differ in speed.
        memory: of every layer, in any unit.
        limit: most memory of a stage, in the same unit.

    Returns:
        Bounds ``[0, ..., N]``, one more than stages; every stage holds a layer. Of equal cuts, the first.

    Raises:
        ALConfigError: there are fewer layers than stages, or no cut keeps the memory limit.
    """
    stages, layers = len(costs), len(costs[0])
    if layers < stages:
        raise ALConfigError(f"got {layers} layers for {stages} stages: expected a layer for each")
    sums = [[0.0, *accumulate(row)] for row in costs]
    held = [0.0, *accumulate(memory if memory is not None else [0.0] * layers)]
    best = [[math.inf] * (layers + 1) for _ in range(stages + 1)]
    cut = [[0] * (layers + 1) for _ in range(stages + 1)]
    best[0][0] = 0.0
    for p in range(1, stages + 1):
        for j in range(p, layers - (stages - p) + 1):
            for i in range(p - 1, j):
                if held[j] - held[i] > limit:
                    continue
                slowest = max(best[p - 1][i], sums[p - 1][j] - sums[p - 1][i])
                if slowest < best[p][j]:
                    best[p][j], cut[p][j] = slowest, i
    if best[stages][layers] == math.inf:
        raise ALConfigError(f"no cut into {stages} stages keeps each within the memory limit of {limit:g}")
    bounds = [layers]
    for p in range(stages, 0, -1):
        bounds.append(cut[p][bounds[-1]])
    return bounds[::-1]


def explicit(text: str, *, layers: int, stages: int) -> list[int]:
    """Bounds from ``"cuts:2,5"``: where stages 1, 2, ... begin.

    Raises:
        ALConfigError: these are not as many rising numbers as the stages need.
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


def measure(
    build: Callable[[int], ALLayer],
    *,
    layers: int,
    example: Activation,
    num_classes: int,
    device: torch.device,
    repeat: int = 5,
) -> Iterator[LayerTime]:
    """Times every layer, one after the other, on this rank's device; medians after a warm-up.

    Args:
        build: makes the layer of an index. Each is freed before the next one is made.
        layers: N.
        example: a micro-batch ``x``, of the size that will be trained on.
        num_classes: V.
        repeat: times that are measured.
    """
    s: Any = tuple(part.to(device) for part in example) if isinstance(example, tuple) else example.to(device)
    labels = torch.zeros(len(first(s)), dtype=torch.int64, device=device)
    t: Any = None
    for index in range(layers):
        layer = build(index).to(device).train()
        if t is None:
            t = layer.objective.first_target(labels, F.one_hot(labels, num_classes).to(torch.get_default_dtype()))
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0) if trained else None
        times = [_once(layer, s, t, optimizer, device) for _ in range(repeat + 2)][2:]
        yield LayerTime(*(statistics.median(column) for column in zip(*times, strict=True)))
        with torch.no_grad():
            s_out, t_out = layer(s, t)
        s, t = stop_gradient(s_out), stop_gradient(t_out)
        del layer, optimizer, trained


def _once(
    layer: ALLayer, s: Any, t: Any, optimizer: torch.optim.Optimizer | None, device: torch.device
) -> tuple[float, float, float]:
    marks = [_now(device)]
    s_out, t_out = layer(s, t)
    marks.append(_now(device))
    learning: list[Tensor] = [loss for loss in layer.local_losses(s_out, t_out, t) if loss.requires_grad]
    if learning:
        torch.autograd.backward(learning)
    marks.append(_now(device))
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    marks.append(_now(device))
    return marks[1] - marks[0], marks[2] - marks[1], marks[3] - marks[2]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def describe(times: Sequence[Sequence[LayerTime]], bounds: Sequence[int], names: Sequence[str]) -> str:
    """A table of what was measured and decided: layer, milliseconds on its stage, stage; and the bubble to expect.

    Args:
        times: ``times[stage][layer]``.
        bounds: as :func:`balance` gives them.
        names: of the layers.
    """
    lines = ["layer                      forward  backward   step   stage   (ms)"]
    busy = []
    for stage, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        own = times[stage][start:stop]
        busy.append(sum(each.total for each in own))
        for index, each in enumerate(own, start=start):
            parts = " ".join(f"{1000 * value:8.2f}" for value in (each.forward, each.backward, each.step))
            lines.append(f"{index:3d} {names[index][:20]:20s} {parts} {stage:7d}")
    slowest = max(busy)
    bubbles = ", ".join(f"{1 - each / slowest:.0%}" for each in busy)
    lines.append(f"the slowest stage takes {1000 * slowest:.2f} ms per micro-batch; idle by imbalance: {bubbles}")
    return "\n".join(lines)
