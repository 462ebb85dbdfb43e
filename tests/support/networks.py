"""Small networks and batches for tests: one of each kind that the engine must train exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from deepspeed.runtime import utils as ds_utils
from torch import Tensor, nn

from ds_al.layer import ALLayer
from ds_al.models import build_al
from ds_al.spec import ALLayerSpec
from tests.support.blocks import users_input, users_layers


@dataclass(frozen=True)
class Network:
    """Layer specs and a stream of micro-batches."""

    layers: Callable[[], list[ALLayerSpec]]
    make_input: Callable[[torch.Generator, int], Any]
    """``(generator, samples) -> x``"""
    classes: int = 4
    plain: Callable[[], list[ALLayerSpec]] | None = None
    """The same layers in the form that the plain loop can run, where users' blocks need an engine."""

    def batches(self, count: int, *, size: int = 8, seed: int = 0, device: str = "cpu") -> list[tuple[Any, Tensor]]:
        """The same ``count`` micro-batches at every call."""
        generator = torch.Generator().manual_seed(seed)
        made = [
            (self.make_input(generator, size), torch.randint(self.classes, (size,), generator=generator))
            for _ in range(count)
        ]
        return [(_to(device, x), labels.to(device)) for x, labels in made]

    def build(self, base_seed: int, *, device: str = "cpu") -> list[ALLayer]:
        """All layers in this process, seeded as ``ALPipelineModule`` seeds them."""
        layers = []
        for index, spec in enumerate((self.plain or self.layers)()):
            ds_utils.set_random_seed(base_seed + index)
            layers.append(spec.build().to(device))
        return layers


def _to(device: torch.device | str, x: Any) -> Any:
    return tuple(part.to(device) for part in x) if isinstance(x, tuple) else x.to(device)


class Block(nn.Sequential):
    """Linear, tanh, dropout."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(nn.Linear(width_in, width_out), nn.Tanh(), nn.Dropout(0.2))


def mlp_layers() -> list[ALLayerSpec]:
    """Four layers of width 16, codes of width 6; dropout in f and b."""
    widths, codes = [12, 16, 16, 16, 16], [4, 6, 6, 6, 6]
    return [
        ALLayerSpec(
            f=LayerSpec(Block, widths[i], widths[i + 1]),
            b=LayerSpec(Block, widths[i + 1], codes[i + 1]),
            g=LayerSpec(nn.Linear, codes[i], codes[i + 1]),
            h=LayerSpec(nn.Linear, codes[i + 1], codes[i]),
            autoencoder_loss="cross_entropy" if i == 0 else "mse",
        )
        for i in range(4)
    ]


def vgg_layers() -> list[ALLayerSpec]:
    """Four convolutions with batch norm, two of them with pooling."""
    return build_al("vgg", in_shape=(1, 8, 8), num_classes=4, blocks=((4, "M"), (6, "M"), (8,), (8,)), code_width=6)


def resnet_layers() -> list[ALLayerSpec]:
    """Four residual blocks in two stages, a layer each; residual bridges."""
    return build_al(
        "resnet", in_shape=(1, 8, 8), num_classes=4, widths=(4, 6), num_layers=4, bridge_pool_first=False, code_width=6
    )


def transformer_layers() -> list[ALLayerSpec]:
    """An embedding and three encoder layers with dropout; the mask travels along."""
    return build_al(
        "transformer",
        vocab_size=20,
        num_classes=4,
        width=8,
        heads=2,
        feed_forward=12,
        dropout=0.2,
        max_length=7,
        code_width=6,
    )


def lstm_layers() -> list[ALLayerSpec]:
    """An embedding and three bidirectional LSTMs, each of which starts from its predecessor's state."""
    return build_al("lstm", vocab_size=20, num_classes=4, embedding_width=6, width=5, dropout=0.2, code_width=6)


def tokens(generator: torch.Generator, size: int, *, length: int = 7) -> Tensor:
    """Token ids ``(size, length)`` with padding 0 at the end of each sequence."""
    ids = torch.randint(1, 20, (size, length), generator=generator)
    lengths = torch.randint(1, length + 1, (size, 1), generator=generator)
    return ids.masked_fill(torch.arange(length) >= lengths, 0)


NETWORKS: dict[str, Network] = {
    "mlp": Network(mlp_layers, lambda generator, size: torch.randn(size, 12, generator=generator)),
    "vgg": Network(vgg_layers, lambda generator, size: torch.randn(size, 1, 8, 8, generator=generator)),
    "resnet": Network(resnet_layers, lambda generator, size: torch.randn(size, 1, 8, 8, generator=generator)),
    "transformer": Network(transformer_layers, tokens),
    "lstm": Network(lstm_layers, tokens),
    "users": Network(users_layers, users_input, plain=partial(users_layers, plain=True)),
}
