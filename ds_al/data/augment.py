"""Augmentation of a whole micro-batch at once, from a generator that is passed in.

Images may hold pixels, 0 to 255, of ``uint8`` or floats; what moves them only, may hold anything.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Changes the ``x`` of a micro-batch; draws from the given generator only."""


def crop_and_flip(
    x: Tensor,
    generator: torch.Generator,
    *,
    pad: int = 2,
    flip: bool = True,
    border: Literal["edge", "zero"] = "edge",
) -> Tensor:
    """Shifts each image by up to ``pad`` pixels both ways, and mirrors half of them left to right.

    Args:
        x: ``(B, C, H, W)``.
        generator: decides the shifts and the flips.
        pad: width of the border that the crop may move into.
        flip: mirror at all.
        border: what fills it, the image's own edge or zeros.

    Returns:
        ``(B, C, H, W)``, a new tensor.
    """
    batch, channels, height, width = x.shape
    top, left = torch.randint(2 * pad + 1, (2, batch, 1), generator=generator)
    columns = left - pad + torch.arange(width)  # (B, W), of the image that is read
    rows = top - pad + torch.arange(height)  # (B, H)
    if flip:
        mirrored = torch.rand(batch, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    # Reading beyond an edge is reading the edge, so no padded copy is made.
    inside = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]  # (B, H, W)
    moved = x.flatten(2).gather(2, inside.view(batch, 1, -1).expand(-1, channels, -1)).view(x.shape)
    if border == "zero" and pad:
        within_rows = (rows >= 0) & (rows < height)
        within_columns = (columns >= 0) & (columns < width)
        moved = moved * (within_rows[:, None, :, None] & within_columns[:, None, None, :])
    return moved


def colour_jitter(
    x: Tensor,
    generator: torch.Generator,
    *,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
) -> Tensor:
    """Scales brightness, then contrast, then saturation of each image by a factor of its own.

    Factors are drawn evenly from ``1 - v`` to ``1 + v``. Contrast is about the image's mean grey, saturation
    about each pixel's own; after each step values are cut off at 0 and 255. Images of one channel have no
    saturation.

    Args:
        x: ``(B, C, H, W)``, pixels 0 to 255, C is 1 or 3 (red, green, blue).
        generator: decides the factors.
        brightness, contrast, saturation: v of each, 0 to 1; 0 leaves it as it is.

    Returns:
        ``(B, C, H, W)`` float32, 0 to 255, a new tensor.
    """
    spread = torch.tensor([brightness, contrast, saturation])
    factors = 1 + spread * (2 * torch.rand(len(x), 3, generator=generator) - 1)  # (B, 3)
    by_brightness, by_contrast, by_saturation = factors.view(-1, 3, 1, 1, 1).unbind(dim=1)
    x = (x.float() * by_brightness).clamp_(0, 255)
    x = _blend(x, _grey(x).mean(dim=(1, 2, 3), keepdim=True), by_contrast)
    if x.shape[1] == 3:
        x = _blend(x, _grey(x), by_saturation)
    return x


def published(x: Tensor, generator: torch.Generator) -> Tensor:
    """Crop from a black border of 4 pixels, flip and colour jitter: what CIFAR is trained with in publications."""
    return colour_jitter(crop_and_flip(x, generator, pad=4, border="zero"), generator)


AUGMENTATIONS: dict[str, Augment | None] = {
    "none": None,
    "flip": partial(crop_and_flip, pad=0),
    "crop_and_flip": crop_and_flip,
    "published": published,
}
"""What ``experiment.data.augment`` names."""


def _grey(x: Tensor) -> Tensor:
    """Luminance ``(B, 1, H, W)``."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _blend(x: Tensor, towards: Tensor, factor: Tensor) -> Tensor:
    """From ``towards`` at factor 0 over x at 1 to beyond, cut off at 0 and 255; writes over x."""
    return x.sub_(towards).mul_(factor).add_(towards).clamp_(0, 255)
