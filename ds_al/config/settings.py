"""The validated settings of an engine: made once by ``ds_al.initialize``, and handed down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_al.config import deepspeed
from ds_al.config.associated_learning import ALConfig, CheckpointConfig, al_config
from ds_al.config.base import BLOCK
from ds_al.config.methods import AL_METHODS, BACKPROP_METHODS
from ds_al.config.precision import FULL, Precision
from ds_al.errors import ALConfigError


@dataclass(frozen=True)
class Settings:
    """What a DeepSpeed config asks of an engine.

    Attributes:
        al: the block ``"associated_learning"``.
        precision: what the layers compute in; for backprop it is left to DeepSpeed.
        zero_stage: 1 where the replicas of a stage share out its optimizer state; for backprop 0.
        deepspeed: the config that DeepSpeed gets.
    """

    al: ALConfig
    precision: Precision
    zero_stage: int
    deepspeed: dict[str, Any]

    @classmethod
    def of(cls, config: Mapping[str, Any], *, is_al: bool, module: str = "module") -> Settings:
        """Validates a config.

        Args:
            is_al: whether the module is one of AL layers.
            module: class of the module, for errors.

        Raises:
            ALConfigError: a key is unknown, cannot be honoured, or does not fit the module.
        """
        al = al_config(config)
        if is_al != (al.method in AL_METHODS):
            fitting = AL_METHODS if is_al else BACKPROP_METHODS
            raise ALConfigError(f'"{BLOCK}.method": got {al.method!r} for a {module}: use one of {", ".join(fitting)}')
        if is_al:
            precision, zero_stage = Precision.of(config), deepspeed.zero_stage(config)
            return cls(al, precision, zero_stage, deepspeed.honour(config, al))
        if al.checkpoint != CheckpointConfig():
            raise ALConfigError(f'"{BLOCK}.checkpoint": {al.method!r} saves as DeepSpeed does: remove the block')
        return cls(al, FULL, 0, {key: value for key, value in config.items() if key != BLOCK})
