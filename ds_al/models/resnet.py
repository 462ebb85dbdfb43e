"""ResNet for small images, as AL layers and as backprop twin.

A stem (a 3x3 convolution without pooling) is followed by stages of residual blocks; every stage but the first halves
the map. Two blocks in each of four stages are ResNet-18 (He et al., CVPR 2016) in the form used for images of 32x32.

The stem is one small convolution, so it belongs to the layer of the first residual block: ResNet-18 has eight blocks to
group into AL layers. With 4 layers (the default) each layer is a stage; with 2 layers, each is two stages. Bridges copy
one block per following stage, complete or partial: :mod:`ds_al.models.bridges`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from deepspeed.pipe import LayerSpec
from torch import nn

from ds_al.errors import ALConfigError
from ds_al.models.bridges import BridgeKind, BridgeOptions, CopiedStage, Pool, bridged_layers
from ds_al.models.grouping import Layers, block_groups
from ds_al.models.targets import default_code_width
from ds_al.models.vision import (
    ChannelsLast,
    Head,
    Norm,
    PublishedHead,
    ResidualBlock,
    check_norm,
    convolution,
    image_shape,
    norm_layer,
)
from ds_al.spec import ALLayerSpec

SMALL: tuple[int, ...] = (16, 32, 64, 128)
"""Channels of four stages of about equal cost."""
PUBLISHED: tuple[int, ...] = (64, 128, 256, 512)
"""Channels of the four stages of ResNet-18."""


class BlockPlan(NamedTuple):
    """One residual block of a network.

    Attributes:
        stage: index of its stage.
        in_channels: input channels.
        channels: output channels.
        stride: 2 if it halves the map.
    """

    stage: int
    in_channels: int
    channels: int
    stride: int


class ResidualBlocks(ChannelsLast):
    """A sequence of residual blocks: ``(B, C, H, W) -> (B, C', H', W')``.

    Args:
        plans: the blocks.
        stem: image channels, if the stem precedes the blocks.
        norm: see :data:`~ds_al.models.vision.Norm`.
        travels: see :class:`~ds_al.models.vision.ChannelsLast`.
    """

    def __init__(
        self, plans: Sequence[BlockPlan], *, stem: int | None = None, norm: Norm = "batch", travels: bool = False
    ) -> None:
        layers: list[nn.Module] = []
        if stem is not None:
            width = plans[0].in_channels
            layers += [*convolution(stem, width), norm_layer(norm, width), nn.ReLU()]
        layers += [ResidualBlock(plan.in_channels, plan.channels, stride=plan.stride, norm=norm) for plan in plans]
        super().__init__(*layers)
        self.travels = travels


def resnet_al(
    *,
    in_shape: Sequence[int],
    num_classes: int,
    widths: Sequence[int] = SMALL,
    blocks_per_stage: int = 2,
    num_layers: Layers | None = None,
    norm: Norm = "batch",
    bridge: BridgeKind = "mimic",
    bridge_width: float = 0.5,
    bridge_pool_first: bool = True,
    bridge_pool: Pool = "max",
    bridge_residual: bool = True,
    bridge_depthwise: bool = False,
    bridge_depth: int | None = None,
    bridge_muon: bool = True,
    bridge_hidden: int = 1000,
    code_width: int | None = None,
    code: str = "tanh",
    objective: str | Mapping[str, Any] = "mse",
) -> list[ALLayerSpec]:
    """Builds the layer specs of an AL ResNet.

    Args:
        in_shape: ``(C, H, W)`` of an image.
        num_classes: V.
        widths: channels of each stage.
        blocks_per_stage: residual blocks of each stage.
        num_layers: number of AL layers, at most the number of blocks; by default one per stage. Neighbouring blocks are
            grouped evenly, the stem with the first of them. Or the number of blocks of each layer.
        norm: ``"batch"`` as published, or ``"group"``; applies to bridges, too.
        bridge: ``"mimic"`` or ``"published"``.
        bridge_width, bridge_pool_first, bridge_pool, bridge_residual, bridge_depthwise, bridge_depth, bridge_muon:
            options of a mimic bridge, see :mod:`ds_al.models.bridges`.
        bridge_hidden: width of the hidden layer of a published bridge, 1000 in the paper.
        code_width: K; 700 in the paper; by default see :func:`~ds_al.models.targets.default_code_width`.
        code: set of codes, see :mod:`ds_al.models.targets`. With a published bridge it is always sigmoid, and labels
            are decoded with mean squared error.
        objective: objective that trains f and b, see :mod:`ds_al.objectives`.
    Raises:
        ALConfigError: sizes, norm, number of layers or an option of the bridge are out of range.
    """
    plans = _plans(widths, blocks_per_stage, norm)
    shapes = _shapes(in_shape, plans)
    groups = block_groups(len(plans), num_layers, default=len(widths))
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
    return bridged_layers(
        _forward_specs(in_shape, plans, groups, norm),
        [shapes[g.stop] for g in groups],
        [_later(plans[g.stop :]) for g in groups],
        options=options,
        norm=norm,
        num_classes=num_classes,
        code_width=code_width,
        code=code,
        objective=objective,
    )


def resnet_twin(
    *,
    in_shape: Sequence[int],
    num_classes: int,
    widths: Sequence[int] = SMALL,
    blocks_per_stage: int = 2,
    num_layers: Layers | None = None,
    norm: Norm = "batch",
    head: Literal["average", "published"] = "average",
    head_hidden: int = 2500,
) -> list[LayerSpec]:
    """Builds the layer specs of the backprop twin: the same f, then a head that returns scores ``(B, V)``.

    Args:
        in_shape, num_classes, widths, blocks_per_stage, num_layers, norm: as in :func:`resnet_al`.
        head: ``"average"``, ResNet's own, which is also that of the last mimic bridge; or ``"published"``, that of the
            VGG.
        head_hidden: width of the published head's hidden layer.
    Raises:
        ALConfigError: as :func:`resnet_al`, or the head is unknown.
    """
    plans = _plans(widths, blocks_per_stage, norm)
    groups = block_groups(len(plans), num_layers, default=len(widths))
    f = _forward_specs(in_shape, plans, groups, norm, travels=True)
    channels, height, width = _shapes(in_shape, plans)[-1]
    if head == "average":
        return [*f, LayerSpec(Head, channels, num_classes)]
    if head == "published":
        return [*f, LayerSpec(PublishedHead, channels * height * width, num_classes, hidden=head_hidden)]
    raise ALConfigError(f"got head={head!r}: expected 'average' or 'published'")


def _plans(widths: Sequence[int], blocks_per_stage: int, norm: str) -> list[BlockPlan]:
    if not widths or min(widths) < 1:
        raise ALConfigError(f"got widths={tuple(widths)}: expected the channels of at least one stage, each above 0")
    if blocks_per_stage < 1:
        raise ALConfigError(f"got blocks_per_stage={blocks_per_stage}: expected 1 or more")
    check_norm(norm)
    plans, channels = [], widths[0]
    for stage, width in enumerate(widths):
        for number in range(blocks_per_stage):
            plans.append(BlockPlan(stage, channels, width, stride=2 if stage and not number else 1))
            channels = width
    return plans


def _shapes(in_shape: Sequence[int], plans: Sequence[BlockPlan]) -> list[tuple[int, int, int]]:
    """Returns ``(C, H, W)`` of the images and after each block."""
    shapes = [image_shape(in_shape)]
    for plan in plans:
        _, height, width = shapes[-1]
        shapes.append((plan.channels, -(-height // plan.stride), -(-width // plan.stride)))
    return shapes


def _later(plans: Sequence[BlockPlan]) -> list[CopiedStage]:
    """Returns the stages that a bridge copies, one per stage of the following blocks, even if its first blocks precede
    the bridge."""
    stages: dict[int, CopiedStage] = {}
    for plan in plans:
        halvings = stages[plan.stage].halvings if plan.stage in stages else 0
        stages[plan.stage] = CopiedStage(plan.channels, halvings + (plan.stride == 2))
    return list(stages.values())


def _forward_specs(
    in_shape: Sequence[int], plans: Sequence[BlockPlan], groups: Sequence[range], norm: Norm, *, travels: bool = False
) -> list[LayerSpec]:
    images = image_shape(in_shape)[0]
    return [
        LayerSpec(
            ResidualBlocks,
            list(plans[g.start : g.stop]),
            stem=None if g.start else images,
            norm=norm,
            travels=travels,
        )
        for g in groups
    ]
