"""Facts of a run, known before its first batch, and its summary: accuracies, exits, times and bytes."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ds_al.data.config import OF_IMAGES, OF_TEXT
from ds_al.experiment.architecture import Architecture
from ds_al.experiment.exits import averaged_rows, confidence_rows, exit_rows
from ds_al.experiment.observer import RunInfo
from ds_al.models.exit_cost import ExitCost
from ds_al.system import provenance

PACKAGES = ("ds_al", "torch", "deepspeed", "transformers", "datasets", "wandb", "numpy")
"""Packages whose versions are recorded."""


def run_facts(info: RunInfo, network: Architecture, *, device: Any) -> dict[str, Any]:
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
        **of_groups(info),
        "model": network.experiment.model.model_dump(),
        "data": network.experiment.data.model_dump(exclude=set(OF_TEXT if network.data.kind == "image" else OF_IMAGES)),
        "seed": info.seed,
        **network.cost(info.micro_batch_size),
        "parameters": info.parameters,
        "parameters_total": sum(info.parameters),
        "versions": {name: provenance.version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "git_commit": provenance.git_commit(),
        "command": provenance.command(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "cores": os.cpu_count(),
        "cpu": provenance.cpu(),
        "boot": provenance.boot(),
        "device": str(device),
    }


def summarize(
    info: RunInfo,
    history: Sequence[Mapping[str, Any]],
    *,
    test: Mapping[str, Any],
    full: Mapping[str, Any],
    exit_costs: Sequence[ExitCost] | None,
    peak_activation_bytes: Sequence[int],
    seconds: float,
) -> dict[str, Any]:
    """Makes the content of ``summary.json``, without the facts of the run.

    Args:
        info: the run.
        history: rows of its epochs.
        test: result of the evaluation on the test part; empty where there was none.
        full: entries of a full evaluation, as the training accuracy; empty where there was none.
        exit_costs: costs of inference up to every exit; ``None`` where the network has one exit, or they are unknown.
        peak_activation_bytes: per stage.
        seconds: of the whole run.
    """
    best = best_epoch(history)
    here = [row for row in history if len(row["idle"]) == info.stages]  # a run may go on with other numbers of stages
    return {
        "name": info.name,
        "method": info.method,
        "stages": info.stages,
        "copies": info.replicas,
        "micro_batches": info.micro_batches,
        "micro_batch_size": info.micro_batch_size,
        "partition": info.partition,
        **of_groups(info),
        "seed": info.seed,
        "epochs": history[-1]["epoch"] if history else info.first_epoch,
        "test_accuracy": test.get("accuracy"),
        "test_samples": test.get("samples"),
        "averaged_accuracy": test.get("averaged"),
        **_by_exit(test, exit_costs),
        "validation_accuracy": history[-1].get("validation_accuracy") if history else None,
        "best_validation_accuracy": best["validation_accuracy"][-1] if best else None,
        "best_epoch": best["epoch"] if best else None,
        **full,
        "seconds": seconds,
        "training_seconds": sum(row["seconds"] for row in history),
        "samples_per_second": _over_time(history, [row["samples_per_second"] for row in history]),
        "idle": [_over_time(here, [row["idle"][stage] for row in here]) for stage in range(info.stages)],
        "wait_data_seconds": sum(row["wait_data"] for row in history),
        "peak_activation_bytes": list(peak_activation_bytes),
        "bytes_sent": [_bytes_sent(here, stage) for stage in range(info.stages)],
        "parameters": info.parameters,
        **_skipped(history),
    }


def of_groups(info: RunInfo) -> dict[str, Any]:
    """Returns the stages of each AL layer and the schedule inside these groups, where layers span several stages."""
    return {"groups": list(info.groups), "group_schedule": info.group_schedule} if info.groups else {}


def _skipped(history: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Sums the steps that each layer has left out over the epochs."""
    rows = [row["skipped_steps"] for row in history if "skipped_steps" in row]
    return {"skipped_steps": [sum(counts) for counts in zip(*rows, strict=True)]} if rows else {}


def skipped_steps(stages: Sequence[Mapping[int, int]]) -> dict[str, list[int]]:
    """Returns the steps that each layer has left out, as an entry of a row; no entry where no layer skips any."""
    layers = {layer: count for stage in stages for layer, count in stage.items()}
    return {"skipped_steps": [layers[layer] for layer in sorted(layers)]} if layers else {}


def best_epoch(history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Returns the row of the best validation accuracy, the first of equals; ``None`` where no epoch was evaluated."""
    evaluated = [row for row in history if "validation_accuracy" in row]
    return max(evaluated, key=lambda row: row["validation_accuracy"][-1], default=None)


def _by_exit(test: Mapping[str, Any], costs: Sequence[ExitCost] | None) -> dict[str, Any]:
    """Accuracy and cost of every exit, of averages of the last exits, and of early exit by threshold."""
    if not costs:
        return {"exits": None, "averaged": None, "early_exit": None}
    return {
        "exits": exit_rows(test["accuracy"], costs) if test else None,
        "averaged": averaged_rows(test["averaged"], costs) if test.get("averaged") else None,
        "early_exit": confidence_rows(test.get("early_exit", ()), costs),
    }


def _over_time(history: Sequence[Mapping[str, Any]], values: Sequence[float]) -> float:
    """Mean of one value per epoch, weighted by the seconds of the epochs."""
    seconds = sum(row["seconds"] for row in history)
    return sum(value * row["seconds"] for value, row in zip(values, history, strict=True)) / seconds if seconds else 0


def _bytes_sent(history: Sequence[Mapping[str, Any]], stage: int) -> int | None:
    if not history or history[0]["bytes_sent"][stage] is None:
        return None
    return sum(row["bytes_sent"][stage] for row in history)
