"""VGG for small images: blocks of 3x3 convolutions, once as associated learning, once as its backprop twin.

A network is a list of blocks, a block a list of channel counts and ``"M"`` for a 2x2 max-pooling, as in the
VGG paper. Each block is one AL layer, unless ``num_layers`` merges neighbours. Bridges:

    mimic      a narrow copy of what follows: [pool,] one 3x3 convolution per later block with its pooling,
               global average pooling, linear. The last layer's is the twin's head: average, linear
    published  flatten, linear 1000, sigmoid, linear 700, sigmoid
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ds_al.errors import ALConfigError
from ds_al.models.targets import code_end, target_side
from ds_al.spec import ALLayerSpec

Block = Sequence[int | str]
"""Channel counts of convolutions, and ``"M"`` for max-pooling."""

SMALL: tuple[Block, ...] = ((32, "M"), (64, "M"), (128, "M"), (128, 128))
"""Four blocks for images of 28x28; with their default bridges, two and two take the same time."""
PUBLISHED: tuple[Block, ...] = ((128, 256, "M"), (256, 512, "M"), (512, "M"), (512, "M"))
"""Four blocks for images of 32x32, from the published experiments."""


class ConvBlock(nn.Sequential):
    """3x3 convolutions, each with batch norm and ReLU, and max-poolings: ``(B, C, H, W) -> (B, C', H', W')``.

    Args:
        in_channels: C.
        block: what stands in the block.
        early_pool: takes a pooling that follows a convolution ahead of its batch norm and ReLU, with which it
            all but commutes: these then have a quarter of the work.
    """

    def __init__(self, in_channels: int, block: Block, *, early_pool: bool = True) -> None:
        layers: list[nn.Module] = []
        for item in block:
            if item == "M":
                # Odd maps keep their last row and column, so a map never vanishes.
                pool = nn.MaxPool2d(2, ceil_mode=True)
                layers.insert(len(layers) - 2 if early_pool and layers else len(layers), pool)
            else:
                layers += [
                    nn.Conv2d(in_channels, int(item), 3, padding=1, bias=False),
                    nn.BatchNorm2d(int(item)),
                    nn.ReLU(),
                ]
                in_channels = int(item)
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Computes with channels last, which is several times quicker on CPU; returns a contiguous map."""
        return super().forward(x.to(memory_format=torch.channels_last)).contiguous()


class Head(nn.Sequential):
    """Global average pooling and a linear layer: ``(B, C, H, W) -> (B, V)``."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, width))


class MimicBridge(nn.Sequential):
    """A narrow copy of the blocks that follow, then :class:`Head`: ``(B, C, H, W) -> (B, K)``.

    Args:
        in_channels: C.
        later: the blocks after this layer; none for the last layer.
        width: share of their channels that the copy has.
        pool_first: halves the map before the first convolution: a quarter of the cost.
        code_width: K.
        code: where codes live, see :mod:`ds_al.models.targets`.
    """

    def __init__(
        self,
        in_channels: int,
        later: Sequence[Block],
        *,
        width: float,
        pool_first: bool,
        code_width: int,
        code: str,
    ) -> None:
        layers: list[nn.Module] = []
        for k, block in enumerate(later):
            channels = max(1, round(_channels_out(block, in_channels) * width))
            items: Block = (channels, *(item for item in block if item == "M"))
            layers.append(ConvBlock(in_channels, ("M", *items) if pool_first and k == 0 else items))
            in_channels = channels
        super().__init__(*layers, Head(in_channels, code_width), code_end(code, code_width))


class PublishedBridge(nn.Sequential):
    """The bridge of the published experiments: two wide sigmoid layers on the flat map ``(B, C, H, W)``."""

    def __init__(self, in_features: int, *, hidden: int, code_width: int) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(in_features, hidden),
            nn.Sigmoid(),
            nn.Linear(hidden, code_width),
            nn.Sigmoid(),
        )


class PublishedHead(nn.Sequential):
    """The published twin's head: flatten, linear, sigmoid, linear: ``(B, C, H, W) -> (B, V)``."""

    def __init__(self, in_features: int, width: int, *, hidden: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(in_features, hidden), nn.Sigmoid(), nn.Linear(hidden, width))


def vgg_al(
    *,
    in_shape: Sequence[int],
    num_classes: int,
    blocks: Sequence[Block] = SMALL,
    num_layers: int | None = None,
    early_pool: bool = True,
    bridge: Literal["mimic", "published"] = "mimic",
    bridge_width: float = 0.5,
    bridge_pool_first: bool = True,
    bridge_hidden: int = 1000,
    code_width: int = 64,
    code: str = "tanh",
    objective: str | Mapping[str, Any] = "mse",
) -> list[ALLayerSpec]:
    """Specs of a VGG that learns by association.

    Args:
        in_shape: ``(C, H, W)`` of an image.
        num_classes: V.
        blocks: the network.
        num_layers: N; by default one AL layer per block. Fewer merge neighbouring blocks, evenly.
        early_pool: see :class:`ConvBlock`; off in the published networks.
        bridge: ``"mimic"`` or ``"published"``.
        bridge_width, bridge_pool_first: of a mimic bridge, see :class:`MimicBridge`.
        bridge_hidden: width of the hidden layer of a published bridge, 1000 in the paper.
        code_width: K; 700 in the paper.
        code: where codes live. The published bridge ends on a sigmoid, whatever this says, and reads labels
            by mean squared error.
        objective: what trains f and b, see :mod:`ds_al.objectives`.

    Raises:
        ALConfigError: the blocks do not fit the images, the number of layers or the bridge is unknown.
    """
    shapes = _shapes(in_shape, blocks)
    groups = _merge(blocks, num_layers)
    if bridge not in ("mimic", "published"):
        raise ALConfigError(f"got bridge={bridge!r}: expected 'mimic' or 'published'")
    published = bridge == "published"
    side = target_side(
        len(groups),
        num_classes=num_classes,
        code_width=code_width,
        code="sigmoid" if published else code,
        cross_entropy=not published,
        objective=objective,
    )
    layers = []
    for i, group in enumerate(groups):
        channels_in = shapes[group.start][0]
        channels, height, width = shapes[group.stop]
        if published:
            b = LayerSpec(PublishedBridge, channels * height * width, hidden=bridge_hidden, code_width=code_width)
        else:
            b = LayerSpec(
                MimicBridge,
                channels,
                blocks[group.stop :],
                width=bridge_width,
                pool_first=bridge_pool_first,
                code_width=code_width,
                code=code,
            )
        layers.append(ALLayerSpec(f=_forward_spec(channels_in, blocks, group, early_pool), b=b, **side[i]))
    return layers


def vgg_twin(
    *,
    in_shape: Sequence[int],
    num_classes: int,
    blocks: Sequence[Block] = SMALL,
    num_layers: int | None = None,
    early_pool: bool = True,
    head: Literal["average", "published"] = "average",
    head_hidden: int = 2500,
) -> list[LayerSpec]:
    """Specs of the backprop twin: the very same f, then a head. Its output are scores ``(B, V)``.

    Args:
        in_shape, num_classes, blocks, num_layers, early_pool: as in :func:`vgg_al`.
        head: ``"average"``, which the last mimic bridge has too, or ``"published"``.
        head_hidden: width of the published head's hidden layer.

    Raises:
        ALConfigError: as :func:`vgg_al`, or the head is unknown.
    """
    shapes = _shapes(in_shape, blocks)
    layers = [_forward_spec(shapes[g.start][0], blocks, g, early_pool) for g in _merge(blocks, num_layers)]
    channels, height, width = shapes[-1]
    if head == "average":
        return [*layers, LayerSpec(Head, channels, num_classes)]
    if head == "published":
        return [*layers, LayerSpec(PublishedHead, channels * height * width, num_classes, hidden=head_hidden)]
    raise ALConfigError(f"got head={head!r}: expected 'average' or 'published'")


def _forward_spec(in_channels: int, blocks: Sequence[Block], group: range, early_pool: bool) -> LayerSpec:
    items = [item for i in group for item in blocks[i]]
    return LayerSpec(ConvBlock, in_channels, items, early_pool=early_pool)


def _merge(blocks: Sequence[Block], num_layers: int | None) -> list[range]:
    """Which blocks each AL layer holds."""
    count = len(blocks) if num_layers is None else num_layers
    if not 1 <= count <= len(blocks):
        raise ALConfigError(f"got num_layers={num_layers}: expected 1..{len(blocks)}, the number of blocks")
    bounds = [len(blocks) * i // count for i in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _shapes(in_shape: Sequence[int], blocks: Sequence[Block]) -> list[tuple[int, int, int]]:
    """``(C, H, W)`` before each block, and after the last one."""
    if len(in_shape) != 3:
        raise ALConfigError(f"got in_shape={tuple(in_shape)}: expected (C, H, W)")
    channels, height, width = in_shape
    shapes = [(channels, height, width)]
    for block in blocks:
        for item in block:
            if item == "M":
                height, width = -(-height // 2), -(-width // 2)
            elif not isinstance(item, int) or item < 1:
                raise ALConfigError(f"got {item!r} in block {list(block)}: expected a channel count or 'M'")
        channels = _channels_out(block, channels)
        shapes.append((channels, height, width))
    return shapes


def _channels_out(block: Block, in_channels: int) -> int:
    return next((int(item) for item in reversed(block) if item != "M"), in_channels)
