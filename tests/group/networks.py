"""Networks whose layers have several blocks, of every kind that the oracle trains, by their number of layers K."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from torch import nn

from ds_al.models import build_al
from ds_al.models.grouping import Chain, block_groups
from ds_al.spec import ALLayerSpec
from tests.support.blocks import (
    Checkpointing,
    Entering,
    Experts,
    Masking,
    Rectifying,
    Scaled,
    masked,
    masked_in_place,
    users_input,
)
from tests.support.networks import Block, Network, tokens

BLOCKS = 8
Layers = int | Sequence[int]
"""K, or the number of blocks of each layer."""

_IMAGES: dict[str, Any] = {"in_shape": (1, 8, 8), "num_classes": 4, "code_width": 6}
_TEXTS: dict[str, Any] = {"vocab_size": 20, "num_classes": 4, "code_width": 6, "dropout": 0.2, "num_blocks": BLOCKS}
MODELS: dict[str, dict[str, Any]] = {
    "vgg": {**_IMAGES, "blocks": ((4,), (4, "M"), (6,), (6, "M"), (6,), (8, "M"), (8,), (8,))},
    "resnet": {**_IMAGES, "widths": (4, 6, 6, 8), "bridge_pool_first": False},
    "transformer": {**_TEXTS, "width": 8, "heads": 2, "feed_forward": 12, "max_length": 7},
    "lstm": {**_TEXTS, "embedding_width": 6, "width": 5},
}
NAMES = ("mlp", *MODELS, "users", "recomputed")


def network(name: str, layers: Layers) -> Network:
    """A network of 8 blocks: ``mlp`` with dropout, the models, ``users``' blocks, which work in place, checkpoint
    themselves and branch on data, ``recomputed``, a Transformer for activation checkpointing, and ``decoded``, an MLP
    whose stages send copies of decoders."""
    if name == "mlp":
        return Network(partial(_mlp, layers), lambda generator, size: torch.randn(size, 12, generator=generator))
    if name == "decoded":
        sizes: dict[str, Any] = {"in_shape": (12,), "widths": (16,) * BLOCKS, "dropout": 0.2, "bridge_hidden": 8}
        objective = {"name": "decoded", "refresh_every": 3, "own_decoder": "live"}
        make = partial(build_al, "mlp", num_classes=4, code_width=6, objective=objective, num_layers=layers, **sizes)
        return Network(make, lambda generator, size: torch.randn(size, 12, generator=generator))
    if name == "users":
        return Network(partial(_users, layers), users_input, plain=partial(_users, layers, plain=True))
    name = "transformer" if name == "recomputed" else name
    options = MODELS[name]
    make_input = tokens if "vocab_size" in options else _images
    return Network(lambda: build_al(name, num_layers=layers, **options), make_input)


def _images(generator: torch.Generator, size: int) -> torch.Tensor:
    return torch.randn(size, 1, 8, 8, generator=generator)


def _mlp(layers: Layers) -> list[ALLayerSpec]:
    specs = [LayerSpec(Block, 16 if i else 12, 16) for i in range(BLOCKS)]
    return [
        ALLayerSpec(
            f=LayerSpec(Chain, specs[group.start : group.stop]),
            b=LayerSpec(Block, 16, 6),
            g=LayerSpec(nn.Linear, 6 if i else 4, 6),
            h=LayerSpec(nn.Linear, 6, 6 if i else 4),
        )
        for i, group in enumerate(block_groups(BLOCKS, layers))
    ]


def _users(layers: Layers, *, plain: bool = False) -> list[ALLayerSpec]:
    specs = [
        LayerSpec(Entering, plain=plain, reuses=False),  # a mask used again would be of a graph that is still alive
        *(LayerSpec(kind, plain=plain) for kind in (Masking, Rectifying, Checkpointing)),
        LayerSpec(Experts),
        *(LayerSpec(kind, plain=plain) for kind in (Rectifying, Checkpointing)),
        LayerSpec(Experts),
    ]
    return [
        ALLayerSpec(
            f=LayerSpec(Chain, specs[group.start : group.stop]),
            b=LayerSpec(Scaled, 16, 6, plain=plain),
            g=LayerSpec(Scaled, 6 if i else 4, 6, plain=plain),
            h=LayerSpec(Scaled, 6, 6 if i else 4, plain=plain),
            reduce=masked if plain else masked_in_place,
        )
        for i, group in enumerate(block_groups(BLOCKS, layers))
    ]
