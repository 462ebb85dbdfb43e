"""DeepSpeed's own config keys: those that an AL engine honours, and errors with an alternative for the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_al.config.associated_learning import ALConfig
from ds_al.config.base import BLOCK, nearest, validate
from ds_al.config.passed import PassedKeys
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
    'block are refused, unless they are off or "auto"; at stage 0 they have no effect',
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
    "zero_allow_untested_optimizer": "any optimizer is allowed with ZeRO here",
    "zero_force_ds_cpu_optimizer": "no effect: it is for offload, which is refused",
    "checkpoint": "`tag_validation` and `parallel_write`: a tag that differs between stages is always an error, and "
    "all stages always write in parallel",
}
"""DeepSpeed's keys that an AL engine honours, and their effect."""
_PARTLY = ("gradient_clipping", "pipeline", "checkpoint")
"""Honoured keys of which some values are refused."""
_ZERO = ("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")
_OURS = ("bf16", "bfloat16", "fp16", *_ZERO)
"""Keys that ds_al implements itself, by layer, and removes from DeepSpeed's config."""

_TRAFFIC = "replicas average gradients weight by weight, in their own precision: remove it"
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
    "datastates_ckpt": "remove the block",
    "weight_quantization": "remove the block",
    "tensor_parallel": "remove the block",
    "expert_parallel": "remove the block",
    "sparse_attention": "remove the block",
    "quantize_training": "remove the block",
    "aio": "it is for offload to disks, which no AL engine does: remove the block",
    "data_types": "replicas average gradients in the precision of the layers: remove the block",
    "wall_clock_breakdown": 'remove it, and read times from "associated_learning.trace" or engine.stats()',
    "memory_breakdown": 'remove it, and use "associated_learning.trace": {"memory": true}',
    "prescale_gradients": _TRAFFIC,
    "gradient_predivide_factor": _TRAFFIC,
    "gradient_allreduce_op": _TRAFFIC,
    "communication_data_type": _TRAFFIC,
    "seq_parallel_communication_data_type": _TRAFFIC,
    "disable_allgather": _TRAFFIC,
    "sparse_gradients": "gradients of embeddings are averaged as dense ones: remove it",
    "dataloader_drop_last": "remove it; the loader always drops the samples that fill no micro-batch",
    "use_data_before_expert_parallelism": "remove it",
    "managed_gradient_accumulation": f'remove it, and see "{BLOCK}.steps_per_batch"',
    "sequence_parallel_size": "remove it",
    "vocabulary_size": "remove it; it is only for a warning of DeepSpeed",
    "timers": "remove the block",
}
_NEUTRAL = {"gradient_predivide_factor": 1, "sequence_parallel_size": 1, "gradient_allreduce_op": "mean"}
"""Values, other than false, null, 0 and empty ones, that turn a key off."""

_OF_DEEPSPEED: dict[str, str] = {
    "activation_checkpointing": "These set DeepSpeed's own checkpoint function, which AL layers do not use: remove the "
    'block, and turn checkpointing on by "pipeline": {"activation_checkpoint_interval": 1}',
    "compile": "These are passes of DeepCompile, for ZeRO and sharded layers: remove the block, and use "
    f'"{BLOCK}": {{"compile": {{}}}}',
}


def check_keys(config: Mapping[str, Any]) -> None:
    """Checks what holds with every method, AL or ``bp_*``: names of keys, types of values, and no ``"auto"``.

    Raises:
        ALConfigError: a key is none of DeepSpeed's (the nearest is named), a value has the wrong type, or says "auto".
    """
    known = {*DEEPSPEED_KEYS, *_OFF_BY_VALUE, *_OF_DEEPSPEED, "bfloat16", BLOCK}
    for key in config:
        if key == "experiment":
            raise ALConfigError('"experiment" is the block of run/train.py, which takes it out: remove it')
        if key not in known:
            hint = nearest(key, known, cutoff=0.6, otherwise="remove it")
            raise ALConfigError(f'"{key}" is not a key that DeepSpeed or the AL engine honours: {hint}')
    validate(PassedKeys, {key: value for key, value in config.items() if key in PassedKeys.model_fields})
    for key, value in config.items():
        if key not in (BLOCK, "zero_optimization"):
            _refuse_auto(key, value)


def _refuse_auto(path: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if key != "ns_dtype":  # MuonAdamW's own "auto"
                _refuse_auto(f"{path}.{key}", entry)
    elif value == "auto":
        raise ALConfigError(
            f'"{path}": got "auto", which transformers\' Trainer replaces by a training argument: there is none here, '
            "set the value"
        )


def honour(config: Mapping[str, Any], al: ALConfig) -> dict[str, Any]:
    """Checks that an AL engine can honour every key of a DeepSpeed config.

    Returns:
        The config for DeepSpeed: clipping, which DeepSpeed enables by default, is set to 0; precision and ZeRO are
        removed, since ds_al implements them by layer, and so is what is off.

    Raises:
        ALConfigError: a key cannot be honoured; the message names it and an alternative.
    """
    check_keys(config)
    for key, value in config.items():
        if key not in DEEPSPEED_KEYS or key in _PARTLY:
            _refuse_unless_off(key, value)
    zero_stage(config)
    if Precision.of(config).is_low and al.message_dtype != "fp32":
        raise ALConfigError(
            f'"{BLOCK}.message_dtype": got {al.message_dtype!r} with "bf16" or "fp16": messages are then sent in the '
            "precision of the layers. Remove it"
        )
    micro_batches = config.get("gradient_accumulation_steps") or 1
    if al.steps_per_batch is not None and micro_batches % al.steps_per_batch:
        raise ALConfigError(
            f'"{BLOCK}.steps_per_batch": got {al.steps_per_batch}, which does not divide '
            f'"gradient_accumulation_steps" = {micro_batches}'
        )
    passed = {key: value for key, value in config.items() if key in DEEPSPEED_KEYS and key not in _OURS}
    return {**passed, "gradient_clipping": 0.0}


def _refuse_unless_off(key: str, value: Any) -> None:
    if key == "gradient_clipping":
        if value:
            raise ALConfigError(
                f'"gradient_clipping": got {value}. It clips by a norm over all stages, for which every stage '
                f'would wait at every step: set it to 0 and use "{BLOCK}.layer_gradient_clipping"'
            )
    elif key == "checkpoint":
        _check_checkpoint(value)
    elif key == "pipeline":
        _check_pipeline(value)
    elif key in _OFF_BY_VALUE:
        if not _is_off(key, value):
            raise ALConfigError(f'"{key}" is not supported by the AL engine: got {value!r}. {_OFF_BY_VALUE[key]}')
    elif key in _OF_DEEPSPEED:
        on = sorted(name for name, each in value.items() if each) if isinstance(value, Mapping) else [repr(value)]
        if on:
            raise ALConfigError(f'"{key}": got {", ".join(on)}. {_OF_DEEPSPEED[key]}')


def _is_off(key: str, value: Any) -> bool:
    if isinstance(value, Mapping):
        return not value.get("enabled", any(not _is_off(name, entry) for name, entry in value.items()))
    return not value or (key in _NEUTRAL and value == _NEUTRAL[key] and value is not True)


def _check_checkpoint(value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ALConfigError(f'"checkpoint": got {value!r}, expected an object {{...}}')
    known = ("tag_validation", "parallel_write", "load_universal", "use_node_local_storage", "writer")
    for option in value:
        if option not in known:
            raise ALConfigError(f'"checkpoint.{option}" is not a key of this block: {nearest(option, known)}')
        if value[option] and option not in known[:2]:
            raise ALConfigError(
                f'"checkpoint.{option}": got {value[option]!r}. Checkpoints of AL engines are by layer, in a '
                f'folder that all ranks see: remove it, and see "{BLOCK}.checkpoint"'
            )


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
    block = config.get("zero_optimization") or {}
    stage = block.get("stage", 0) if isinstance(block, Mapping) else block
    if not isinstance(block, Mapping) or isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ALConfigError(f'"zero_optimization": got {block!r}: expected {{"stage": 1}}, or stage 0 for off')
    known = _zero_keys()
    if unknown := [key for key in block if key not in known]:
        raise ALConfigError(
            f'"zero_optimization.{unknown[0]}" is not a key of this block: '
            + nearest(unknown[0], known, otherwise="remove it")
        )
    if stage in (2, 3):
        raise ALConfigError(
            f'"zero_optimization": got stage {stage}. It shards '
            + ("gradients" if stage == 2 else "gradients and weights")
            + " too, which a stage holds for its own layers alone, and frees at every step: set stage 1, or more stages"
        )
    on = sorted(key for key, value in block.items() if key != "stage" and value not in (False, None, "auto"))
    if stage == 1 and on:
        raise ALConfigError(
            f'"zero_optimization.{on[0]}": got {block[on[0]]!r}. It is about the vectors that DeepSpeed joins '
            "weights to; here whole weights are sharded over the replicas of a stage: remove it"
        )
    return int(stage)


def _zero_keys() -> set[str]:
    """Returns the names that DeepSpeed's block has."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # late: reading most configs needs no DeepSpeed

    return {name for key, field in DeepSpeedZeroConfig.model_fields.items() for name in (key, field.alias) if name}
