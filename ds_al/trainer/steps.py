"""Numbers of batches of a training, and the settings of a DeepSpeed config that depend on them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ds_al.config.base import BLOCK, with_scheduler_steps
from ds_al.errors import ALConfigError


def steps_per_epoch(config: Mapping[str, Any], *, samples: int, replicas: int) -> int:
    """Returns the number of batches in a pass over the training data.

    Raises:
        ALConfigError: the config does not give the size of a batch, or there are fewer samples than that.
    """
    sizes: list[Any] = [config.get(key) for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ALConfigError(
            f'got "train_micro_batch_size_per_gpu" and "gradient_accumulation_steps" {sizes}: expected whole numbers '
            "of 1 or more in the config"
        )
    batch = math.prod(sizes) * replicas
    if samples < batch:
        raise ALConfigError(f"{samples} training samples make no batch of {batch}")
    return samples // batch


def with_counts(
    config: Mapping[str, Any], *, steps: int, keep_last: int | None, spanned: bool = False
) -> dict[str, Any]:
    """Returns the config with the length of its LR schedule, and the number of checkpoints to keep.

    Args:
        steps: number of batches of the training.
        keep_last: number of checkpoints, ``None`` for that of the config.
        spanned: whether an AL layer spans several stages, which then step once per batch by default.
    """
    al = dict(config.get(BLOCK, {}))
    if keep_last is not None:
        al["checkpoint"] = {**al.get("checkpoint", {}), "keep_last": keep_last}
    by_default = 1 if spanned else config.get("gradient_accumulation_steps", 1)
    per_batch = al.get("steps_per_batch") or by_default
    counted = steps * per_batch if al.get("count") == "step" else steps
    return with_scheduler_steps({**config, BLOCK: al}, counted)
