"""Measures whether a feature of DeepSpeed makes stages wait for each other: ``run/bench.py --features``.

Sleeping layers are trained on 4 ranks, as 4 stages and as 2 stages with 2 replicas, without features and with one
feature at a time. A feature that synchronizes the stages costs a pipeline flush per step. The last row is a positive
control: every step all-reduces one number over all stages, as a global norm does.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed import comm as dist

from ds_al.launch.ranks import run_ranks
from ds_al.planner.formulas import ideal_seconds
from ds_al.studies.bench import workloads
from ds_al.studies.bench.cases import START_UP, train, world_size
from ds_al.studies.bench.interleaved import together, turns

Row = dict[str, Any]
RANKS = 4


@dataclass(frozen=True)
class Feature:
    """A feature and how to enable it."""

    keys: Mapping[str, Any] = field(default_factory=dict)
    """Keys of DeepSpeed's config."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the ``"associated_learning"`` block."""
    copies: int = 1
    """Number of data parallel replicas."""
    again: bool = False
    """Whether the feature runs every forward twice."""
    agrees: bool = False
    """Whether every step all-reduces a number over all stages."""


_BF16 = {"bf16": {"enabled": True}}
_ZERO = {"zero_optimization": {"stage": 1}}
FEATURES: Mapping[str, Feature] = {
    "none": Feature(),
    "bf16": Feature(_BF16),
    "bf16, not looking for overflow": Feature({"bf16": {"enabled": True, "check_grad_overflow": False}}),
    "layer_gradient_clipping": Feature(options={"layer_gradient_clipping": 1.0}),
    "LR schedule": Feature(
        {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 1000, "warmup_num_steps": 10}}},
        options={"count": "step"},
    ),
    "gradient accumulation": Feature(options={"steps_per_batch": 1}),
    "AdamW": Feature({"optimizer": dict(workloads.ADAMW)}),
    "MuonAdamW": Feature({"optimizer": {"type": "MuonAdamW", "params": {"lr": 1e-3}}}),
    "activation checkpointing": Feature({"pipeline": {"activation_checkpoint_interval": 1}}, again=True),
    "2 copies": Feature(copies=2),
    "2 copies, ZeRO-1": Feature(_ZERO, copies=2),
    "2 copies, ZeRO-1, bf16, AdamW, clipping": Feature(
        {**_ZERO, **_BF16, "optimizer": dict(workloads.ADAMW)}, {"layer_gradient_clipping": 1.0}, copies=2
    ),
    "a norm over all stages, which is refused": Feature(agrees=True),
}


@dataclass(frozen=True)
class FeatureCases:
    """Settings of the measurement."""

    micro_batches: int
    """Micro-batches per batch and replica."""
    batches: int
    forward: float
    """Seconds that a layer sleeps in its forward pass."""
    backward: float
    """Seconds that a layer sleeps in its backward pass."""
    repeat: int
    """Number of repetitions per feature; repetitions of different features alternate."""
    names: Sequence[str] = tuple(FEATURES)

    def ideal(self, feature: Feature) -> float:
        """Returns the seconds of a run if only the sleeping layers took time and stages only waited for their input."""
        return ideal_seconds(
            "streaming",
            stages=RANKS // feature.copies,
            micro_batches=self.micro_batches,
            batches=self.batches,
            forward=self.forward,
            backward=self.backward + feature.again * self.forward,
        )


def measure_features(cases: FeatureCases) -> list[Row]:
    """Times every feature.

    Returns:
        Rows ``feature, stages, copies, micro_batches, batches, seconds`` (median), ``seconds_min, seconds_max, ideal,
        efficiency`` (ideal / seconds).

    Raises:
        RankFailure: a rank failed.
    """
    total = cases.repeat * sum(cases.ideal(FEATURES[name]) for name in cases.names)
    ranks = run_ranks(f"{__name__}:time_features", RANKS, timeout=4 * START_UP + 3 * total, cases=cases)
    rows = []
    for name in cases.names:
        feature, ideal = FEATURES[name], cases.ideal(FEATURES[name])
        seconds = [together(spans) for spans in zip(*(rank[name] for rank in ranks), strict=True)]
        median = statistics.median(seconds)
        rows.append(
            {
                "feature": name,
                "stages": RANKS // feature.copies,
                "copies": feature.copies,
                "micro_batches": cases.micro_batches,
                "batches": cases.batches,
                "seconds": median,
                "seconds_min": min(seconds),
                "seconds_max": max(seconds),
                "ideal": ideal,
                "efficiency": ideal / median,
            }
        )
    return rows


def time_features(cases: FeatureCases) -> dict[str, list[tuple[float, float]]]:
    """Returns start and end of every repetition on this rank, in seconds of the clock that all ranks share."""
    world = world_size()
    engines = {}
    for name in cases.names:
        feature = FEATURES[name]
        engines[name] = workloads.sleeping_engine(
            "streaming",
            stages=world // feature.copies,
            forward=cases.forward,
            backward=cases.backward,
            keys=feature.keys,
            options=feature.options,
        )
        if feature.agrees:
            _agree(engines[name])
        train(engines[name], workloads.micro_batches(engines[name]), micro_batches=2 * feature.copies, batches=1)
    spans: dict[str, list[tuple[float, float]]] = {name: [] for name in cases.names}
    for number in range(cases.repeat):
        for name in turns(cases.names, number):
            engine, copies = engines[name], FEATURES[name].copies
            data = workloads.micro_batches(engine)
            spans[name].append(train(engine, data, micro_batches=cases.micro_batches * copies, batches=cases.batches))
            dist.barrier()
    return spans


def _agree(engine: Any) -> None:
    """Adds an all-reduce over all stages to every step."""
    own = engine.optimizer.step

    def step() -> None:
        dist.all_reduce(torch.zeros(1, device=engine.device), group=engine.grid.get_pipe_parallel_group())
        own()

    engine.optimizer.step = step
