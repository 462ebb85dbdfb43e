"""The ``"experiment"`` block of a config file: model, data, length and logging of one run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ds_al.config.base import StrictModel, checked, parse, validate
from ds_al.data.config import DataConfig
from ds_al.errors import ALConfigError

BLOCK = "experiment"


class ModelConfig(StrictModel):
    """Which network."""

    name: str = Field(description="A name of `ds_al.models.AL_MODELS`; a `bp_*` method uses its twin.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Keyword arguments of both forms; `num_classes`, and `in_shape` or `vocab_size`, `padding_id` and "
        "`max_length`, are set from the data.",
    )
    al_options: dict[str, Any] = Field(default_factory=dict, description="Further arguments, for the AL form only.")
    twin_options: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments, for the backprop twin only."
    )


class WandbConfig(StrictModel):
    """Weights & Biases. A key that is set here wins over W&B's variables (`WANDB_PROJECT`, `WANDB_NAME`, ...) and
    settings files, and these over the defaults. `WANDB_MODE` always wins; without an account a run is kept offline, and
    never asks."""

    enabled: bool = Field(default=True, description="Whether to log to W&B.")
    project: str = Field(default="ds_al", description="W&B project (`WANDB_PROJECT`).")
    entity: str | None = Field(default=None, description="W&B entity (`WANDB_ENTITY`).")
    name: str | None = Field(
        default=None, description="Name of the W&B run (`WANDB_NAME`); by default experiment, method and time."
    )
    notes: str | None = Field(default=None, description="Notes on the W&B run (`WANDB_NOTES`).")
    group: str | None = Field(
        default=None,
        description="W&B group (`WANDB_RUN_GROUP`); by default the experiment's name, so that all methods are in one "
        "group. Runs of a suite have the suite's name and that of their group.",
    )
    tags: list[str] = Field(default_factory=list, description="W&B tags (`WANDB_TAGS`).")
    checkpoints: bool = Field(default=False, description="Log the last epoch's checkpoint as an artifact.")
    system_metrics: bool = Field(default=True, description="Log use of processors, GPUs and memory.")
    console: bool = Field(default=True, description="Log what the process of the last stage prints (`WANDB_CONSOLE`).")


class ExperimentConfig(StrictModel):
    """The ``"experiment"`` block."""

    name: str = Field(
        description="Name of the run; its files go to `<output>/<name>/<time>/`. It is the name of one folder: no "
        "separator, not `.` or `..`, 100 bytes at most."
    )
    model: ModelConfig = Field(description="The network.")
    data: DataConfig = Field(description="The data.")
    recipe: str | None = Field(
        default=None,
        description="`ours` sets the optimizer and the model's `al_options`, unless the config sets them, to the "
        "values chosen for this kind of network; `many_classes`, for the `vgg`, to those chosen for 100 classes "
        "(docs/accuracy.md).",
    )
    epochs: int = Field(ge=1, description="Passes over the training samples.")
    label_smoothing: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Share of a label that the loss of a `bp_*` method distributes over all classes; by default 0, or "
        "the recipe's. An AL objective has an option of this name.",
    )
    max_batches: int | None = Field(
        default=None,
        ge=1,
        description="Ends training after this number of batches, even within an epoch; the LR schedule ends there, "
        "too.",
    )
    max_seconds: float | None = Field(
        default=None, gt=0, description="Ends training after the epoch in which the training "
                                                 "time, without evaluations, exceeds this. A run that is resumed in a "
                                                 "new folder counts from 0."
    )  # fmt: skip
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="Seed of weights, dropout, data order and validation split."
    )
    num_stages: int | None = Field(
        default=None,
        ge=1,
        description="Stages of the pipeline; by default the number of processes, which must be a multiple of it. "
        "Fewer stages than processes give data parallel replicas, each of which processes "
        "`gradient_accumulation_steps` micro-batches of a batch. With `bp_dp` every process is a replica, and they "
        "share those micro-batches.",
    )
    partition_method: str = Field(
        default="uniform",
        description="How layers are distributed over stages: `uniform`, `parameters`, `type:<regex>`; for AL methods "
        "also `measured`, by the time that each layer takes on each rank at start, and `cuts:2,5`, the first layers "
        "of the stages after the first.",
    )
    partition_memory: float | None = Field(
        default=None, gt=0, description="With `measured`: upper bound of a stage's memory in "
                                                 "GiB, for parameters, gradients, optimizer state and activations."
    )  # fmt: skip
    partition_cache: Literal["use", "refresh", "off"] = Field(
        default="use",
        description="With `measured`: use the measurements of an earlier job with the same layers on the same kind of "
        "devices, measure again, or neither read nor write the cache. Its folder is `$DS_AL_CACHE`, by default "
        "`~/.cache/ds_al`.",
    )
    evaluate_every: int = Field(default=1, ge=1, description="Epochs between evaluations on the validation samples.")
    evaluate_fully: bool = Field(
        default=False,
        description="For comparisons: also evaluates on the test samples whenever the validation accuracy is the best "
        "so far (reported, never used for a choice), and on the training samples at the end.",
    )
    test: bool = Field(
        default=True, description="Whether to evaluate on the test samples at the end; off while settings are chosen."
    )
    exit_confidence: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=list,
        description="For each of these softmax probabilities, reports accuracy and cost if a test sample leaves at "
        "the first exit that is as confident of a class. For AL methods; the twin has one exit.",
    )
    keep_freed_memory: bool = Field(
        default=True,
        description="On CPUs with glibc: the process keeps freed memory for the next step, which avoids page faults.",
    )
    checkpoint_every: int = Field(
        default=1,
        ge=0,
        description="Epochs between checkpoints; 0 saves only that of the last epoch. The last two are kept, unless "
        "`associated_learning.checkpoint.keep_last` is set, `null` for all.",
    )
    checkpoint_batches: int | None = Field(
        default=None,
        ge=1,
        description="Batches between further checkpoints, within an epoch; `null` saves none there.",
    )
    log_every: int = Field(
        default=10,
        ge=1,
        description="Batches between rows of losses, learning rate and samples per second that are logged as they "
        "happen, to `metrics.jsonl` and W&B. The losses of earlier stages are the latest that the last one knows of.",
    )
    output: str = Field(
        default="runs", min_length=1, description="Folder of all runs. A `~` in front is the home folder."
    )
    wandb: WandbConfig = Field(default_factory=WandbConfig, description="Weights & Biases.")

    @field_validator("name")
    @classmethod
    def _of_one_folder(cls, name: str) -> str:
        if not name.strip() or name in (".", "..") or {"/", "\\"} & set(name) or len(name.encode()) > 100:
            raise ValueError("expected a name for one folder: not empty, no / or \\, not . or .., 100 bytes at most")
        return name


def experiment_config(config: Mapping[str, Any]) -> ExperimentConfig:
    """Validates the ``"experiment"`` block.

    Raises:
        ALConfigError: the block is missing, a key is unknown, or a value is out of range.
    """
    if BLOCK not in config:
        raise ALConfigError(f'the config has no "{BLOCK}" block: run/train.py needs model, data and epochs from it')
    return validate(ExperimentConfig, config[BLOCK], where=BLOCK)


def check_partition(experiment: ExperimentConfig) -> None:
    """Refuses the options of ``"measured"`` for any other ``partition_method``.

    Raises:
        ALConfigError: such an option is set.
    """
    if experiment.partition_method == "measured":
        return
    for key in ("partition_memory", "partition_cache"):
        if getattr(experiment, key) != ExperimentConfig.model_fields[key].default:
            raise ALConfigError(
                f'"{BLOCK}.{key}" with partition_method {experiment.partition_method!r}: it is for "measured", '
                "leave it out"
            )


def override(config: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Sets ``a.b.c=value`` in a config; values are JSON, or else strings.

    Raises:
        ALConfigError: an assignment has no ``=``, its path leads through something that is no object, or its value is
            none that a file could hold (:func:`~ds_al.config.base.checked`).
    """
    config = checked(config)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not all(path.split(".")):
            raise ALConfigError(f"got --set {assignment!r}: expected key.path=value")
        *parents, leaf = path.split(".")
        block = config
        for key in parents:
            block = block.setdefault(key, {})
            if not isinstance(block, dict):
                raise ALConfigError(f"got --set {assignment!r}: {key!r} is no object in this config")
        try:
            block[leaf] = parse(text)
        except json.JSONDecodeError:
            block[leaf] = text
        except ValueError as error:
            raise ALConfigError(f"got --set {assignment!r}: {error}") from error
    return checked(config)
