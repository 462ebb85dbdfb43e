"""Augmentation of a whole micro-batch at once, from a generator that is passed in."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def crop_and_flip(x: Tensor, generator: torch.Generator, *, pad: int = 2, flip: bool = True) -> Tensor:
    """Shifts each image by up to ``pad`` pixels both ways, and mirrors half of them left to right.

    Args:
        x: ``(B, C, H, W)``.
        generator: decides the shifts and the flips.
        pad: width of the border, filled with the image's own edge, that the crop may move into.
        flip: mirror at all.

    Returns:
        ``(B, C, H, W)``, a new tensor.
    """
    batch, _, height, width = x.shape
    top, left = torch.randint(2 * pad + 1, (2, batch, 1), generator=generator)
    columns = left + torch.arange(width)  # (B, W)
    rows = top + torch.arange(height)  # (B, H)
    if flip:
        mirrored = torch.rand(batch, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(x, (pad, pad, pad, pad), mode="replicate")
    samples = torch.arange(batch)[:, None, None]
    # Advanced indices around the channel slice put the channels last: (B, H, W, C).
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
