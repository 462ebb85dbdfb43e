"""Grouping of a network's blocks into AL layers: K layers of neighbouring blocks, exact backprop within each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from deepspeed.pipe import LayerSpec
from torch import nn

from ds_al.errors import ALConfigError

Layers = int | Sequence[int]
"""K, with blocks dealt out evenly; or how many blocks each of the K layers holds."""


def block_groups(num_blocks: int, num_layers: Layers | None, *, default: int | None = None) -> list[range]:
    """Which of ``num_blocks`` blocks each AL layer holds.

    Args:
        num_blocks: number of blocks.
        num_layers: number K of AL layers, as even as can be, later ones the larger; or the number of blocks of each.
        default: K where ``num_layers`` is not given; one per block where this is not given either.

    Raises:
        ALConfigError: ``num_layers`` is not in 1..num_blocks, or the numbers of blocks do not add up.
    """
    if isinstance(num_layers, Sequence):
        sizes = list(num_layers)
        if not sizes or min(sizes) < 1 or sum(sizes) != num_blocks:
            raise ALConfigError(f"got num_layers={sizes}: expected blocks of each layer that add up to {num_blocks}")
        bounds = [0, *accumulate(sizes)]
    else:
        count = (default or num_blocks) if num_layers is None else num_layers
        if not 1 <= count <= num_blocks:
            raise ALConfigError(f"got num_layers={num_layers}: expected 1..{num_blocks}, the number of blocks")
        bounds = [num_blocks * i // count for i in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


class Chain(nn.Sequential):
    """Blocks one after another, made of their specs; each reads whatever its predecessor returns."""

    def __init__(self, specs: Sequence[LayerSpec]) -> None:
        super().__init__(*(spec.build() for spec in specs))


def chain_specs(specs: Sequence[LayerSpec], groups: Sequence[range]) -> list[LayerSpec]:
    """One spec per group; a block that is alone in its group stays as it is."""
    return [
        specs[group.start] if len(group) == 1 else LayerSpec(Chain, list(specs[group.start : group.stop]))
        for group in groups
    ]
