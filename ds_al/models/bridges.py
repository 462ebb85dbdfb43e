"""Bridges of vision networks: what an AL layer's map ``(B, C, H, W)`` says about the code ``(B, K)``.

    mimic      a narrow copy of the stages that follow, global average pooling, linear. Its options:
                   width       share of their channels that the copy has
                   pool_first  halves the map first: a quarter of the cost
                   pool        how: by the maximum, or by the average, which sends a gradient to all of the map
                   depth       copies the next so many stages alone
                   residual    a residual block per stage, strided like it, instead of a convolution and pooling
                   depthwise   convolutions one channel at a time, then across channels
                   muon        whether MuonAdamW takes its matrices by Muon, or all of it by AdamW, which is quicker
               The last layer has nothing to copy: its bridge is the twin's head
    published  flatten, linear 1000, sigmoid, linear 700, sigmoid

What they cost beside the network: :attr:`ds_al.models.cost.NetworkCost.bridge_share`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from deepspeed.pipe import LayerSpec
from torch import nn

from ds_al.errors import ALConfigError
from ds_al.models.output import Output
from ds_al.models.targets import code_end, target_side
from ds_al.models.vision import ChannelsLast, ConvBlock, Head, Norm, ResidualBlock
from ds_al.spec import ALLayerSpec

BridgeKind = Literal["mimic", "published"]
Pool = Literal["max", "average"]

_POOLS: dict[str, type[nn.Module]] = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}


class Stage(NamedTuple):
    """What a bridge copies of a part of the network.

    Attributes:
        channels: that leave it.
        halvings: how often it halves the map.
    """

    channels: int
    halvings: int


@dataclass(frozen=True)
class BridgeOptions:
    """How the bridges of a vision network are made; see the top of this file.

    Attributes:
        kind: ``"mimic"`` or ``"published"``.
        width, pool_first, pool, residual, depthwise, depth, muon: of a mimic bridge; ``depth`` is ``None`` for all
            stages, ``pool`` ``"max"`` or ``"average"``.
        hidden: width of a published bridge's hidden layer.

    Raises:
        ALConfigError: an option is unknown or out of range.
    """

    kind: BridgeKind = "mimic"
    width: float = 0.5
    pool_first: bool = True
    pool: Pool = "max"
    residual: bool = False
    depthwise: bool = False
    depth: int | None = None
    muon: bool = True
    hidden: int = 1000

    def __post_init__(self) -> None:
        if self.kind not in ("mimic", "published"):
            raise ALConfigError(f"got bridge={self.kind!r}: expected 'mimic' or 'published'")
        if self.pool not in _POOLS:
            raise ALConfigError(f"got bridge_pool={self.pool!r}: expected 'max' or 'average'")
        if not self.width > 0:
            raise ALConfigError(f"got bridge_width={self.width}: expected a share of channels above 0, such as 0.5")
        if self.depth is not None and self.depth < 0:
            raise ALConfigError(f"got bridge_depth={self.depth}: expected 0 or more stages, or null for all of them")


class MimicBridge(nn.Sequential):
    """A narrow copy of the stages that follow, then :class:`~ds_al.models.vision.Head`: ``(B, C, H, W) -> (B, K)``.

    Args:
        in_channels: C.
        later: the stages after this layer; none for the last layer.
        options: of the copy.
        norm: see :data:`~ds_al.models.vision.Norm`.
        code_width: K.
        code: where codes live, see :mod:`ds_al.models.targets`.
    """

    def __init__(
        self,
        in_channels: int,
        later: Sequence[Stage],
        *,
        options: BridgeOptions,
        norm: Norm = "batch",
        code_width: int,
        code: str,
    ) -> None:
        copies: list[nn.Module] = []
        for stage in later[: options.depth]:
            pool = [_POOLS[options.pool](2, ceil_mode=True)] if options.pool_first and not copies else []
            channels = max(1, round(stage.channels * options.width))
            copies.append(ChannelsLast(*pool, _copy(in_channels, channels, stage, norm=norm, options=options)))
            in_channels = channels
        super().__init__(*copies, Head(in_channels, code_width), code_end(code, code_width))
        if not options.muon:
            for parameter in self.parameters():
                parameter.use_muon = False  # type: ignore[attr-defined]  # as DeepSpeed tags what Muon leaves out


def _copy(in_channels: int, channels: int, stage: Stage, *, norm: Norm, options: BridgeOptions) -> nn.Module:
    if options.residual:
        stride = 2**stage.halvings
        return ResidualBlock(in_channels, channels, stride=stride, norm=norm, depthwise=options.depthwise)
    return ConvBlock(in_channels, [channels, *["M"] * stage.halvings], norm=norm, depthwise=options.depthwise)


class PublishedBridge(nn.Sequential):
    """The bridge of the published experiments: two wide sigmoid layers on the flat map ``(B, C, H, W)``."""

    def __init__(self, in_features: int, *, hidden: int, code_width: int) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(in_features, hidden),
            nn.Sigmoid(),
            Output(hidden, code_width),
            nn.Sigmoid(),
        )


def bridged_layers(
    f: Sequence[LayerSpec],
    shapes: Sequence[tuple[int, int, int]],
    later: Sequence[Sequence[Stage]],
    *,
    options: BridgeOptions,
    norm: Norm = "batch",
    num_classes: int,
    code_width: int,
    code: str,
    objective: str | Mapping[str, Any],
) -> list[ALLayerSpec]:
    """Specs of a vision network's AL layers: each f with its bridge and its target side.

    Args:
        f: of each layer.
        shapes: ``(C, H, W)`` that leaves each layer.
        later: the stages after each layer.
        options: of the bridges. The published ones end on a sigmoid, whatever ``code`` says, so g and h do, too,
            and labels are read by mean squared error.
        norm: see :class:`MimicBridge`.
        num_classes, code_width, code, objective: see :func:`~ds_al.models.targets.target_side`.
    """
    published = options.kind == "published"
    side = target_side(
        len(f),
        num_classes=num_classes,
        code_width=code_width,
        code="sigmoid" if published else code,
        cross_entropy=not published,
        objective=objective,
    )
    layers = []
    for i, (channels, height, width) in enumerate(shapes):
        if published:
            features = channels * height * width
            b = LayerSpec(PublishedBridge, features, hidden=options.hidden, code_width=code_width)
        else:
            copied = list(later[i])
            b = LayerSpec(MimicBridge, channels, copied, options=options, norm=norm, code_width=code_width, code=code)
        layers.append(ALLayerSpec(f=f[i], b=b, **side[i]))
    return layers
