"""Arguments as callbacks of ``transformers`` read them: those of ``ALTrainer``, and settings of its DeepSpeed config
under the names of ``TrainingArguments``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, make_dataclass
from typing import Any

import torch.distributed as dist
from transformers.training_args import ParallelMode

from ds_al.config.base import BLOCK
from ds_al.trainer.arguments import ALTrainingArguments

SHOWN = ("optimizer", "scheduler", "bf16", "fp16", "zero_optimization", BLOCK)
"""Blocks of the config that loggers are given; others may hold keys of a logger."""

NAMES = {
    "per_device_train_batch_size": ("train_micro_batch_size_per_gpu",),
    "gradient_accumulation_steps": ("gradient_accumulation_steps",),
    "optim": ("optimizer", "type"),
    "learning_rate": ("optimizer", "params", "lr"),
    "weight_decay": ("optimizer", "params", "weight_decay"),
    "lr_scheduler_type": ("scheduler", "type"),
    "max_grad_norm": (BLOCK, "layer_gradient_clipping"),
}
"""Maps names of ``TrainingArguments`` to places in the config."""

_NO_HUB = dict.fromkeys(
    ("hub_private_repo", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "resume_from_checkpoint")
)


class _Methods:
    """Methods of ``TrainingArguments`` that callbacks call."""

    def to_dict(self) -> dict[str, Any]:
        """Returns all arguments, as JSON."""
        return asdict(self)  # type: ignore[call-overload]  # a dataclass, made below

    def to_json_string(self) -> str:
        """Returns all arguments as a JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """Returns all arguments, values other than numbers and texts as texts."""
        return {
            key: value if isinstance(value, (bool, int, float, str)) else str(value)
            for key, value in self.to_dict().items()
        }

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a callback reads args.{name}, which ALTrainer has not: docs/trainer.md lists what callbacks can read"
        )


def reported(args: ALTrainingArguments, config: Mapping[str, Any], *, seed: int) -> Any:
    """Returns the object that callbacks receive as ``args``.

    Args:
        args: arguments of the trainer.
        config: the DeepSpeed config.
        seed: base seed of the network.
    """
    values: dict[str, Any] = {**args.model_dump(mode="json"), "seed": seed}
    for name, place in NAMES.items():
        values[name] = _at(config, place)
    values["deepspeed"] = {name: config[name] for name in SHOWN if name in config}
    values |= _NO_HUB
    here = make_dataclass("ReportedArguments", list(values), bases=(_Methods,))(
        **json.loads(json.dumps(values, default=str))
    )
    rank = dist.get_rank()
    vars(here).update(
        world_size=dist.get_world_size(),
        process_index=rank,
        local_process_index=int(os.environ.get("LOCAL_RANK", 0)),
        parallel_mode=ParallelMode.DISTRIBUTED,
        n_gpu=1,
        _n_gpu=1,
        should_save=rank == 0,
        should_log=rank == 0,
        do_train=True,
        do_eval=args.eval_strategy != "no",
        do_predict=False,
        push_to_hub=False,
        trackio_static_space_id=False,
    )
    return here


def _at(config: Any, place: tuple[str, ...]) -> Any:
    for key in place:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config
