"""Counts the operations and parameters of each network's AL form and twin, by K and bridge."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ds_al.experiment.recipes import RECIPES
from ds_al.models.cost import model_cost

_MIMIC: dict[str, dict[str, Any]] = {
    "mimic, defaults": {},
    "`bridge_width` 0.25": {"bridge_width": 0.25},
    "`bridge_width` 1": {"bridge_width": 1.0},
    "`bridge_pool_first` false": {"bridge_pool_first": False},
    "`bridge_pool_first` false, `bridge_width` 0.25": {"bridge_pool_first": False, "bridge_width": 0.25},
    "`bridge_depthwise`": {"bridge_depthwise": True},
    "`bridge_depthwise`, `bridge_pool_first` false": {"bridge_depthwise": True, "bridge_pool_first": False},
    "`bridge_depth` 1": {"bridge_depth": 1},
    "`bridge_depth` 0": {"bridge_depth": 0},
}
_VISION: dict[str, dict[str, dict[str, Any]]] = {
    "vgg": {**_MIMIC, "`bridge_residual`": {"bridge_residual": True}, "recipe": RECIPES["ours"]["vgg"]["al_options"]},
    "resnet": {
        **_MIMIC,
        "`bridge_residual` false": {"bridge_residual": False},
        "recipe": RECIPES["ours"]["resnet"]["al_options"],
    },
}
_PUBLISHED: dict[str, dict[str, Any]] = {'`"published"`': {}}
_TEXT: dict[str, dict[str, Any]] = {
    '`"linear"`': {},
    '`"block"`': {"bridge": "block"},
    '`"block"`, `bridge_stride` 4': {"bridge": "block", "bridge_stride": 4},
    '`"block"`, `bridge_stride` 1': {"bridge": "block", "bridge_stride": 1},
}
IMAGES: dict[str, Any] = {"in_shape": (3, 32, 32), "num_classes": 10}
TEXTS: dict[str, Any] = {"vocab_size": 30_000, "num_classes": 4}
LENGTH = 128


def cost_rows(*, samples: int = 64) -> Iterator[dict[str, Any]]:
    """Rows ``kind, network, preset, bridge, K, rho, bridge_share, twin_flops, parameters_f, parameters_bridges``.

    FLOPs are per sample, forward and backward; parameters are totals over all layers.

    Args:
        samples: size of the micro-batch for which operations are counted; results are per sample.
    """
    for network, bridges in _VISION.items():
        for preset, options in (("small", bridges), ("paper", _PUBLISHED)):
            yield from _rows("images", network, preset, options, (samples, *IMAGES["in_shape"]), torch.float32, IMAGES)
    for network in ("transformer", "lstm"):
        for preset in ("small", "paper"):
            yield from _rows("texts", network, preset, _TEXT, (samples, LENGTH), torch.int64, TEXTS)


def _rows(
    kind: str,
    network: str,
    preset: str,
    bridges: dict[str, dict[str, Any]],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    data: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    for bridge, options in bridges.items():
        for layers in (2, 4):
            cost = model_cost(network, shape=shape, dtype=dtype, preset=preset, num_layers=layers, **data, **options)
            parameters = cost.parameters()
            yield {
                "kind": kind,
                "network": network,
                "preset": preset,
                "bridge": bridge,
                "K": layers,
                "rho": cost.rho,
                "bridge_share": cost.bridge_share,
                "twin_flops": cost.flops()["twin"],
                "parameters_f": parameters["f"],
                "parameters_bridges": parameters["b"],
            }
