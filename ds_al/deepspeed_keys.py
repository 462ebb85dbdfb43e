"""DeepSpeed's own config keys: which of them an AL engine honours, and what a user does instead of the others."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ds_al.config import BLOCK, ALConfig
from ds_al.errors import ALConfigError

DEEPSPEED_KEYS: dict[str, str] = {
    "train_batch_size": "samples per `train_batch()`",
    "train_micro_batch_size_per_gpu": "samples per micro-batch",
    "gradient_accumulation_steps": "micro-batches per `train_batch()`; see `steps_per_batch` for when to step",
    "optimizer": "the optimizer of f and b, and of g and h unless `autoencoder_optimizer` is given. Torch's SGD, and "
    'with `"torch_adam": true` its Adam and AdamW, get `"fused": true` where `params` do not say how to step',
    "scheduler": "the LR schedule, DeepSpeed's or torch's; every stage has its own copy",
    "steps_per_print": "the first stage prints its local loss every so many batches",
    "gradient_clipping": "0 or absent; see `layer_gradient_clipping`",
    "wandb": "DeepSpeed's monitor on rank 0: local loss and learning rate of the first stage",
    "tensorboard": "as `wandb`",
    "csv_monitor": "as `wandb`",
    "comet": "as `wandb`",
    "comms_logger": "DeepSpeed's communication log",
    "log_level": "DeepSpeed's log level",
    "dump_state": "DeepSpeed prints the engine's state at start",
    "disable_python_gc": "DeepSpeed's handling of Python's garbage collection",
    "pipeline": "`activation_checkpoint_interval`: in training, so many blocks of f are recomputed together in the "
    "local backward, and only what enters them is kept; 0 is off. The blocks of an `nn.Sequential` are its children, "
    "any other f is one block",
    "checkpoint": "`tag_validation` and `parallel_write`: a tag that differs between stages is always an error, and "
    "all stages always write at once",
}
"""DeepSpeed's keys that an AL engine honours, and how."""
_PARTLY = ("gradient_clipping", "pipeline", "checkpoint")
"""Of these, the keys of which not all that they can hold is honoured."""

_OFF_BY_VALUE: dict[str, str] = {
    "fp16": 'train in fp32: remove the block or set "enabled": false',
    "bf16": 'train in fp32: remove the block or set "enabled": false',
    "bfloat16": 'train in fp32: remove the block or set "enabled": false',
    "amp": 'remove the block or set "enabled": false',
    "torch_autocast": 'remove the block or set "enabled": false',
    "flops_profiler": 'remove the block or set "enabled": false; it hooks a forward pass that a pipeline never runs',
    "curriculum_learning": "remove the block; give the engine a data iterator of your own",
    "data_efficiency": "remove the block; give the engine a data iterator of your own",
    "hybrid_engine": "remove the block",
    "autotuning": "remove the block",
    "elasticity": "remove the block",
    "compression_training": "remove the block",
    "eigenvalue": "remove the block",
    "progressive_layer_drop": "remove the block",
    "nebula": "remove the block",
}

_OF_DEEPSPEED: dict[str, str] = {
    "activation_checkpointing": "These set DeepSpeed's own checkpoint function, which AL layers do not use: remove the "
    'block, and turn checkpointing on by "pipeline": {"activation_checkpoint_interval": 1}',
    "compile": "These are passes of DeepCompile, for ZeRO and sharded layers: remove the block, and use "
    f'"{BLOCK}": {{"compile": {{}}}}',
}


def honour(config: Mapping[str, Any], al: ALConfig) -> dict[str, Any]:
    """Checks a DeepSpeed config against what an AL engine can honour.

    Returns:
        The config to give to DeepSpeed: clipping, which DeepSpeed turns on by default, is set to 0.

    Raises:
        ALConfigError: a key cannot be honoured; the message names it and what to do.
    """
    for key, value in config.items():
        if key == BLOCK or (key in DEEPSPEED_KEYS and key not in _PARTLY):
            continue
        _refuse_unless_off(key, value)
    micro_batches = config.get("gradient_accumulation_steps", 1)
    if al.steps_per_batch is not None and isinstance(micro_batches, int) and micro_batches % al.steps_per_batch:
        raise ALConfigError(
            f'"{BLOCK}.steps_per_batch": got {al.steps_per_batch}, which does not divide '
            f'"gradient_accumulation_steps" = {micro_batches}'
        )
    return {**{k: v for k, v in config.items() if k != BLOCK}, "gradient_clipping": 0.0}


def _refuse_unless_off(key: str, value: Any) -> None:
    if key == "gradient_clipping":
        if value:
            raise ALConfigError(
                f'"gradient_clipping": got {value}. It clips by a norm over all stages, for which every stage '
                f'would wait at every step: set it to 0 and use "{BLOCK}.layer_gradient_clipping"'
            )
    elif key == "checkpoint":
        if not isinstance(value, Mapping):
            raise ALConfigError(f'"checkpoint": got {value!r}, expected an object {{...}}')
        for option in sorted(set(value) - {"tag_validation", "parallel_write"}):
            if value[option]:
                raise ALConfigError(
                    f'"checkpoint.{option}": got {value[option]!r}. Checkpoints of AL engines are by layer, in a '
                    f'folder that all ranks see: remove it, and see "{BLOCK}.checkpoint"'
                )
    elif key == "zero_optimization":
        stage = value.get("stage", 0) if isinstance(value, Mapping) else value
        if stage:
            raise ALConfigError(
                f'"zero_optimization": got stage {stage}. AL stages step on their own, and ZeRO shares '
                "optimizer state over data parallel ranks, which are not supported yet: set stage 0"
            )
    elif key == "pipeline":
        _check_pipeline(value)
    elif key in _OFF_BY_VALUE:
        enabled = value.get("enabled", True) if isinstance(value, Mapping) else value
        if enabled:
            raise ALConfigError(f'"{key}" is not supported by the AL engine yet: {_OFF_BY_VALUE[key]}')
    elif key in _OF_DEEPSPEED:
        on = sorted(name for name, each in value.items() if each) if isinstance(value, Mapping) else [repr(value)]
        if on:
            raise ALConfigError(f'"{key}": got {", ".join(on)}. {_OF_DEEPSPEED[key]}')
    else:
        known = [*DEEPSPEED_KEYS, BLOCK]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else "remove it"
        raise ALConfigError(f'"{key}" is not a key that the AL engine honours: {hint}')


def _check_pipeline(value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ALConfigError(
            f'"pipeline": got {value!r}: expected an object such as {{"activation_checkpoint_interval": 1}}'
        )
    if unknown := sorted(set(value) - {"activation_checkpoint_interval"}):
        raise ALConfigError(
            f'"pipeline.{unknown[0]}" is not a key that the AL engine honours: there are as many stages as processes, '
            "and the model has the partition_method. Only activation_checkpoint_interval can be set here"
        )
    interval = value.get("activation_checkpoint_interval", 0)
    if not isinstance(interval, int) or isinstance(interval, bool) or interval < 0:
        raise ALConfigError(
            f'"pipeline.activation_checkpoint_interval": got {interval!r}: expected a number of blocks, or 0 for off'
        )
