"""Networks for the measurements, each in its AL form and as its backprop twin.

    sleeping   f sleeps in forward and backward: it takes time but no core, so stages never compete for cores
    dense      f is Linear-ReLU-Linear-ReLU: it holds activations
    a model    a small network of ds_al.models on random data: real computation, unequal stages

The first two have one layer per stage by default, so all stages are equal and their cost does not depend on their
number. With ``bp_dp`` every rank holds the whole twin (:mod:`ds_al.baseline.data_parallel`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, nn

import ds_al
from ds_al.baseline import build, data_parallel
from ds_al.baseline.schedules import BACKPROP_SCHEDULES
from ds_al.baseline.twin import TwinModule
from ds_al.compute.split import weight_queue
from ds_al.config.base import BLOCK
from ds_al.models import build_al, build_twin
from ds_al.schedule import AL_SCHEDULES

IMAGE = (1, 28, 28)
TOKENS, VOCABULARY = 64, 2000
"""Sequence length and vocabulary size."""

TEXTS = ("lstm", "transformer")
"""Networks of texts."""

METHODS: tuple[str, ...] = (*AL_SCHEDULES, *BACKPROP_SCHEDULES)
"""Methods with a pipeline schedule of ours, or of every supported DeepSpeed."""
RECORDED: tuple[str, ...] = (*METHODS, build.DUALPIPEV)
"""Methods whose pipelines can be recorded; the last one's schedule is DeepSpeed's own."""
SGD: Mapping[str, Any] = {"type": "SGD", "params": {"lr": 1e-3}}
ADAMW: Mapping[str, Any] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
CLASSES = 4


class Graphs:
    """Number of graphs of sleeping blocks that are alive in this process, and the most there were."""

    def __init__(self) -> None:
        self.alive = self.peak = 0

    def add(self, number: int) -> None:
        """Counts graphs that begin, or that have all gradients."""
        self.alive += number
        self.peak = max(self.peak, self.alive)

    def take_peak(self) -> int:
        """Returns the peak since the last call."""
        peak, self.peak = self.peak, self.alive
        return peak


GRAPHS = Graphs()


class _Sleep(torch.autograd.Function):
    """Adds a weight and sleeps; half of the backward pass is for the weight, and may be put off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds, ctx.weight, ctx.queue = backward, weight, weight_queue() if x.requires_grad else None
        time.sleep(forward)
        GRAPHS.add(int(ctx.needs_input_grad[1] or ctx.queue is not None))
        return x + weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # type: ignore[override]
        if ctx.queue is None:
            time.sleep(ctx.seconds)
            GRAPHS.add(-1)
            return gradient, gradient.sum().view(1), None, None
        time.sleep(ctx.seconds / 2)

        def of_weight() -> list[tuple[Tensor, Tensor]]:
            time.sleep(ctx.seconds / 2)
            GRAPHS.add(-1)
            return [(ctx.weight, gradient.sum().view(1))]

        ctx.queue.add(of_weight)
        return gradient, None, None, None


class Sleeping(nn.Module):
    """A block that sleeps for ``forward`` seconds, and for ``backward`` seconds in the backward pass."""

    def __init__(self, *, forward: float, backward: float) -> None:
        super().__init__()
        self.seconds = forward, backward
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x`` plus a weight."""
        return _Sleep.apply(x, self.weight, *self.seconds)


class SleepingBlocks(nn.Sequential):
    """Several of them, between which stages may cut."""

    def __init__(self, count: int, *, forward: float, backward: float) -> None:
        super().__init__(*(Sleeping(forward=forward, backward=backward) for _ in range(count)))


class Dense(nn.Sequential):
    """Linear-ReLU-Linear-ReLU of one width."""

    def __init__(self, *, width: int) -> None:
        super().__init__(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())


def sleeping_engine(
    method: str,
    *,
    stages: int,
    forward: float,
    backward: float,
    layers: int | None = None,
    keys: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    block: type[Sleeping] = Sleeping,
) -> Any:
    """Builds an engine over sleeping layers; its micro-batches are ``(1, CLASSES)``.

    By default a stage has one layer, and with ``bp_dualpipev`` two of half the time.

    Args:
        block: class of the layers' f.
        keys: additional keys of DeepSpeed's config.
        options: keys of the ``"associated_learning"`` block in addition to the method.
    """
    parts = 2 if method == build.DUALPIPEV else 1
    spec = partial(LayerSpec, block, forward=forward / parts, backward=backward / parts)
    layers = parts * stages if layers is None else layers
    return _engine(method, spec, stages=stages, width=CLASSES, micro_batch=1, layers=layers, keys=keys, options=options)


def dial_engine(schedule: str, *, stages: int, layers: int, forward: float, backward: float) -> Any:
    """Builds an engine of K AL layers over P stages, each stage with one sleeping block; one step per batch."""
    block = partial(LayerSpec, SleepingBlocks, stages // layers, forward=forward, backward=backward)
    options = {"group_schedule": schedule, "steps_per_batch": 1}
    return _engine("streaming", block, stages=stages, width=CLASSES, micro_batch=1, layers=layers, options=options)


def dense_engine(method: str, *, stages: int, width: int, micro_batch: int) -> Any:
    """Builds an engine over dense layers; its micro-batches are ``(micro_batch, width)``."""
    return _engine(method, partial(LayerSpec, Dense, width=width), stages=stages, width=width, micro_batch=micro_batch)


def micro_batches(engine: Any, *, width: int = CLASSES) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields zeros endlessly, in new tensors each time, so that memory counting includes each micro-batch."""
    size = engine.train_micro_batch_size_per_gpu()
    while True:
        yield torch.zeros(size, width), torch.zeros(size, dtype=torch.int64)


def model_engine(
    method: str,
    *,
    model: str,
    stages: int,
    micro_batch: int,
    options: Mapping[str, Any] | None = None,
    partition: str = "uniform",
    optimizer: Mapping[str, Any] = SGD,
    block: Mapping[str, Any] | None = None,
) -> Any:
    """Builds an engine over a small network of :mod:`ds_al.models`.

    Args:
        options: options of both forms; by default :func:`model_options`.
        partition: ``"uniform"``, or ``"cuts:..."``.
        optimizer: DeepSpeed's ``"optimizer"`` block.
        block: keys of the ``"associated_learning"`` block in addition to the method.
    """
    options = dict(options or model_options(model, stages))
    specs = build_al(model, **options) if method in AL_SCHEDULES else None
    twin = build_twin(model, **options) if specs is None else None
    return _initialize(
        method,
        specs=specs,
        twin=twin,
        stages=stages,
        micro_batch=micro_batch,
        classes=options["num_classes"],
        partition=partition,
        optimizer=optimizer,
        block=block or {},
    )


def model_batches(engine: Any, *, model: str, image: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields random samples and labels endlessly for an engine."""
    return random_batches(model, size=engine.train_micro_batch_size_per_gpu(), image=image)


def random_batches(model: str, *, size: int, image: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields random micro-batches of samples and labels endlessly; images have the shape :data:`IMAGE` by default."""
    generator = torch.Generator().manual_seed(0)
    while True:
        labels = torch.randint(CLASSES, (size,), generator=generator)
        if model in TEXTS:
            yield torch.randint(1, VOCABULARY, (size, TOKENS), generator=generator), labels
        else:
            yield torch.randn(size, *(image or IMAGE), generator=generator), labels


def model_options(model: str, stages: int) -> dict[str, Any]:
    """Returns the sizes of a small network, with two AL layers per stage if the network supports it.

    Networks of texts have no dropout, as in the studies of accuracy: on a CPU its random numbers take much of the time
    of a small Transformer.
    """
    if model in TEXTS:
        return {"vocab_size": VOCABULARY, "num_classes": CLASSES, "num_blocks": 2 * stages, "dropout": 0.0}
    if model == "mlp":
        return {"in_shape": IMAGE, "num_classes": CLASSES, "widths": (256,) * (2 * stages)}
    return {"in_shape": IMAGE, "num_classes": CLASSES}


def _engine(
    method: str,
    block: Callable[[], LayerSpec],
    *,
    stages: int,
    width: int,
    micro_batch: int,
    layers: int | None = None,
    keys: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    layers = layers or stages
    if method not in AL_SCHEDULES:
        twin = [block() for _ in range(layers)]
        return _initialize(method, specs=None, twin=twin, stages=stages, micro_batch=micro_batch)
    codes = [CLASSES] * (layers + 1)
    specs = [
        ds_al.ALLayerSpec(
            f=block(),
            b=LayerSpec(nn.Linear, width, codes[i + 1]),
            g=LayerSpec(nn.Linear, codes[i], codes[i + 1]),
            h=LayerSpec(nn.Linear, codes[i + 1], codes[i]),
        )
        for i in range(layers)
    ]
    return _initialize(method, specs=specs, twin=None, stages=stages, micro_batch=micro_batch, block=options, keys=keys)


def least_micro_batches(method: str, stages: int) -> int:
    """Returns the least number of micro-batches that a method can train per batch."""
    return 2 * stages if method == build.DUALPIPEV else 1


def _initialize(
    method: str,
    *,
    specs: list[ds_al.ALLayerSpec] | None,
    twin: Sequence[LayerSpec] | None,
    stages: int,
    micro_batch: int,
    classes: int = CLASSES,
    partition: str = "uniform",
    optimizer: Mapping[str, Any] = SGD,
    block: Mapping[str, Any] | None = None,
    keys: Mapping[str, Any] | None = None,
) -> Any:
    model: PipelineModule
    if specs is not None:
        model = ds_al.ALPipelineModule(specs, num_stages=stages, num_classes=classes, partition_method=partition)
    elif method == data_parallel.METHOD:
        model = data_parallel.replica_module(twin or (), loss_fn=nn.CrossEntropyLoss(), partition_method="uniform")
    else:
        kind = build.module_class(method) if method == build.DUALPIPEV else TwinModule
        model = kind(twin, num_stages=stages, loss_fn=nn.CrossEntropyLoss(), partition_method=partition)
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": least_micro_batches(method, stages),
        "optimizer": dict(optimizer),
        "gradient_clipping": 0.0,  # DeepSpeed's default of 1.0 would synchronize all stages for a norm
        "steps_per_print": None,
        BLOCK: {"method": method, **(block or {})},
        **(keys or {}),
    }
    engine, *_ = ds_al.initialize(model=model, config=config)
    return engine
