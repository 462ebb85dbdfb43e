"""What a run is: method, network, what it costs, and where it comes from. Known before the first batch."""

from __future__ import annotations

import os
import platform
import time
import warnings
from typing import TYPE_CHECKING, Any

from ds_al.data.config import OF_IMAGES, OF_TEXT
from ds_al.models import build_al, build_twin
from ds_al.models.cost import network_cost
from ds_al.system import provenance

if TYPE_CHECKING:
    from ds_al.experiment.job import Job

PACKAGES = ("ds_al", "torch", "deepspeed", "transformers", "datasets", "wandb", "numpy")


def facts(job: Job) -> dict[str, Any]:
    """Facts of a run, for its files and for W&B; values are such as JSON holds.

    ``rho`` and ``flops`` (per sample, see :mod:`ds_al.models.cost`) are ``None`` where they cannot be counted.
    """
    experiment = job.experiment
    return {
        "method": job.al.method,
        "stages": job.layout.stages,
        "copies": job.layout.copies,
        "micro_batches": job.micro_batches,
        "micro_batch_size": job.micro_batch,
        "partition": list(job.engine.module.parts),
        "model": experiment.model.model_dump(),
        "data": experiment.data.model_dump(exclude=set(OF_TEXT if job.data.kind == "image" else OF_IMAGES)),
        "seed": experiment.seed,
        **_network(job),
        "parameters": job.parameters,
        "parameters_total": sum(job.parameters),
        "versions": {name: provenance.version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "git_commit": provenance.git_commit(),
        "command": provenance.command(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "cores": os.cpu_count(),
        "cpu": provenance.cpu(),
        "device": str(job.engine.device),
    }


def _network(job: Job) -> dict[str, Any]:
    """Number of AL layers, and what both forms of the network cost, whichever of them this run trains."""
    model = job.experiment.model
    found: dict[str, Any] = {"layers": None, "rho": None, "flops": None}
    try:
        al = build_al(model.name, **job.model_options, **model.al_options)
        found["layers"] = len(al)
        twin = build_twin(model.name, **job.model_options, **model.twin_options)
        shape = (job.micro_batch, *job.data.shape)  # of texts, the longest: shorter ones cost less
        cost = network_cost(al, twin, shape=shape, num_classes=len(job.data.classes), dtype=job.data.dtype)
        found |= {"rho": cost.rho, "flops": cost.flops()}
    except Exception as error:  # a run that trains must not end for a figure beside it
        warnings.warn(f"rho is not counted: {error}", stacklevel=2)
    return found
