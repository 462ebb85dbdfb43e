"""Measures the time of each layer of the preset models and of its optimizer step: ``run/bench.py --layers``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ds_al.layer import ALLayer
from ds_al.models import build_al
from ds_al.partition.layer_times import adamw, measure
from ds_al.studies.bench import workloads
from ds_al.studies.bench.costs import IMAGES, LENGTH, TEXTS

Row = dict[str, Any]


def measure_layers(
    *,
    models: Sequence[str],
    preset: str = "small",
    micro_batch: int = 32,
    repeat: int = 15,
    progress: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Measures the median times of forward, backward and AdamW step of every layer on this process's device.

    Args:
        models: names of :data:`ds_al.models.AL_MODELS`.
        preset: preset of each model.
        micro_batch: samples per micro-batch: 32x32 images of 10 classes, or texts of 128 tokens of 4 classes.
        repeat: measurements per layer.
        progress: called with every row.

    Returns:
        Rows ``model, preset, layer, name, micro_batch, parameters, forward_ms, backward_ms, step_ms, step_loop_ms, u``:
        ``step_ms`` is the fused step that the engine uses, ``step_loop_ms`` the step over one tensor after the other;
        ``u`` is step / (forward + backward).
    """
    rows = []
    for model in models:
        text = model in workloads.TEXTS
        specs = build_al(model, preset=preset, **({**TEXTS, "dropout": 0.0} if text else IMAGES))
        generator = torch.Generator().manual_seed(0)
        if text:
            x = torch.randint(1, TEXTS["vocab_size"], (micro_batch, LENGTH), generator=generator)
        else:
            x = torch.randn(micro_batch, *IMAGES["in_shape"], generator=generator)
        built: list[ALLayer] = []

        def build(index: int, specs: Any = specs, built: list[ALLayer] = built) -> ALLayer:
            built[:] = [specs[index].build()]
            return built[0]

        classes = (TEXTS if text else IMAGES)["num_classes"]
        times = measure(
            build,
            layers=len(specs),
            example=x,
            num_classes=classes,
            device=torch.device("cpu"),
            make_optimizer=adamw,
            repeat=repeat,
        )
        for index, found in enumerate(times):
            row = {
                "model": model,
                "preset": preset,
                "layer": index,
                "name": type(built[0].f).__name__,
                "micro_batch": micro_batch,
                "parameters": sum(p.numel() for p in built[0].parameters()),
                "forward_ms": 1000 * found.forward,
                "backward_ms": 1000 * found.backward,
                "step_ms": 1000 * found.step,
                "step_loop_ms": 1000 * _loop_step(built[0], repeat=repeat),
                "u": found.u,
            }
            rows.append(row)
            if progress is not None:
                progress(row)
    return rows


def _loop_step(layer: ALLayer, *, repeat: int) -> float:
    """Returns the seconds of an unfused step."""
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, foreach=False)
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
