"""Building blocks of networks for small images: convolutions, residual blocks, and heads.

Shapes: ``B`` batch, ``C`` channels, ``H`` and ``W`` height and width of a map, ``V`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ds_al.errors import ALConfigError
from ds_al.models.output import Output

Block = Sequence[int | str]
"""Channel counts of convolutions, and ``"M"`` for max-pooling."""
Norm = Literal["batch", "group"]
"""``"batch"`` as published; ``"group"`` does not depend on the other samples of a micro-batch."""

_CHANNEL_GROUPS = 8  # groups of a group norm, if they divide the channels


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """Builds the norm layer of a map with the given channels.

    Raises:
        ALConfigError: the name is neither ``"batch"`` nor ``"group"``.
    """
    check_norm(norm)
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(math.gcd(channels, _CHANNEL_GROUPS), channels)


def check_norm(norm: str) -> None:
    """Checks the name of a norm.

    Raises:
        ALConfigError: the name is neither ``"batch"`` nor ``"group"``.
    """
    if norm not in ("batch", "group"):
        raise ALConfigError(f"got norm={norm!r}: expected 'batch' or 'group'")


def convolution(in_channels: int, channels: int, *, stride: int = 1, depthwise: bool = False) -> list[nn.Module]:
    """Builds a 3x3 convolution without bias; ``depthwise``: one filter per channel, then a 1x1 convolution across
    channels."""
    if not depthwise:
        return [nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)]
    return [
        nn.Conv2d(in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels, bias=False),
        nn.Conv2d(in_channels, channels, 1, bias=False),
    ]


class ChannelsLast(nn.Sequential):
    """A sequence of modules on maps ``(B, C, H, W)`` in channels-last layout, several times faster on CPU.

    Attributes:
        runs_in_order: stages of a group may hold runs of the modules, see :func:`ds_al.partition.part.blocks`.
        travels: whether the output is contiguous, as DeepSpeed's pipeline sends it. An AL form sends maps, and bridges
            use them, in their own layout (:mod:`ds_al.tensors`).
    """

    runs_in_order = True
    travels = False

    def forward(self, x: Tensor) -> Tensor:
        """Runs the modules in order; a run of them that another one precedes takes maps as they are."""
        if "0" in self._modules:  # a run of the modules keeps their names
            x = x.to(memory_format=torch.channels_last)
        s = super().forward(x)
        return s.contiguous() if self.travels else s


class ConvBlock(ChannelsLast):
    """3x3 convolutions, each with norm and ReLU, and max-poolings: ``(B, C, H, W) -> (B, C', H', W')``.

    Args:
        in_channels: C.
        block: channel counts and poolings.
        early_pool: moves a pooling that follows a convolution before its norm and ReLU, with which it almost commutes;
            this quarters their work.
        norm: see :data:`Norm`.
        depthwise: see :func:`convolution`.
        travels: see :class:`ChannelsLast`.
    """

    def __init__(
        self,
        in_channels: int,
        block: Block,
        *,
        early_pool: bool = True,
        norm: Norm = "batch",
        depthwise: bool = False,
        travels: bool = False,
    ) -> None:
        layers: list[nn.Module] = []
        for item in block:
            if item == "M":
                # Odd maps keep their last row and column, so a map never vanishes.
                pool = nn.MaxPool2d(2, ceil_mode=True)
                layers.insert(len(layers) - 2 if early_pool and layers else len(layers), pool)
            else:
                channels = int(item)
                layers += [
                    *convolution(in_channels, channels, depthwise=depthwise),
                    norm_layer(norm, channels),
                    nn.ReLU(),
                ]
                in_channels = channels
        super().__init__(*layers)
        self.travels = travels


class Subsampled(nn.Conv2d):
    """A strided 1x1 convolution: ``(B, C, H, W) -> (B, C', H / stride, W / stride)``, rounded up.

    The map is subsampled first, and the convolution has stride 1. The result is the same, while oneDNN's strided one
    writes past its buffers on CPUs without AVX-512, for channels-last maps of fewer than 8 channels.
    """

    def __init__(self, in_channels: int, channels: int, *, stride: int) -> None:
        super().__init__(in_channels, channels, 1, bias=False)
        self.step = stride

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, C, H, W)`` to ``(B, C', H / stride, W / stride)``."""
        return super().forward(x[:, :, :: self.step, :: self.step])


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ``(B, C, H, W) -> (B, C', H / stride, W / stride)``, rounded up.

    Source: He et al., "Deep residual learning for image recognition", CVPR 2016, the block of ResNet-18.

    Args:
        in_channels: C.
        channels: C'.
        stride: stride of the first convolution and of the shortcut, which is a 1x1 convolution then.
        norm: see :data:`Norm`.
        depthwise: see :func:`convolution`.
    """

    def __init__(
        self, in_channels: int, channels: int, *, stride: int = 1, norm: Norm = "batch", depthwise: bool = False
    ) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *convolution(in_channels, channels, stride=stride, depthwise=depthwise),
            norm_layer(norm, channels),
            nn.ReLU(),
            *convolution(channels, channels, depthwise=depthwise),
            norm_layer(norm, channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(Subsampled(in_channels, channels, stride=stride), norm_layer(norm, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Computes ``relu(branch(x) + shortcut(x))``."""
        return torch.relu(self.branch(x) + self.shortcut(x))


class Head(nn.Sequential):
    """Global average pooling and a linear layer: ``(B, C, H, W) -> (B, V)``."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Output(in_channels, width))


class PublishedHead(nn.Sequential):
    """The published VGG twin's head: flatten, linear, sigmoid, linear: ``(B, C, H, W) -> (B, V)``."""

    def __init__(self, in_features: int, width: int, *, hidden: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(in_features, hidden), nn.Sigmoid(), Output(hidden, width))


def image_shape(in_shape: Sequence[int]) -> tuple[int, int, int]:
    """Returns ``(C, H, W)``.

    Raises:
        ALConfigError: ``in_shape`` does not have three sizes.
    """
    if len(in_shape) != 3:
        raise ALConfigError(f"got in_shape={tuple(in_shape)}: expected (C, H, W)")
    channels, height, width = in_shape
    return channels, height, width
