"""Augmentation of whole micro-batches, with random numbers from a given generator.

Images have pixels from 0 to 255, as ``uint8`` or floats; augmentations that only move pixels accept any values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Returns an augmented ``x`` of a micro-batch; uses random numbers of the given generator only."""


def crop_and_flip(
    x: Tensor,
    generator: torch.Generator,
    *,
    pad: int = 2,
    flip: bool = True,
    border: Literal["edge", "zero"] = "edge",
) -> Tensor:
    """Shifts each image by up to ``pad`` pixels in both dimensions, and mirrors half of the images horizontally.

    Args:
        x: ``(B, C, H, W)``.
        generator: source of the random shifts and flips.
        pad: maximum shift; width of the border.
        flip: whether to mirror.
        border: fill of the border: the edge of the image, or zeros.
    Returns:
        ``(B, C, H, W)``, a new tensor.
    """
    batch, channels, height, width = x.shape
    top, left = torch.randint(2 * pad + 1, (2, batch, 1), generator=generator)
    columns = left - pad + torch.arange(width)  # (B, W), in the source image
    rows = top - pad + torch.arange(height)  # (B, H)
    if flip:
        mirrored = torch.rand(batch, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    # Indices beyond an edge are clamped to the edge, so no padded copy is made.
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
    """Scales brightness, then contrast, then saturation of each image by its own random factor.

    Factors are drawn uniformly from ``1 - v`` to ``1 + v``. Contrast is relative to the mean grey of the image,
    saturation to the grey of each pixel; after each step values are clamped to 0..255. Images of one channel have no
    saturation.

    Args:
        x: ``(B, C, H, W)``, pixels 0 to 255, C is 1 or 3 (red, green, blue).
        generator: source of the random factors.
        brightness, contrast, saturation: v of each factor, 0 to 1; 0 changes nothing.
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
    """Crops from a black border of 4 pixels, flips and jitters colours, as is common in publications on CIFAR."""
    return colour_jitter(crop_and_flip(x, generator, pad=4, border="zero"), generator)


AUGMENTATIONS: dict[str, Augment | None] = {
    "none": None,
    "flip": partial(crop_and_flip, pad=0),
    "crop_and_flip": crop_and_flip,
    "published": published,
}
"""Augmentations by their names in ``experiment.data.augment``."""


def _grey(x: Tensor) -> Tensor:
    """Computes the luminance ``(B, 1, H, W)``."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _blend(x: Tensor, towards: Tensor, factor: Tensor) -> Tensor:
    """Interpolates from ``towards`` (factor 0) to x (factor 1) and beyond, in place, clamped to 0..255."""
    return x.sub_(towards).mul_(factor).add_(towards).clamp_(0, 255)
