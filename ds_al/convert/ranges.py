"""The blocks of each AL layer: as many in each, by given numbers, or of as even work as whole blocks allow."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal

from ds_al.convert.architectures import Anatomy
from ds_al.errors import ALConfigError
from ds_al.models.grouping import block_groups
from ds_al.partition.plan import balance

Groups = Sequence[int] | Literal["by-work"] | None
"""Number of blocks of each AL layer; ``"by-work"``: K layers of as even work; ``None``: K layers of as many blocks."""


def block_ranges(anatomy: Anatomy, *, num_al_layers: int, groups: Groups) -> list[range]:
    """Returns the blocks of each AL layer.

    Raises:
        ALConfigError: there are fewer blocks than layers, or the numbers of blocks do not add up.
    """
    blocks = anatomy.blocks
    if groups is None or groups == "by-work":
        if not 1 <= num_al_layers <= blocks:
            raise ALConfigError(f"got num_al_layers={num_al_layers}: expected 1..{blocks}, the number of blocks")
        if groups is None or len(set(work := block_work(anatomy))) == 1:
            return block_groups(blocks, num_al_layers)
        return [range(a, b) for a, b in pairwise(balance([work] * num_al_layers))]
    if sum(groups) != blocks or any(size < 1 for size in groups):
        raise ALConfigError(
            f"got groups={list(groups)}: expected how many blocks each AL layer has, 1 or more, {blocks} in all"
        )
    return [range(a, b) for a, b in pairwise([0, *accumulate(groups)])]


def block_work(anatomy: Anatomy) -> list[float]:
    """Returns the work of each block, in units of its forward.

    A block that trains has 3: its backward computes gradients of its input and of its weights. One without trained
    weights has 1 below all that train, where no gradient goes, and 2 above.
    """
    blocks = [anatomy.group(range(i, i + 1)) for i in range(anatomy.blocks)]
    trains = [any(weight.requires_grad for weight in block.parameters()) for block in blocks]
    return [3.0 if each else 2.0 if any(trains[:i]) else 1.0 for i, each in enumerate(trains)]
