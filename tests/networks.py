"""Small networks and batches for tests: one of each kind that the engine must train exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from deepspeed.runtime import utils as ds_utils
from torch import Tensor, nn

from ds_al.layer import ALLayer
from ds_al.spec import ALLayerSpec


@dataclass(frozen=True)
class Network:
    """Layer specs and a stream of micro-batches of 8 samples."""

    layers: Callable[[], list[ALLayerSpec]]
    make_input: Callable[[torch.Generator], Any]
    classes: int = 4

    def batches(self, count: int, *, size: int = 8) -> list[tuple[Any, Tensor]]:
        """The same ``count`` micro-batches at every call."""
        generator = torch.Generator().manual_seed(0)
        return [
            (self.make_input(generator), torch.randint(self.classes, (size,), generator=generator))
            for _ in range(count)
        ]

    def build(self, base_seed: int) -> list[ALLayer]:
        """All layers in this process, seeded as ``ALPipelineModule`` seeds them."""
        layers = []
        for index, spec in enumerate(self.layers()):
            ds_utils.set_random_seed(base_seed + index)
            layers.append(spec.build())
        return layers


class Block(nn.Sequential):
    """Linear, tanh, dropout."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(nn.Linear(width_in, width_out), nn.Tanh(), nn.Dropout(0.2))


def mlp_layers() -> list[ALLayerSpec]:
    """Four layers of width 16, codes of width 6."""
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


NETWORKS: dict[str, Network] = {
    "mlp": Network(mlp_layers, lambda generator: torch.randn(8, 12, generator=generator)),
}
