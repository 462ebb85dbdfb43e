"""Counts the bytes between stages per micro-batch in the engines, and compares them with the formula from shapes.

Each boundary has a row for the AL message with each ``message_dtype``, and for 1F1B's activation and gradient. The
results are the same on every machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_al.launch.ranks import run_ranks
from ds_al.models import build_al
from ds_al.studies.bench import workloads
from ds_al.studies.bench.cases import START_UP, train, world_size
from ds_al.tensors import stop_gradient
from ds_al.trace.metrics import StageMetrics
from ds_al.transport.compression import BLOCK, COMPRESSIONS

Row = dict[str, Any]
BP = "bp_1f1b"
_ALIGNED = 64  # byte alignment of each tensor in an AL message


def measure_traffic(
    models: Sequence[str], *, stages: int, micro_batch: int, progress: Callable[[str], None] | None = None
) -> list[Row]:
    """Counts the bytes at all boundaries.

    Args:
        models: names of small networks of :mod:`ds_al.models`.
        stages: P, at most the number of AL layers.
        micro_batch: samples per micro-batch.
        progress: called with a line after every network.

    Returns:
        Rows ``network, stages, samples, boundary, method, message_dtype, bytes, formula, times_less,
        relative_error``: bytes per micro-batch in both directions, 1F1B's bytes relative to them, and the rounding
        error of the activations, ``|received - sent| / |sent|``.

    Raises:
        RankFailure: a rank failed.
    """
    rows: list[Row] = []
    for model in models:
        target = f"{__name__}:count_on_rank"
        by_rank = run_ranks(target, stages, timeout=4 * START_UP, model=model, micro_batch=micro_batch)
        boundaries = list(message_shapes(model, stages=stages, micro_batch=micro_batch))
        for boundary, (s, t, report) in enumerate(boundaries):
            up = by_rank[boundary + 1][BP]["gradients"]
            backprop = by_rank[boundary][BP]["activations"] + up
            common = {"network": model, "stages": stages, "samples": micro_batch, "boundary": boundary + 1}
            for message_dtype in COMPRESSIONS:
                sent = by_rank[boundary][message_dtype]
                rows.append(
                    {
                        **common,
                        "method": "streaming",
                        "message_dtype": message_dtype,
                        "bytes": sent["bytes"],
                        "formula": al_bytes(message_dtype, s, t, report),
                        "times_less": backprop / sent["bytes"],
                        "relative_error": sent["relative_error"],
                    }
                )
            row = {**common, "method": BP, "message_dtype": "fp32", "bytes": backprop, "formula": bp_bytes(s)}
            rows.append({**row, "times_less": 1.0, "relative_error": 0.0})
        if progress is not None:
            progress(model)
    return rows


def al_bytes(message_dtype: str, s: Sequence[Tensor], t: Sequence[Tensor], report: int) -> int:
    """Returns the bytes of ``(s ..., t ..., report)``: 4, 2 or ``1 + 4 / 128`` per float32 number; others unchanged.

    Args:
        message_dtype: ``"fp32"``, ``"bf16"`` or ``"int8"``.
        s, t: tensors with the shapes and dtypes of the message; their values are not read.
        report: numbers in the report, 4 bytes each.
    """
    sizes = [4 * report]
    for tensor in (*s, *t):
        n = tensor.numel()
        if tensor.dtype is not torch.float32:
            sizes.append(tensor.nbytes)
        elif message_dtype == "int8":
            sizes += [n, 4 * -(-n // BLOCK)]
        else:
            sizes.append({"fp32": 4, "bf16": 2}[message_dtype] * n)
    return sum(-(-size // _ALIGNED) * _ALIGNED for size in sizes)


def bp_bytes(s: Sequence[Tensor]) -> int:
    """Returns the bytes of an activation and its gradient; integers and booleans have no gradient."""
    return sum(tensor.nbytes for tensor in s) + sum(tensor.nbytes for tensor in s if tensor.is_floating_point())


def message_shapes(
    model: str, *, stages: int, micro_batch: int
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...], int]]:
    """Returns ``(s, t, numbers in the report)`` at each boundary, computed from the layers alone."""
    layers = [spec.build() for spec in build_al(model, **workloads.model_options(model, stages))]
    x, labels = next(workloads.random_batches(model, size=micro_batch))
    classes = workloads.CLASSES
    s, t = x, layers[0].objective.first_target(labels, F.one_hot(labels, classes).to(torch.float32))
    report = len(StageMetrics._fields) * stages + 2 * len(layers)
    for index, layer in enumerate(layers):
        if index in _cuts(len(layers), stages):
            yield _parts(s), _parts(t), report
        with torch.no_grad():
            s, t = (stop_gradient(value) for value in layer(s, t))


def count_on_rank(model: str, micro_batch: int) -> dict[str, dict[str, float]]:
    """Returns the bytes that this stage sends per micro-batch, by ``message_dtype`` and for 1F1B."""
    stages = world_size()
    layers = len(build_al(model, **workloads.model_options(model, stages)))
    options: dict[str, Any] = {
        "model": model,
        "stages": stages,
        "micro_batch": micro_batch,
        "partition": f"cuts:{','.join(map(str, _cuts(layers, stages)))}",
    }
    data = list(itertools.islice(workloads.random_batches(model, size=micro_batch), 2))
    counts: dict[str, dict[str, float]] = {}
    for message_dtype in COMPRESSIONS:
        engine = workloads.model_engine("streaming", **options, block={"message_dtype": message_dtype})
        sent = _listen(engine)
        _train_twice(engine, data)
        stats = engine.stats()
        counts[message_dtype] = {
            "bytes": stats.bytes_sent // max(stats.messages_sent, 1),
            "relative_error": engine.compression.relative_error(sent[-1][0]) if sent else 0.0,
        }
    engine = workloads.model_engine(BP, **options)
    _train_twice(engine, data)
    return {**counts, BP: {what: engine.sent[what] // len(data) for what in ("activations", "gradients")}}


def _train_twice(engine: Any, data: Sequence[Any]) -> None:
    """Trains two batches; the first one also sends shapes and is not counted."""
    for _ in range(2):
        engine.reset_stats()
        train(engine, iter(data), micro_batches=len(data), batches=1)


def _listen(engine: Any) -> list[tuple[Tensor, ...]]:
    """Records the tensors that this stage sends, before compression."""
    sent: list[tuple[Tensor, ...]] = []
    encode = engine.compression.encode

    def listening(message: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        sent.append(message)
        return encode(message)

    engine.compression.encode = listening
    return sent


def _cuts(layers: int, stages: int) -> list[int]:
    """Returns the first layer of each later stage: equally many AL layers each, and the twin's head on the last."""
    return [layers * stage // stages for stage in range(1, stages)]


def _parts(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
