"""Facts of a run: method, network, its costs, and where the run comes from. Known before the first batch."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

from ds_al.data.config import OF_IMAGES, OF_TEXT
from ds_al.experiment.architecture import Architecture
from ds_al.experiment.config import ExperimentConfig
from ds_al.experiment.observer import RunInfo
from ds_al.system import provenance

PACKAGES = ("ds_al", "torch", "deepspeed", "transformers", "datasets", "wandb", "numpy")
"""Packages whose versions are recorded."""


def run_facts(
    info: RunInfo, experiment: ExperimentConfig, architecture: Architecture, *, device: Any
) -> dict[str, Any]:
    """Collects the facts of a run for its files and for W&B; all values can be written as JSON.

    ``rho`` and ``flops`` (per sample, see :mod:`ds_al.models.cost`) are ``None`` where they cannot be counted.
    """
    return {
        "method": info.method,
        "stages": info.stages,
        "copies": info.replicas,
        "micro_batches": info.micro_batches,
        "micro_batch_size": info.micro_batch_size,
        "partition": info.partition,
        "model": experiment.model.model_dump(),
        "data": experiment.data.model_dump(exclude=set(OF_TEXT if architecture.data.kind == "image" else OF_IMAGES)),
        "seed": info.seed,
        **architecture.cost(info.micro_batch_size),
        "parameters": info.parameters,
        "parameters_total": sum(info.parameters),
        "versions": {name: provenance.version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "git_commit": provenance.git_commit(),
        "command": provenance.command(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "cores": os.cpu_count(),
        "cpu": provenance.cpu(),
        "device": str(device),
    }
