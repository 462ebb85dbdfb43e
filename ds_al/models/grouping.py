"""Grouping of a network's blocks into K AL layers of neighbouring blocks, with exact backprop within each layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from deepspeed.pipe import LayerSpec
from torch import nn

from ds_al.errors import ALConfigError

Layers = int | Sequence[int]
"""K, with blocks distributed evenly; or the number of blocks of each of the K layers."""


def block_groups(num_blocks: int, num_layers: Layers | None, *, default: int | None = None) -> list[range]:
    """Returns the blocks of each AL layer.

    Args:
        num_blocks: number of blocks.
        num_layers: number K of AL layers, distributed evenly with the larger ones last; or the number of blocks of
            each.
        default: K if ``num_layers`` is not given; by default one layer per block.
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
    """A sequence of blocks built from specs; the input of each is the output of its predecessor."""

    def __init__(self, specs: Sequence[LayerSpec]) -> None:
        super().__init__(*(spec.build() for spec in specs))


def chain_specs(specs: Sequence[LayerSpec], groups: Sequence[range]) -> list[LayerSpec]:
    """Returns one spec per group; a group of a single block keeps that block's spec."""
    return [
        specs[group.start] if len(group) == 1 else LayerSpec(Chain, list(specs[group.start : group.stop]))
        for group in groups
    ]
