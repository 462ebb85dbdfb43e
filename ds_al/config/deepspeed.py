"""DeepSpeed's own config keys: those that an AL engine honours, and errors with an alternative for the others."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ds_al.config.associated_learning import ALConfig
from ds_al.config.base import BLOCK
from ds_al.config.precision import Precision
from ds_al.errors import ALConfigError

DEEPSPEED_KEYS: dict[str, str] = {
    "train_batch_size": "samples per `train_batch()`",
    "train_micro_batch_size_per_gpu": "samples per micro-batch",
    "gradient_accumulation_steps": "micro-batches per `train_batch()`; see `steps_per_batch` for optimizer steps",
    "optimizer": "the optimizer of f and b, and of g and h unless `autoencoder_optimizer` is given. Torch's SGD, and "
    'with `"torch_adam": true` its Adam and AdamW, get `"fused": true` unless `params` select an implementation',
    "scheduler": "the LR schedule, DeepSpeed's or torch's; every stage has its own instance",
    "steps_per_print": "interval in batches at which the first stage prints its local loss",
    "gradient_clipping": "0 or absent; see `layer_gradient_clipping`",
    "bf16": "bfloat16 layers with float32 masters, see below; also under DeepSpeed's older name `bfloat16`",
    "fp16": "float16 layers with float32 masters and a loss scale per AL layer, see below; if the accelerator supports "
    "it",
    "zero_optimization": "`stage` 0 or 1: at 1, the data parallel replicas of a stage shard its optimizer state and "
    "masters, weight by weight, bit-identical to stage 0. With one replica it has no effect. All other keys of the "
    "block are refused",
    "wandb": "DeepSpeed's monitor on rank 0: local loss and learning rate of the first stage",
    "tensorboard": "as `wandb`",
    "csv_monitor": "as `wandb`",
    "comet": "as `wandb`",
    "log_level": "DeepSpeed's log level",
    "dump_state": "DeepSpeed prints the engine's state at start",
    "disable_python_gc": "DeepSpeed's handling of Python's garbage collection",
    "pipeline": "`activation_checkpoint_interval`: number of consecutive blocks of f that form a segment; in training "
    "only the input of a segment is kept, and the local backward recomputes the segment; 0 is off. The blocks of an "
    "`nn.Sequential` are its children, any other f is one block",
    "checkpoint": "`tag_validation` and `parallel_write`: a tag that differs between stages is always an error, and "
    "all stages always write in parallel",
}
"""DeepSpeed's keys that an AL engine honours, and their effect."""
_PARTLY = ("gradient_clipping", "pipeline", "checkpoint")
"""Honoured keys of which some values are refused."""
_OURS = ("bf16", "bfloat16", "fp16", "zero_optimization")
"""Keys that ds_al implements itself, by layer, and removes from DeepSpeed's config."""

_OFF_BY_VALUE: dict[str, str] = {
    "amp": 'remove the block or set "enabled": false, and use "bf16"',
    "torch_autocast": 'remove the block or set "enabled": false, and use "bf16"',
    "flops_profiler": 'remove the block or set "enabled": false; it hooks a forward pass that a pipeline never runs',
    "curriculum_learning": "remove the block; give the engine a data iterator of your own",
    "data_efficiency": "remove the block; give the engine a data iterator of your own",
    "comms_logger": "messages between AL stages do not pass through the calls that DeepSpeed logs: remove the block, "
    'and read bytes and waits of messages from "associated_learning.trace" or engine.stats()',
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
    """Checks that an AL engine can honour every key of a DeepSpeed config.

    Returns:
        The config for DeepSpeed: clipping, which DeepSpeed enables by default, is set to 0; precision and ZeRO are
        removed, since ds_al implements them by layer.

    Raises:
        ALConfigError: a key cannot be honoured; the message names it and an alternative.
    """
    for key, value in config.items():
        if key == BLOCK or key in _OURS or (key in DEEPSPEED_KEYS and key not in _PARTLY):
            continue
        _refuse_unless_off(key, value)
    zero_stage(config)
    if Precision.of(config).is_low and al.message_dtype != "fp32":
        raise ALConfigError(
            f'"{BLOCK}.message_dtype": got {al.message_dtype!r} with "bf16" or "fp16": messages are then sent in the '
            "precision of the layers. Remove it"
        )
    micro_batches = config.get("gradient_accumulation_steps", 1)
    if al.steps_per_batch is not None and isinstance(micro_batches, int) and micro_batches % al.steps_per_batch:
        raise ALConfigError(
            f'"{BLOCK}.steps_per_batch": got {al.steps_per_batch}, which does not divide '
            f'"gradient_accumulation_steps" = {micro_batches}'
        )
    return {**{k: v for k, v in config.items() if k not in (BLOCK, *_OURS)}, "gradient_clipping": 0.0}


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


def zero_stage(config: Mapping[str, Any]) -> int:
    """Returns the ZeRO stage of a DeepSpeed config, 0 or 1.

    Raises:
        ALConfigError: the stage is another one, or a key of the block is not honoured.
    """
    block = config.get("zero_optimization", {})
    stage = block.get("stage", 0) if isinstance(block, Mapping) else block
    if stage is False or stage == 0:
        return 0
    if not isinstance(block, Mapping) or stage not in (1, 2, 3):
        raise ALConfigError(f'"zero_optimization": got {block!r}: expected {{"stage": 1}}, or stage 0 for off')
    if stage != 1:
        raise ALConfigError(
            f'"zero_optimization": got stage {stage}. It shards '
            + ("gradients" if stage == 2 else "gradients and weights")
            + " too, which a stage holds for its own layers alone, and frees at every step: set stage 1, or more stages"
        )
    if rest := sorted(set(block) - {"stage"}):
        raise ALConfigError(
            f'"zero_optimization.{rest[0]}": got {block[rest[0]]!r}. It is about the vectors that DeepSpeed joins '
            "weights to; here whole weights are sharded over the replicas of a stage: remove it"
        )
    return 1
