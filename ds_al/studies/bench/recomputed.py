"""Measures the memory savings of activation checkpointing: bytes held by one stage with and without recomputation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ds_al.compute.recompute import Recomputed
from ds_al.models import build_al
from ds_al.stage import LocalStage
from ds_al.studies.bench.workloads import CLASSES, TOKENS, VOCABULARY
from ds_al.trace import ActivationMeter

BLOCKS = 8
"""Number of blocks of the measured Transformer: an embedding and encoder layers."""


def measure_recomputed(
    *, micro_batch: int, layers: Sequence[int] = (1, 2, 4, 8), intervals: Sequence[int] = (0, 1, 2)
) -> list[dict[str, Any]]:
    """Measures the peak memory held for backward by one stage with all blocks of a small Transformer.

    Args:
        micro_batch: samples of the single micro-batch.
        layers: numbers of AL layers into which the blocks are grouped.
        intervals: intervals of activation checkpointing.

    Returns:
        Rows ``layers, checkpoint_interval, peak_bytes, peak_tensors``.
    """
    rows = []
    for count in layers:
        for interval in intervals:
            nbytes, tensors = _peak(count, interval, micro_batch)
            rows.append(
                {"layers": count, "checkpoint_interval": interval, "peak_bytes": nbytes, "peak_tensors": tensors}
            )
    return rows


def _peak(layers: int, interval: int, micro_batch: int) -> tuple[int, int]:
    torch.manual_seed(0)
    specs = build_al(
        "transformer", preset="small", vocab_size=VOCABULARY, num_classes=CLASSES, num_blocks=BLOCKS, num_layers=layers
    )
    built = [spec.build().train() for spec in specs]
    for layer in built:
        layer.recomputed = Recomputed(layer.f, interval=interval) if interval else None
    stage = LocalStage(list(enumerate(built)), stage_id=0, base_seed=0, device=torch.device("cpu"))
    x, labels = torch.ones(micro_batch, TOKENS, dtype=torch.int64), torch.zeros(micro_batch, dtype=torch.int64)
    t = built[0].objective.first_target(labels, F.one_hot(labels, CLASSES).float())
    with ActivationMeter(exclude=(p for layer in built for p in layer.parameters())) as meter:
        stage.forward(x, t)
        stage.backward(scale=1.0)
    return meter.peak_bytes, meter.peak_tensors
