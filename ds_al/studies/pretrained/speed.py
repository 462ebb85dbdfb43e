"""Measures fine-tuning on two stages: samples per second and the memory of each stage, beside exact pipelines.

All pipelines hold the same blocks and train the same micro-batches in turns. Memory of a stage is counted: its
weights, the gradients and Adam's moments of those that train, and the peak of what autograd holds for backward.
"""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist

from ds_al.launch.ranks import run_ranks
from ds_al.studies.pretrained.texts import SOURCES
from ds_al.studies.pretrained.training import BY_WORK, TWIN, Adapt, Run, Settings, make_engine
from ds_al.studies.results import Row
from ds_al.trace.meter import ActivationMeter

STAGES = 2
EXACT = ("bp_1f1b", "bp_zb_h1", "bp_zb_h2")
"""Schedules of back-propagation: 1F1B, and zero bubble with as much memory and with more."""
_CLASSES = 4
_START_UP = 300.0  # seconds


def measure_speed(
    pretrained: Path,
    *,
    data: str,
    methods: tuple[str, ...],
    adapt: tuple[Adapt, ...],
    settings: Settings,
    micro_batches: int,
    batches: int,
    repeat: int,
) -> list[Row]:
    """Returns a row per method and stage.

    Args:
        pretrained: folder of the model.
        data: name of the texts, whose length the random ids have.
        methods: objectives, K = 2, beside back-propagation by each schedule of ``EXACT``; with frozen blocks the first
            one also by work.
        adapt: what of the model trains.
        settings: settings of the study; all weights train from the start.
        micro_batches: micro-batches of a batch, M.
        batches: batches of one timed run.
        repeat: timed runs of each case, in turns.

    Raises:
        RankFailure: a rank failed.
    """
    by_work = {"frozen": (methods[0] + BY_WORK,)}
    cases = [(method, each) for each in adapt for method in (*EXACT, *methods, *by_work.get(each, ()))]
    by_rank: list[list[Row]] = run_ranks(
        f"{__name__}:time_on_rank",
        STAGES,
        timeout=_START_UP + 120.0 * len(cases) * batches * repeat,
        cases=cases,
        pretrained=str(pretrained),
        data=data,
        settings=replace(settings, new_first=0),
        micro_batches=micro_batches,
        batches=batches,
        repeat=repeat,
    )
    return [row for case in zip(*by_rank, strict=True) for row in case]


def time_on_rank(
    cases: list[tuple[str, Adapt]],
    pretrained: str,
    data: str,
    settings: Settings,
    micro_batches: int,
    batches: int,
    repeat: int,
) -> list[Row]:
    """Returns this rank's rows, one per case."""
    length, size = SOURCES[data].length, settings.batch
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 50, (size, length), generator=generator)
    labels = torch.randint(_CLASSES, (size,), generator=generator)
    endless = itertools.repeat(((ids, torch.ones_like(ids)), labels))
    engines = {}
    for method, adapt in cases:
        samples = size * micro_batches * (batches * repeat + 1)
        run = Run(data, TWIN if method in EXACT else method, adapt, STAGES, 0, 1e-5, samples, "trial")
        engines[method, adapt] = make_engine(
            run,
            settings,
            classes=_CLASSES,
            pretrained=Path(pretrained),
            stages=STAGES,
            micro_batches=micro_batches,
            **({"schedule": method} if method in EXACT else {}),
        )
    held: dict[tuple[str, Adapt], int] = {}
    for case, engine in engines.items():
        with ActivationMeter(exclude=engine.module.parameters()) as meter:
            engine.train_batch(endless)
        held[case] = meter.peak_bytes
    seconds: dict[tuple[str, Adapt], list[float]] = {case: [] for case in engines}
    for _ in range(repeat):
        for case, engine in engines.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(batches):
                engine.train_batch(endless)
            dist.barrier()
            seconds[case].append(time.perf_counter() - start)
    rates = {case: [size * micro_batches * batches / each for each in own] for case, own in seconds.items()}
    return [
        {
            "data": data,
            "method": method,
            "adapt": adapt,
            "stage": dist.get_rank(),
            "micro_batches": micro_batches,
            "samples_per_second": statistics.median(rates[method, adapt]),
            "samples_per_second_low": min(rates[method, adapt]),
            "samples_per_second_high": max(rates[method, adapt]),
            "held_bytes": held[method, adapt],
            **_weights(engine),
        }
        for (method, adapt), engine in engines.items()
    ]


def _weights(engine: Any) -> dict[str, int]:
    """Returns the bytes of a stage's weights, and of gradients and Adam's two moments of those that train."""
    weights = list(engine.module.parameters())
    own = sum(weight.numel() * weight.element_size() for weight in weights)
    trained = sum(weight.numel() * weight.element_size() for weight in weights if weight.requires_grad)
    return {"weight_bytes": own, "training_bytes": 3 * trained}
