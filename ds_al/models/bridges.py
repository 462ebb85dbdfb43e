"""Bridges of vision networks: auxiliary heads that map an activation ``(B, C, H, W)`` to a code ``(B, K)``.

    mimic      a narrow copy of the following stages, global average pooling, linear. Options:
                   width       channels of the copy, as a share of the stages' channels
                   pool_first  downsamples the map first by 2, which quarters the cost
                   pool        pooling of pool_first: maximum, or average, whose gradient reaches every position
                   depth       number of following stages to copy
                   residual    one strided residual block per stage instead of a convolution and pooling
                   depthwise   depthwise separable convolutions
                   muon        whether MuonAdamW updates the bridge's matrices by Muon, or all of it by AdamW (faster)
               No stage follows the last layer: its bridge is the twin's head
    published  flatten, linear 1000, sigmoid, linear 700, sigmoid

Their cost relative to the network is :attr:`ds_al.models.cost.NetworkCost.bridge_share`.
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


class CopiedStage(NamedTuple):
    """The properties of a network stage that a bridge copies.

    Attributes:
        channels: output channels.
        halvings: how many times the stage halves the map.
    """

    channels: int
    halvings: int


@dataclass(frozen=True)
class BridgeOptions:
    """Options of the bridges of a vision network; see the module docstring.

    Attributes:
        kind: ``"mimic"`` or ``"published"``.
        width, pool_first, pool, residual, depthwise, depth, muon: options of a mimic bridge; ``depth=None`` copies all
            stages, ``pool`` is ``"max"`` or ``"average"``.
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
    """A narrow copy of the following stages, then :class:`~ds_al.models.vision.Head`: ``(B, C, H, W) -> (B, K)``.

    Args:
        in_channels: C.
        later: the stages after this layer; empty for the last layer.
        options: options of the copy.
        norm: see :data:`~ds_al.models.vision.Norm`.
        code_width: K.
        code: set of codes, see :mod:`ds_al.models.targets`.
    """

    def __init__(
        self,
        in_channels: int,
        later: Sequence[CopiedStage],
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
                parameter.use_muon = False  # type: ignore[attr-defined]  # DeepSpeed's tag for no Muon


def _copy(in_channels: int, channels: int, stage: CopiedStage, *, norm: Norm, options: BridgeOptions) -> nn.Module:
    if options.residual:
        stride = 2**stage.halvings
        return ResidualBlock(in_channels, channels, stride=stride, norm=norm, depthwise=options.depthwise)
    return ConvBlock(in_channels, [channels, *["M"] * stage.halvings], norm=norm, depthwise=options.depthwise)


class PublishedBridge(nn.Sequential):
    """The bridge of the published experiments: two wide sigmoid layers on the flattened map ``(B, C, H, W)``."""

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
    later: Sequence[Sequence[CopiedStage]],
    *,
    options: BridgeOptions,
    norm: Norm = "batch",
    num_classes: int,
    code_width: int,
    code: str,
    objective: str | Mapping[str, Any],
) -> list[ALLayerSpec]:
    """Builds the specs of a vision network's AL layers: each f with its bridge and target side.

    Args:
        f: one spec per layer.
        shapes: output shape ``(C, H, W)`` of each layer.
        later: the stages after each layer.
        options: options of the bridges. Published bridges end with a sigmoid regardless of ``code``, so g and h do,
            too, and labels are decoded with mean squared error.
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
