"""Where settings of transformers' ``Trainer`` are that :class:`~ds_al.trainer.trainer.ALTrainer` does not take."""

from __future__ import annotations

from collections.abc import Iterable

_CONFIG = {
    "per_device_train_batch_size": "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "learning_rate": "optimizer.params.lr",
    "weight_decay": "optimizer.params.weight_decay",
    "adam_beta1": "optimizer.params.betas",
    "adam_beta2": "optimizer.params.betas",
    "adam_epsilon": "optimizer.params.eps",
    "optim": "optimizer.type",
    "optim_args": "optimizer.params",
    "lr_scheduler_type": "scheduler.type",
    "lr_scheduler_kwargs": "scheduler.params",
    "warmup_steps": "scheduler.params.warmup_num_steps",
    "warmup_ratio": "scheduler.params.warmup_num_steps",
    "max_grad_norm": "associated_learning.layer_gradient_clipping",
    "bf16": "bf16.enabled",
    "fp16": "fp16.enabled",
    "torch_compile": "associated_learning.compile",
    "torch_compile_backend": "associated_learning.compile",
    "torch_compile_mode": "associated_learning.compile",
}
"""Maps names of ``TrainingArguments`` to keys of the DeepSpeed config."""

_INSTEAD = {
    "seed": "base_seed of from_pretrained or of the module",
    "data_seed": "base_seed of from_pretrained or of the module",
    "full_determinism": "nothing: weights do not depend on the run",
    "gradient_checkpointing": "activation_checkpointing_enable() of the model before from_pretrained",
    "activation_checkpointing": "activation_checkpointing_enable() of the model before from_pretrained",
    "gradient_checkpointing_kwargs": "activation_checkpointing_enable(...) of the model before from_pretrained",
    "activation_checkpointing_kwargs": "activation_checkpointing_enable(...) of the model before from_pretrained",
    "label_smoothing_factor": 'the objective, {"name": "greedy", "label_smoothing": 0.1}',
    "deepspeed": "ALTrainer(config=...)",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
    "resume_from_checkpoint": "train(resume_from_checkpoint=...)",
    "do_train": "train()",
    "do_eval": "evaluate(), or eval_strategy",
    "do_predict": "predict()",
    "dataloader_drop_last": "nothing: training uses full micro-batches alone",
    "eval_accumulation_steps": "preprocess_logits_for_metrics of ALTrainer",
    "label_names": "batch_fn of ALTrainer",
    "push_to_hub": "save_model(), and push_to_hub of the plain model",
    "local_rank": "the launcher: deepspeed, torchrun or srun",
    "use_cpu": "the environment variable DS_ACCELERATOR",
}
"""What to use instead of other names of ``TrainingArguments``."""

_PARAMETERS = {
    "tokenizer": "processing_class",
    "model_init": "model, made before",
    "optimizers": "the DeepSpeed config, or ds_al.initialize(optimizer=...) and a loop of your own",
    "optimizer_cls_and_kwargs": "the DeepSpeed config",
    "compute_loss_func": "the objective of from_pretrained",
}
"""What to use instead of parameters of ``Trainer``."""


def argument(name: str) -> str | None:
    """Returns where a name of ``TrainingArguments`` is here, or ``None`` for a name that it does not have either."""
    if name in _CONFIG:
        return f'give it in the DeepSpeed config, as "{_CONFIG[name]}"'
    if name in _INSTEAD:
        return f"ALTrainer has no such argument: use {_INSTEAD[name]}"
    from transformers import TrainingArguments  # lazy: takes seconds to import

    if name in TrainingArguments.__dataclass_fields__:
        return "an argument of TrainingArguments without a meaning here: leave it out"
    return None


def parameters(names: Iterable[str]) -> str:
    """Returns the message for keyword arguments that ``ALTrainer`` does not have."""
    return "; ".join(
        f"ALTrainer has no {name!r}" + (f": use {_PARAMETERS[name]}" if name in _PARAMETERS else "") for name in names
    )
