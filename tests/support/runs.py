"""What observers of a run are told of it, without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_al.experiment.observer import RunInfo


def run_info(folder: Path = Path(), **values: Any) -> RunInfo:
    """A run of two stages and three epochs of ten batches."""
    defaults: dict[str, Any] = {
        "name": "n", "method": "streaming", "folder": folder, "stages": 2, "replicas": 1, "partition": [0, 1, 2],
        "partition_method": "uniform", "partition_table": None, "parameters": [5, 5], "seed": 0,
        "training_samples": 400, "micro_batch_size": 10, "micro_batches": 4, "micro_batches_per_batch": 4,
        "batches_per_epoch": 10, "total_batches": 30, "epochs": 3, "first_epoch": 0,
    }  # fmt: skip
    return RunInfo(**{**defaults, **values})
