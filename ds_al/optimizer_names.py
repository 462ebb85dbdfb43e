"""Optimizers that a config may name beside DeepSpeed's and torch's own: ``"MuonAdamW"``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine

from ds_al import muon
from ds_al.config import BLOCK, ALConfig, MuonAdamWConfig, validate
from ds_al.errors import ALConfigError

MUON_ADAMW = "MuonAdamW"


class NamedOptimizers(PipelineEngine):
    """The part of both engines that makes the optimizer which a config names.

    DeepSpeed goes on to make the LR schedule, and to save and load, as with an optimizer of its own.
    """

    def _is_supported_optimizer(self, optimizer_name: str) -> bool:
        return _is_ours(optimizer_name) or super()._is_supported_optimizer(optimizer_name)

    def _configure_basic_optimizer(self, model_parameters: Any) -> torch.optim.Optimizer:
        if not _is_ours(self._config.optimizer_name):
            return super()._configure_basic_optimizer(model_parameters)
        if self.zero_optimization() or self.fp16_enabled() or self.bfloat16_enabled():
            raise ALConfigError(
                '"optimizer.type": got "MuonAdamW" with ZeRO or mixed precision, where DeepSpeed joins parameters into '
                'vectors, and Muon needs matrices: train in fp32 at "zero_optimization" stage 0, or use "AdamW"'
            )
        muon.tag_embeddings(self.module)
        options = validate(MuonAdamWConfig, self._config.optimizer_params or {}, where="optimizer.params")
        return muon.MuonAdamW(model_parameters, **options.model_dump())


def check(config: Mapping[str, Any], al: ALConfig) -> None:
    """Checks the options of our own optimizers: on every rank, also one with nothing for them to train.

    Raises:
        ALConfigError: an option is unknown (the nearest is named) or out of range, or this torch lacks Muon.
    """
    blocks: dict[str, Any] = {"optimizer": config.get("optimizer")}
    if al.autoencoder_optimizer is not None:
        blocks[f"{BLOCK}.autoencoder_optimizer"] = al.autoencoder_optimizer.model_dump()
    for where, block in blocks.items():
        if isinstance(block, Mapping) and _is_ours(block.get("type")):
            muon.check_torch()
            validate(MuonAdamWConfig, block.get("params", {}), where=f"{where}.params")


def _is_ours(name: Any) -> bool:
    return isinstance(name, str) and name.lower() == MUON_ADAMW.lower()
