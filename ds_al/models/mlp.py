"""Multilayer perceptron with ReLU, as AL layers and as backprop twin."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from deepspeed.pipe import LayerSpec
from torch import nn

from ds_al.errors import ALConfigError
from ds_al.models.grouping import Layers, block_groups, chain_specs
from ds_al.models.output import Output
from ds_al.models.targets import code_end, default_code_width, target_side
from ds_al.spec import ALLayerSpec

SMALL: tuple[int, ...] = (256, 256, 256, 256)
"""Widths of four hidden layers."""


class DenseBlock(nn.Sequential):
    """Flatten, linear, ReLU, dropout: ``(B, ...) -> (B, D)``."""

    def __init__(self, in_features: int, width: int, *, dropout: float = 0.0) -> None:
        super().__init__(nn.Flatten(), nn.Linear(in_features, width), nn.ReLU(), nn.Dropout(dropout))


class DenseBridge(nn.Sequential):
    """Linear, ReLU, linear, end of code: ``(B, D) -> (B, K)``. With ``hidden=0``, only the last linear layer."""

    def __init__(self, in_features: int, *, hidden: int, code_width: int, code: str) -> None:
        layers = [nn.Linear(in_features, hidden), nn.ReLU()] if hidden else []
        super().__init__(*layers, Output(hidden or in_features, code_width), code_end(code, code_width))


def mlp_al(
    *,
    in_shape: Sequence[int],
    num_classes: int,
    widths: Sequence[int] = SMALL,
    num_layers: Layers | None = None,
    dropout: float = 0.0,
    bridge_hidden: int = 64,
    code_width: int | None = None,
    code: str = "tanh",
    objective: str | Mapping[str, Any] = "mse",
) -> list[ALLayerSpec]:
    """Builds the layer specs of an AL perceptron.

    Args:
        in_shape: shape of a sample, without the batch dimension; samples are flattened.
        num_classes: V.
        widths: D of each hidden layer.
        num_layers: number of AL layers, by default one per hidden layer; fewer layers group neighbours evenly. Or the
            number of hidden layers of each.
        dropout: dropout after each hidden layer.
        bridge_hidden: width of the bridge's hidden layer; 0 omits it.
        code_width: K; by default see :func:`~ds_al.models.targets.default_code_width`.
        code: set of codes, see :mod:`ds_al.models.targets`.
        objective: objective that trains f and b, see :mod:`ds_al.objectives`.
    Raises:
        ALConfigError: no hidden layer, the number of layers is out of range, or the code is unknown.
    """
    blocks = _block_specs(in_shape, widths, dropout)
    groups = block_groups(len(widths), num_layers)
    code_width = code_width or default_code_width(num_classes)
    side = target_side(len(groups), num_classes=num_classes, code_width=code_width, code=code, objective=objective)
    layers = []
    for i, f in enumerate(chain_specs(blocks, groups)):
        width = widths[groups[i].stop - 1]
        b = LayerSpec(DenseBridge, width, hidden=bridge_hidden, code_width=code_width, code=code)
        layers.append(ALLayerSpec(f=f, b=b, **side[i]))
    return layers


def mlp_twin(
    *,
    in_shape: Sequence[int],
    num_classes: int,
    widths: Sequence[int] = SMALL,
    num_layers: Layers | None = None,
    dropout: float = 0.0,
) -> list[LayerSpec]:
    """Builds the layer specs of the backprop twin: the same f, then a linear head that returns scores ``(B, V)``.

    Args:
        in_shape, num_classes, widths, num_layers, dropout: as in :func:`mlp_al`.

    Raises:
        ALConfigError: no hidden layer, or the number of layers is out of range.
    """
    f = chain_specs(_block_specs(in_shape, widths, dropout), block_groups(len(widths), num_layers))
    return [*f, LayerSpec(Output, widths[-1], num_classes)]


def _block_specs(in_shape: Sequence[int], widths: Sequence[int], dropout: float) -> list[LayerSpec]:
    if not widths:
        raise ALConfigError("got widths=(): expected the width of at least one hidden layer")
    return [
        LayerSpec(DenseBlock, width_in, width_out, dropout=dropout)
        for width_in, width_out in pairwise([math.prod(in_shape), *widths])
    ]
