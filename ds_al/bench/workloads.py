"""The networks that the measurements train, each in its AL form and as its backprop twin.

    sleeping   f sleeps forward and backward: what takes time but no core, so stages never compete
    dense      f is Linear-ReLU-Linear-ReLU: what holds activations
    a model    a network of ds_al.models, small, on random data: real maths, and stages that are not equal

The first two have one layer per stage, so that all stages are equal and cost the same whatever their number is.
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
from ds_al.models import build_al, build_twin
from ds_al.schedule import AL_SCHEDULES, BACKPROP_SCHEDULES

IMAGE = (1, 28, 28)
TOKENS, VOCABULARY = 64, 2000
"""Length of a sequence, and number of different tokens."""

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


def model_engine(method: str, *, model: str, stages: int, micro_batch: int) -> Any:
    """An engine over a small network of :mod:`ds_al.models`, two AL layers per stage where it may have so many."""
    specs = build_al(model, **_options(model, stages)) if method in AL_SCHEDULES else None
    twin = build_twin(model, **_options(model, stages)) if specs is None else None
    return _initialize(method, specs=specs, twin=twin, stages=stages, micro_batch=micro_batch)


def model_batches(engine: Any, *, model: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Random samples and labels for ever."""
    size, generator = engine.train_micro_batch_size_per_gpu(), torch.Generator().manual_seed(0)
    while True:
        labels = torch.randint(CLASSES, (size,), generator=generator)
        if model in ("lstm", "transformer"):
            yield torch.randint(1, VOCABULARY, (size, TOKENS), generator=generator), labels
        else:
            yield torch.randn(size, *IMAGE, generator=generator), labels


def _options(model: str, stages: int) -> dict[str, Any]:
    if model in ("lstm", "transformer"):
        return {"vocab_size": VOCABULARY, "num_classes": CLASSES, "num_blocks": 2 * stages}
    if model == "mlp":
        return {"in_shape": IMAGE, "num_classes": CLASSES, "widths": (256,) * (2 * stages)}
    return {"in_shape": IMAGE, "num_classes": CLASSES}


def _engine(method: str, block: Callable[[], LayerSpec], *, stages: int, width: int, micro_batch: int) -> Any:
    if method not in AL_SCHEDULES:
        twin = [block() for _ in range(stages)]
        return _initialize(method, specs=None, twin=twin, stages=stages, micro_batch=micro_batch)
    codes = [CLASSES] * (stages + 1)
    specs = [
        ds_al.ALLayerSpec(
            f=block(),
            b=LayerSpec(nn.Linear, width, codes[i + 1]),
            g=LayerSpec(nn.Linear, codes[i], codes[i + 1]),
            h=LayerSpec(nn.Linear, codes[i + 1], codes[i]),
        )
        for i in range(stages)
    ]
    return _initialize(method, specs=specs, twin=None, stages=stages, micro_batch=micro_batch)


def _initialize(
    method: str,
    *,
    specs: list[ds_al.ALLayerSpec] | None,
    twin: list[LayerSpec] | None,
    stages: int,
    micro_batch: int,
) -> Any:
    model: PipelineModule
    if specs is not None:
        model = ds_al.ALPipelineModule(specs, num_classes=CLASSES)
    else:
        model = PipelineModule(
            twin,
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
