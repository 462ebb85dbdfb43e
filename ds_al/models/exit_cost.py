"""Inference cost up to each exit: forward FLOPs per sample, counted as in :mod:`.cost`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ds_al.models.cost import counted, forward_flops, isolated
from ds_al.spec import ALLayerSpec
from ds_al.tensors import Activation


@dataclass(frozen=True)
class ExitCost:
    """Inference cost of one AL layer.

    Attributes:
        layer: FLOPs of f, per sample.
        exit: FLOPs of the exit after the layer, per sample: the bridge, then decoders or the codes of all classes.
    """

    layer: int
    exit: int


def exit_costs(
    al: Sequence[ALLayerSpec], *, shape: Sequence[int], num_classes: int, dtype: torch.dtype = torch.float32
) -> list[ExitCost]:
    """Counts the FLOPs of f and of the exit of every layer. torch's random state is preserved.

    Args:
        al: specs from :func:`~ds_al.models.build_al`.
        shape, num_classes, dtype: as for :func:`~ds_al.models.cost.network_cost`.
    Raises:
        ALLayerError: the network runs neither on the meta device nor on two real samples.
    """
    return counted(
        lambda shape, device: _count(al, shape=shape, num_classes=num_classes, dtype=dtype, device=device),
        shape=shape,
        dtype=dtype,
    )


def fixed_exit(costs: Sequence[ExitCost]) -> list[int]:
    """Returns the FLOPs up to each exit if all samples leave there and no other exit is evaluated."""
    return [sum(cost.layer for cost in costs[: m + 1]) + costs[m].exit for m in range(len(costs))]


def averaged_exits(costs: Sequence[ExitCost]) -> list[int]:
    """Returns the FLOPs of the full path plus the last n exits, for n = 1 .. N: :mod:`ds_al.exits`."""
    path = sum(cost.layer for cost in costs)
    return [path + sum(cost.exit for cost in costs[-n:]) for n in range(1, len(costs) + 1)]


def tried_exits(costs: Sequence[ExitCost], left: Sequence[float]) -> float:
    """Returns the mean FLOPs per sample if each sample evaluates every exit up to the one where it leaves.

    Args:
        costs: costs of all layers.
        left: share of the samples that leave at each exit.
    """
    passed = [sum(cost.layer + cost.exit for cost in costs[: m + 1]) for m in range(len(costs))]
    return sum(share * cost for share, cost in zip(left, passed, strict=True))


def _count(
    al: Sequence[ALLayerSpec], *, shape: Sequence[int], num_classes: int, dtype: torch.dtype, device: str
) -> list[ExitCost]:
    with isolated(device), torch.no_grad():
        s: Activation = torch.ones(*shape, dtype=dtype)
        table: Tensor | None = None
        earlier: list[nn.Module] = []
        costs = []
        for spec in al:
            layer = spec.build().eval()
            f, s = forward_flops(partial(layer.f, s))
            if layer.objective.has_code_table:
                table = layer.objective.all_classes(num_classes, device=device) if table is None else table
                table = layer.g(table)  # not counted: computed once for any number of samples
            scores, _ = forward_flops(partial(layer.objective.scores, layer, s, earlier=earlier, table=table))
            earlier.append(layer.h)
            costs.append(ExitCost(f // shape[0], scores // shape[0]))
    return costs
