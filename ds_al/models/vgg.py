"""VGG for small images, blocks of 3x3 convolutions, as AL layers and as backprop twin.

A network is a list of blocks; a block is a list of channel counts and ``"M"`` for a 2x2 max-pooling, as in the VGG
paper. Each block is one AL layer, unless ``num_layers`` groups neighbours. Bridges: :mod:`ds_al.models.bridges`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from deepspeed.pipe import LayerSpec

from ds_al.errors import ALConfigError
from ds_al.models.bridges import BridgeKind, BridgeOptions, CopiedStage, Pool, bridged_layers
from ds_al.models.grouping import Layers, block_groups
from ds_al.models.targets import default_code_width
from ds_al.models.vision import Block, ConvBlock, Head, PublishedHead, image_shape
from ds_al.spec import ALLayerSpec

SMALL: tuple[Block, ...] = ((32, "M"), (64, "M"), (128, "M"), (128, 128))
"""Four blocks for images of 28x28; with the default bridges, the first two and the last two take equal time."""
DEEP: tuple[Block, ...] = ((32, "M"), (48,), (48, "M"), (96,), (96, "M"), (192,), (192,), (192,))
"""Eight blocks for images of 32x32, so that 8 AL layers exist; with the recipe's bridges, they take similar times."""
PUBLISHED: tuple[Block, ...] = ((128, 256, "M"), (256, 512, "M"), (512, "M"), (512, "M"))
"""Four blocks for images of 32x32, from the published experiments."""


def vgg_al(
    *,
    in_shape: Sequence[int],
    num_classes: int,
    blocks: Sequence[Block] = SMALL,
    num_layers: Layers | None = None,
    early_pool: bool = True,
    bridge: BridgeKind = "mimic",
    bridge_width: float = 0.5,
    bridge_pool_first: bool = True,
    bridge_pool: Pool = "max",
    bridge_residual: bool = False,
    bridge_depthwise: bool = False,
    bridge_depth: int | None = None,
    bridge_muon: bool = True,
    bridge_hidden: int = 1000,
    code_width: int | None = None,
    code: str = "tanh",
    objective: str | Mapping[str, Any] = "mse",
) -> list[ALLayerSpec]:
    """Builds the layer specs of an AL VGG.

    Args:
        in_shape: ``(C, H, W)`` of an image.
        num_classes: V.
        blocks: the network.
        num_layers: number of AL layers, by default one per block; fewer layers group neighbouring blocks evenly. Or the
            number of blocks of each layer.
        early_pool: see :class:`~ds_al.models.vision.ConvBlock`; off in the published networks.
        bridge: ``"mimic"`` or ``"published"``.
        bridge_width, bridge_pool_first, bridge_pool, bridge_residual, bridge_depthwise, bridge_depth, bridge_muon:
            options of a mimic bridge, see :mod:`ds_al.models.bridges`; a stage is a block.
        bridge_hidden: width of the hidden layer of a published bridge, 1000 in the paper.
        code_width: K; 700 in the paper; by default see :func:`~ds_al.models.targets.default_code_width`.
        code: set of codes, see :mod:`ds_al.models.targets`. With a published bridge it is always sigmoid, and labels
            are decoded with mean squared error.
        objective: objective that trains f and b, see :mod:`ds_al.objectives`.

    Raises:
        ALConfigError: the blocks do not fit the images, or the number of layers or a bridge option is out of range.
    """
    shapes = _shapes(in_shape, blocks)
    groups = block_groups(len(blocks), num_layers)
    code_width = code_width or default_code_width(num_classes)
    options = BridgeOptions(
        kind=bridge,
        width=bridge_width,
        pool_first=bridge_pool_first,
        pool=bridge_pool,
        residual=bridge_residual,
        depthwise=bridge_depthwise,
        depth=bridge_depth,
        muon=bridge_muon,
        hidden=bridge_hidden,
    )
    stages = [CopiedStage(shapes[i + 1][0], sum(item == "M" for item in block)) for i, block in enumerate(blocks)]
    return bridged_layers(
        [_forward_spec(shapes[g.start][0], blocks, g, early_pool) for g in groups],
        [shapes[g.stop] for g in groups],
        [stages[g.stop :] for g in groups],
        options=options,
        num_classes=num_classes,
        code_width=code_width,
        code=code,
        objective=objective,
    )


def vgg_twin(
    *,
    in_shape: Sequence[int],
    num_classes: int,
    blocks: Sequence[Block] = SMALL,
    num_layers: Layers | None = None,
    early_pool: bool = True,
    head: Literal["average", "published"] = "average",
    head_hidden: int = 2500,
) -> list[LayerSpec]:
    """Builds the layer specs of the backprop twin: the same f, then a head that returns scores ``(B, V)``.

    Args:
        in_shape, num_classes, blocks, num_layers, early_pool: as in :func:`vgg_al`.
        head: ``"average"``, which is also that of the last mimic bridge, or ``"published"``.
        head_hidden: width of the published head's hidden layer.
    Raises:
        ALConfigError: as :func:`vgg_al`, or the head is unknown.
    """
    shapes = _shapes(in_shape, blocks)
    groups = block_groups(len(blocks), num_layers)
    layers = [_forward_spec(shapes[g.start][0], blocks, g, early_pool, travels=True) for g in groups]
    channels, height, width = shapes[-1]
    if head == "average":
        return [*layers, LayerSpec(Head, channels, num_classes)]
    if head == "published":
        return [*layers, LayerSpec(PublishedHead, channels * height * width, num_classes, hidden=head_hidden)]
    raise ALConfigError(f"got head={head!r}: expected 'average' or 'published'")


def _forward_spec(
    in_channels: int, blocks: Sequence[Block], group: range, early_pool: bool, *, travels: bool = False
) -> LayerSpec:
    items = [item for i in group for item in blocks[i]]
    return LayerSpec(ConvBlock, in_channels, items, early_pool=early_pool, travels=travels)


def _shapes(in_shape: Sequence[int], blocks: Sequence[Block]) -> list[tuple[int, int, int]]:
    """Returns ``(C, H, W)`` before each block and after the last one."""
    channels, height, width = image_shape(in_shape)
    shapes = [(channels, height, width)]
    for block in blocks:
        for item in block:
            if item == "M":
                height, width = -(-height // 2), -(-width // 2)
            elif isinstance(item, int) and item > 0:
                channels = item
            else:
                raise ALConfigError(f"got {item!r} in block {list(block)}: expected a channel count or 'M'")
        shapes.append((channels, height, width))
    return shapes
