"""Types of the keys that DeepSpeed reads itself, so that a wrong value is named before its own code meets it."""

from __future__ import annotations

import importlib.util
from typing import Literal

from pydantic import Field, field_validator

from ds_al.config.base import StrictModel


class MonitorConfig(StrictModel):
    """Blocks ``"tensorboard"`` and ``"csv_monitor"``."""

    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


class MonitorWandbConfig(StrictModel):
    """Block ``"wandb"``."""

    enabled: bool = False
    group: str | None = None
    team: str | None = None
    project: str = "deepspeed"


class MonitorCometConfig(StrictModel):
    """Block ``"comet"``."""

    enabled: bool = False
    samples_log_interval: int = Field(default=100, ge=1)
    project: str | None = None
    workspace: str | None = None
    api_key: str | None = None
    experiment_name: str | None = None
    experiment_key: str | None = None
    online: bool | None = None
    mode: Literal["get", "create", "get_or_create"] | None = None


class PassedKeys(StrictModel):
    """Keys of the config itself."""

    train_batch_size: int | None = Field(default=None, ge=1)
    train_micro_batch_size_per_gpu: int | None = Field(default=None, ge=1)
    gradient_accumulation_steps: int | None = Field(default=None, ge=1)
    steps_per_print: int | None = Field(default=10, ge=0)
    dump_state: bool = False
    disable_python_gc: bool = False
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None
    tensorboard: MonitorConfig = MonitorConfig()
    csv_monitor: MonitorConfig = MonitorConfig()
    wandb: MonitorWandbConfig = MonitorWandbConfig()
    comet: MonitorCometConfig = MonitorCometConfig()

    @field_validator("tensorboard", "comet")
    @classmethod
    def _installed(cls, block: MonitorConfig | MonitorCometConfig) -> MonitorConfig | MonitorCometConfig:
        package = "comet_ml" if isinstance(block, MonitorCometConfig) else "tensorboard"
        if block.enabled and importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed: pip install {package}, or set enabled to false")
        return block
