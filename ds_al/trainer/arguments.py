"""Arguments of :class:`~ds_al.trainer.trainer.ALTrainer`: the supported subset of ``transformers.TrainingArguments``.

Batch sizes, optimizer, learning rate, clipping and precision are in the DeepSpeed config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from ds_al.config.base import StrictModel, validate
from ds_al.errors import ALConfigError
from ds_al.trainer import elsewhere

Strategy = Literal["no", "steps", "epoch"]


class ALTrainingArguments(StrictModel):
    """Arguments of :class:`~ds_al.trainer.trainer.ALTrainer`, with names and defaults of ``TrainingArguments``.

    Example:
        >>> arguments = ds_al.ALTrainingArguments(output_dir="out", max_steps=100, eval_strategy="steps", eval_steps=50)
        >>> arguments.logging_steps
        500

    Raises:
        ValueError: a name is unknown, or a value is out of range (pydantic's ``ValidationError``).
    """

    output_dir: str = Field(description="Folder of checkpoints, and of `save_model()`.")
    num_train_epochs: float = Field(default=3.0, gt=0, description="Passes over the training data.")
    max_steps: int = Field(
        default=-1, description="Number of batches to train, instead of epochs; 0 or less: `num_train_epochs` applies."
    )
    logging_strategy: Strategy = Field(default="steps", description="When losses are gathered and logged.")
    logging_steps: float = Field(
        default=500,
        gt=0,
        description="Batches between logs, or below 1 their share of the training. Each one drains the pipeline.",
    )
    logging_first_step: bool = Field(default=False, description="Logs the first batch, too.")
    eval_strategy: Strategy = Field(default="no", description="When `eval_dataset` is evaluated.")
    eval_steps: float | None = Field(
        default=None, gt=0, description="Batches between evaluations, or their share; by default `logging_steps`."
    )
    eval_delay: float = Field(default=0, ge=0, description="Batches, or epochs, before the first evaluation.")
    per_device_eval_batch_size: int = Field(default=8, ge=1, description="Samples per batch of an evaluation.")
    save_strategy: Literal["no", "steps", "epoch", "best"] = Field(
        default="steps", description="When a checkpoint is saved; `best`: after an evaluation better than all before."
    )
    save_steps: float = Field(default=500, gt=0, description="Batches between checkpoints, or their share.")
    save_total_limit: int | None = Field(
        default=None,
        ge=1,
        description="Keeps the latest so many (`associated_learning.checkpoint.keep_last`), and beside them the best "
        "with `load_best_model_at_end`.",
    )
    load_best_model_at_end: bool = Field(default=False, description="Ends on the weights of the best evaluation.")
    metric_for_best_model: str | None = Field(
        default=None, description="A metric of the evaluation, with or without `eval_`; `loss` with the key before."
    )
    greater_is_better: bool | None = Field(
        default=None, description="Of that metric; by default whether its name does not end on `loss`."
    )
    remove_unused_columns: bool = Field(
        default=True, description="Leaves out columns of a `datasets.Dataset` that no model here takes."
    )
    report_to: str | list[str] = Field(
        default="none",
        description='Loggers of transformers: "wandb", "tensorboard", "mlflow", ..., a list of them, or "all" that are '
        "installed.",
    )
    run_name: str | None = Field(default=None, description="Name of the run in loggers.")
    project: str = Field(default="huggingface", description="Name of the project in Trackio.")
    disable_tqdm: bool = Field(default=False, description="Prints logs, and shows no bar.")

    @classmethod
    def of(cls, args: ALTrainingArguments | Mapping[str, Any] | Any) -> ALTrainingArguments:
        """Returns the arguments, built from a mapping if necessary.

        Raises:
            ALConfigError: a name is unknown (the message names the corresponding config key), or the type is wrong.
        """
        if isinstance(args, cls):
            return args
        if not isinstance(args, Mapping):
            raise ALConfigError(
                f"got args of {type(args).__name__}: expected an ALTrainingArguments or a mapping. It has the names of "
                "TrainingArguments that have a meaning here; docs/trainer.md says where the others are"
            )
        _refuse(args)
        return validate(cls, args, where="args")

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, values: Any) -> Any:
        _refuse(values)
        values = dict(values)
        if values.get("load_best_model_at_end") and values.get("metric_for_best_model") is None:
            values["metric_for_best_model"] = "loss"
        if values.get("eval_steps") is None:
            values["eval_steps"] = values.get("logging_steps", 500)
        metric = values.get("metric_for_best_model")
        if metric is not None and values.get("greater_is_better") is None:
            values["greater_is_better"] = not str(metric).endswith("loss")
        return values

    @model_validator(mode="after")
    def _together(self) -> ALTrainingArguments:
        if self.save_strategy == "best" and (self.metric_for_best_model is None or self.eval_strategy == "no"):
            raise ValueError('save_strategy "best" needs metric_for_best_model and an eval_strategy')
        if not self.load_best_model_at_end:
            return self
        same = self.save_strategy == self.eval_strategy
        if self.eval_strategy == "no" or not (self.save_strategy == "best" or same):
            raise ValueError('load_best_model_at_end needs an eval_strategy, and a save_strategy like it, or "best"')
        if same and self.eval_strategy == "steps" and self.save_steps != self.eval_steps:
            raise ValueError("load_best_model_at_end needs save_steps and eval_steps to be the same")
        return self


def _refuse(args: Mapping[str, Any]) -> None:
    """Raises :class:`ALConfigError` if a name is one of ``TrainingArguments`` that belongs elsewhere."""
    for name in args:
        if name not in ALTrainingArguments.model_fields and (place := elsewhere.argument(name)):
            raise ALConfigError(f'"args.{name}": {place}')
