"""The ``"experiment"`` block of a config file: model, data, length and logging of one run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from ds_al.config.base import StrictModel, validate
from ds_al.data.config import DataConfig
from ds_al.errors import ALConfigError

BLOCK = "experiment"


class ModelConfig(StrictModel):
    """Which network."""

    name: str = Field(description="A name of `ds_al.models.AL_MODELS`; a `bp_*` method takes its twin.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Keyword arguments of both forms; `num_classes`, and `in_shape` or `vocab_size`, `padding_id` and "
        "`max_length`, come from the data.",
    )
    al_options: dict[str, Any] = Field(default_factory=dict, description="More of them, for the AL form alone.")
    twin_options: dict[str, Any] = Field(default_factory=dict, description="More of them, for the backprop twin alone.")


class WandbConfig(StrictModel):
    """Weights & Biases. `WANDB_MODE` overrides; without an account a run is kept offline, and never asks."""

    enabled: bool = Field(default=True, description="Log to W&B at all.")
    project: str = Field(default="ds_al", description="W&B project.")
    entity: str | None = Field(default=None, description="W&B entity.")
    group: str | None = Field(
        default=None,
        description="W&B group; by default the experiment's name, so that methods stand together. Cells of a suite "
        "have the suite's name and their group's.",
    )
    tags: list[str] = Field(default_factory=list, description="W&B tags.")
    checkpoints: bool = Field(default=False, description="Log the last epoch's checkpoint as an artifact.")


class ExperimentConfig(StrictModel):
    """The ``"experiment"`` block."""

    name: str = Field(description="Name of the run; its files go to `<output>/<name>/<time>/`.")
    model: ModelConfig = Field(description="Which network.")
    data: DataConfig = Field(description="Which data.")
    recipe: str | None = Field(
        default=None,
        description="`ours` fills in the optimizer and the model's `al_options`, where the config leaves them out, "
        "by what was chosen for this kind of network (docs/accuracy.md).",
    )
    epochs: int = Field(ge=1, description="Passes over the training samples.")
    label_smoothing: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Share of a label that the loss of a `bp_*` method spreads over all classes; by default 0, or the "
        "recipe's. An AL objective has an option of this name.",
    )
    max_batches: int | None = Field(
        default=None,
        ge=1,
        description="Ends training after so many batches, in the middle of an epoch; the LR schedule ends there, too.",
    )
    max_seconds: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Ends training with the epoch in which its time, without "
        "that of evaluations, exceeds this. A resumed run counts from 0."
    )  # fmt: skip
    seed: int = Field(default=0, ge=0, description="Of weights, dropout, data order and validation split.")
    num_stages: int | None = Field(
        default=None,
        ge=1,
        description="Stages of the pipeline; by default the number of processes, which must be a multiple of it. With "
        "fewer there are data parallel copies, each of which takes `gradient_accumulation_steps` micro-batches of a "
        "batch. With `bp_dp` every process is a replica, and they share those micro-batches.",
    )
    partition_method: str = Field(
        default="uniform",
        description="How layers are dealt out to stages: `uniform`, `parameters`, `type:<regex>`; for AL methods also "
        "`measured`, by the time that each layer takes on each rank at start, and `cuts:2,5`, where the stages after "
        "the first one begin.",
    )
    partition_memory: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="With `measured`: GiB that a stage may need at most, of "
        "parameters, gradients, optimizer state and activations."
    )  # fmt: skip
    partition_cache: Literal["use", "refresh", "off"] = Field(
        default="use",
        description="With `measured`: take what an earlier job measured for the same layers on the same kind of "
        "devices, measure again, or keep nothing. Files lie in `$DS_AL_CACHE`, by default `~/.cache/ds_al`.",
    )
    evaluate_every: int = Field(default=1, ge=1, description="Epochs between looks at the validation samples.")
    evaluate_fully: bool = Field(
        default=False,
        description="For comparisons: also looks at the test samples whenever the validation accuracy is the best so "
        "far, which is reported and never chosen by, and at the training samples at the end.",
    )
    test: bool = Field(
        default=True, description="Looks at the test samples, at the end; off while settings are being chosen."
    )
    exit_confidence: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=list,
        description="For each of these softmax probabilities: accuracy and cost where a test sample leaves at the "
        "first exit that is so sure of a class. Of AL methods; the twin has one exit.",
    )
    keep_freed_memory: bool = Field(
        default=True,
        description="On CPUs with glibc: what a step frees stays with the process for the next one, instead of being "
        "paged in anew.",
    )
    checkpoint_every: int = Field(
        default=0, ge=0, description="Epochs between checkpoints; 0 keeps the last epoch's alone."
    )
    output: str = Field(default="runs", description="Folder of all runs.")
    wandb: WandbConfig = Field(default_factory=WandbConfig, description="Weights & Biases.")


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
        ALConfigError: an assignment has no ``=``, or its path leads through something that is no object.
    """
    config = json.loads(json.dumps(config))
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise ALConfigError(f"got --set {assignment!r}: expected key.path=value")
        *parents, leaf = path.split(".")
        block = config
        for key in parents:
            block = block.setdefault(key, {})
            if not isinstance(block, dict):
                raise ALConfigError(f"got --set {assignment!r}: {key!r} is no object in this config")
        try:
            block[leaf] = json.loads(text)
        except json.JSONDecodeError:
            block[leaf] = text
    return config
