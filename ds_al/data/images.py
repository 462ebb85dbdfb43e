"""In-memory image data set, stored as ``uint8`` and normalised per micro-batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Statistics = tuple[Tensor, Tensor]
"""Mean and standard deviation of each channel, float32 ``(1, C, 1, 1)``, in units of a pixel, 0 to 255."""


class Images:
    """Data set of labelled images, stored as ``uint8``, which needs a quarter of the memory of float32.

    Args:
        pixels: ``(N, C, H, W)``, ``uint8``.
        labels: ``(N,)``, ``int64``.
        statistics: mean and standard deviation for the normalisation; those of the training part, in every part.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, *, statistics: Statistics) -> None:
        self.pixels, self.labels, self.statistics = pixels, labels, statistics

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns one sample: ``(C, H, W)`` float32 and its label."""
        return self.normalise(self.pixels[index])[0], self.labels[index]

    def make_batch(self, indices: Tensor, augment: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Returns ``(x (B, C, H, W) float32, y (B,))``; the input of ``augment`` is pixels, 0 to 255."""
        pixels = self.pixels[indices]
        return self.normalise(pixels if augment is None else augment(pixels)), self.labels[indices]

    def normalise(self, pixels: Tensor) -> Tensor:
        """Scales pixels ``(..., C, H, W)``, 0 to 255, to mean 0 and standard deviation 1 per channel, as float32."""
        mean, std = self.statistics
        return pixels.float().sub(mean).div_(std)


def statistics(pixels: Tensor) -> Statistics:
    """Computes mean and standard deviation of each channel of ``uint8`` images ``(N, C, H, W)``.

    The standard deviation of a constant channel is 1.
    """
    values = torch.arange(256, dtype=torch.float64)
    means, stds = [], []
    # A histogram of the 256 values is exact and needs no float copy of all images.
    for channel in pixels.unbind(dim=1):
        counts = sum((torch.bincount(part.flatten(), minlength=256) for part in channel.split(1024)), torch.zeros(256))
        counts = counts.double()
        mean = (counts * values).sum() / counts.sum()
        variance = (counts * (values - mean) ** 2).sum() / (counts.sum() - 1).clamp(min=1)
        means.append(mean)
        stds.append(variance.sqrt() if variance > 0 else torch.ones_like(variance))
    return torch.stack(means).float().view(1, -1, 1, 1), torch.stack(stds).float().view(1, -1, 1, 1)
