"""Validated settings of an engine: ``ds_al.initialize`` builds them once, and passes them to all parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_al.config import deepspeed
from ds_al.config.associated_learning import ALConfig, CheckpointConfig, al_config
from ds_al.config.base import BLOCK
from ds_al.config.methods import AL_METHODS, BACKPROP_METHODS
from ds_al.config.precision import FULL, Precision
from ds_al.config.sizes import batch_sizes
from ds_al.errors import ALConfigError


@dataclass(frozen=True)
class Settings:
    """Settings of an engine, validated from a DeepSpeed config.

    Attributes:
        al: the block ``"associated_learning"``.
        precision: precision of the layers; with backprop DeepSpeed handles it.
        zero_stage: 1 if the replicas of a stage shard its optimizer state; 0 with backprop.
        deepspeed: the config for DeepSpeed.
    """

    al: ALConfig
    precision: Precision
    zero_stage: int
    deepspeed: dict[str, Any]

    @classmethod
    def of(cls, config: Mapping[str, Any], *, is_al: bool, module: str = "module", replicas: int = 1) -> Settings:
        """Validates a config.

        Args:
            is_al: whether the module consists of AL layers.
            module: class of the module, for errors.
            replicas: number of data parallel replicas.

        Raises:
            ALConfigError: a key is unknown, cannot be honoured, or does not fit the module.
        """
        al = al_config(config)
        if is_al != (al.method in AL_METHODS):
            fitting = AL_METHODS if is_al else BACKPROP_METHODS
            raise ALConfigError(f'"{BLOCK}.method": got {al.method!r} for a {module}: use one of {", ".join(fitting)}')
        config = {**config, **batch_sizes(config, replicas=replicas)}
        if is_al:
            honoured = deepspeed.honour(config, al)
            precision = Precision.of(config)
            if al.non_finite != "raise" and precision.checks_overflow:
                raise ALConfigError(
                    f'"{BLOCK}.non_finite": got {al.non_finite!r} with fp16, or bf16 that checks for overflow, which '
                    'skip steps by their loss scale: use "raise", or "check_grad_overflow": false in "bf16"'
                )
            return cls(al, precision, deepspeed.zero_stage(config), honoured)
        deepspeed.check_keys(config)
        if al.checkpoint != CheckpointConfig():
            raise ALConfigError(f'"{BLOCK}.checkpoint": {al.method!r} saves as DeepSpeed does: remove the block')
        passed = {key: value for key, value in config.items() if key != BLOCK}
        return cls(al, FULL, 0, passed if passed.get("steps_per_print", 1) else {**passed, "steps_per_print": None})
