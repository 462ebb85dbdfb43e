"""The two networks that the measurements train, each in its AL form and as its backprop twin.

One layer per stage, so that all stages are equal and a stage costs the same whatever their number is.

    sleeping   f sleeps forward and backward: what takes time but no core, so stages never compete
    dense      f is Linear-ReLU-Linear-ReLU: what holds activations
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, nn

import ds_al
from ds_al.config import BLOCK
from ds_al.schedule import AL_SCHEDULES, BACKPROP_SCHEDULES

METHODS: tuple[str, ...] = (*AL_SCHEDULES, *BACKPROP_SCHEDULES)
CLASSES = 4


class _Sleep(torch.autograd.Function):
    """Adds a weight, and sleeps. The weight needs a gradient, so backward runs on the first stage, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return x + weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        time.sleep(ctx.seconds)
        return gradient, gradient.sum().view(1), None, None


class Sleeping(nn.Module):
    """A block that sleeps for ``forward`` seconds, and for ``backward`` seconds in the backward pass."""

    def __init__(self, *, forward: float, backward: float) -> None:
        super().__init__()
        self.seconds = forward, backward
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x`` plus a weight."""
        return _Sleep.apply(x, self.weight, *self.seconds)


class Dense(nn.Sequential):
    """Linear-ReLU-Linear-ReLU of one width."""

    def __init__(self, *, width: int) -> None:
        super().__init__(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())


def sleeping_engine(method: str, *, stages: int, forward: float, backward: float) -> Any:
    """An engine over sleeping layers; its micro-batches are ``(1, CLASSES)``."""
    block = partial(LayerSpec, Sleeping, forward=forward, backward=backward)
    return _engine(method, block, stages=stages, width=CLASSES, micro_batch=1)


def dense_engine(method: str, *, stages: int, width: int, micro_batch: int) -> Any:
    """An engine over dense layers; its micro-batches are ``(micro_batch, width)``."""
    return _engine(method, partial(LayerSpec, Dense, width=width), stages=stages, width=width, micro_batch=micro_batch)


def micro_batches(engine: Any, *, width: int = CLASSES) -> Iterator[tuple[Tensor, Tensor]]:
    """Zeros for ever, in tensors of their own, so that each micro-batch counts where memory is counted."""
    size = engine.train_micro_batch_size_per_gpu()
    while True:
        yield torch.zeros(size, width), torch.zeros(size, dtype=torch.int64)


def _engine(method: str, block: Callable[[], LayerSpec], *, stages: int, width: int, micro_batch: int) -> Any:
    model: PipelineModule
    if method in AL_SCHEDULES:
        codes = [CLASSES] * (stages + 1)
        model = ds_al.ALPipelineModule(
            [
                ds_al.ALLayerSpec(
                    f=block(),
                    b=LayerSpec(nn.Linear, width, codes[i + 1]),
                    g=LayerSpec(nn.Linear, codes[i], codes[i + 1]),
                    h=LayerSpec(nn.Linear, codes[i + 1], codes[i]),
                )
                for i in range(stages)
            ],
            num_classes=CLASSES,
        )
    else:
        model = PipelineModule(
            [block() for _ in range(stages)],
            num_stages=stages,
            loss_fn=nn.CrossEntropyLoss(),
            partition_method="uniform",
        )
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 1e-3}},
        "gradient_clipping": 0.0,  # DeepSpeed's default of 1.0 would make all stages agree on a norm
        "steps_per_print": None,
        BLOCK: {"method": method},
    }
    engine, *_ = ds_al.initialize(model=model, config=config)
    return engine
