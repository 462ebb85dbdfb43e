"""Builds the optimizer of a stage from the settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ds_al.config.optimizers import OptimizerConfig
from ds_al.config.precision import BF16Config
from ds_al.config.settings import Settings
from ds_al.errors import ALConfigError
from ds_al.layer import ALLayer
from ds_al.optim import muon
from ds_al.optim.local import Factory, LocalOptimizer, trained_parameters
from ds_al.optim.loss_scale import LayerScale
from ds_al.optim.masters import lower
from ds_al.optim.zero import Shards
from ds_al.parallel.replicas import Replicas


def local_optimizer(
    layers: Sequence[tuple[int, ALLayer]],
    *,
    settings: Settings,
    replicas: Replicas,
    given: Factory | None,
    by_config: Callable[[OptimizerConfig | None], Factory],
) -> LocalOptimizer:
    """Builds the optimizer of a stage's layers, and casts the layers to the precision of the settings.

    Args:
        layers: ``(index in the network, layer)``.
        settings: precision, ZeRO stage, clipping and optimizers.
        replicas: data parallel replicas of the stage.
        given: the user's callable of parameter groups, for f and b, and for g and h unless the config has
            ``autoencoder_optimizer``.
        by_config: returns a factory for an optimizer block of the config; for ``"optimizer"`` if it gets ``None``.
    """
    precision, al = settings.precision, settings.al
    shards = None
    if settings.zero_stage and replicas.count > 1:
        shards = Shards((p for _, layer in layers for p in trained_parameters(layer)), replicas)
    scales: dict[int, LayerScale] = {}
    if precision.is_low:
        for _, layer in layers:
            muon.tag_embeddings(layer)  # masters inherit the tags
        lower((layer for _, layer in layers), precision.dtype, owned=shards.owns if shards else _all)
        block = precision.block
        if not isinstance(block, BF16Config) or block.check_grad_overflow:
            scales = {index: LayerScale(index, precision) for index, _ in layers}
    associated = given or by_config(None)
    optimizer = LocalOptimizer(
        layers,
        associated=associated,
        autoencoder=by_config(al.autoencoder_optimizer) if al.autoencoder_optimizer else associated,
        clip=al.layer_gradient_clipping,
        scales=scales,
        shards=shards,
    )
    optimizer.round_masters()
    return optimizer


def check_instance(optimizer: torch.optim.Optimizer, settings: Settings) -> None:
    """Refuses an optimizer instance with mixed precision or ZeRO, which step masters or a part of the weights.

    Raises:
        ALConfigError: mixed precision or ZeRO is enabled.
    """
    if settings.precision.is_low or settings.zero_stage:
        raise ALConfigError(
            f"got an optimizer instance ({type(optimizer).__name__}) with "
            + ("mixed precision" if settings.precision.is_low else "ZeRO")
            + ", which steps masters or a part of the weights: give a callable of parameter groups"
        )


def _all(parameter: nn.Parameter) -> bool:
    return True
