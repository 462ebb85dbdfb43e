"""Hyperparameters of a run for W&B: the usual names at the top, by which runs are filtered, and all settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_al.config.associated_learning import al_config
from ds_al.config.base import BLOCK as AL
from ds_al.experiment.config import BLOCK, experiment_config
from ds_al.experiment.observer import RunInfo
from ds_al.system.secrets import without_secrets

_TAKEN = ("model", "data")  # of the experiment's block, which the facts of the run already hold


def hyperparameters(config: Mapping[str, Any], info: RunInfo) -> dict[str, Any]:
    """Returns the settings of a run, defaults included and without secrets; all values can be written as JSON.

    Args:
        config: the whole config.
        info: sizes of the run.
    """
    optimizer, scheduler = config.get("optimizer") or {}, config.get("scheduler") or {}
    params = optimizer.get("params") or {}
    block = experiment_config(config).model_dump(mode="json", exclude={"wandb", *_TAKEN})
    return without_secrets(
        {
            "optimizer": optimizer.get("type"),
            "lr": params.get("lr"),
            "weight_decay": params.get("weight_decay"),
            "scheduler": scheduler.get("type"),
            "epochs": info.epochs,
            "batch_size": info.batch_samples,
            "total_batches": info.total_batches,
            "training_samples": info.training_samples,
            "optimizer_params": params,
            "scheduler_params": scheduler.get("params") or {},
            BLOCK: block,
            AL: al_config(config).model_dump(mode="json"),
            "deepspeed": {key: value for key, value in config.items() if key not in (AL, BLOCK)},
        }
    )
