"""The ``"associated_learning"`` block of a DeepSpeed config, and what else of that config is honoured.

Every key is honoured or refused by name; none is ignored. ``docs/config.md`` is generated from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ds_al.config.base import BLOCK, StrictModel, validate
from ds_al.config.methods import BACKPROP_METHODS, ALMethod, BackpropMethod
from ds_al.config.optimizers import OptimizerConfig


class CompileConfig(StrictModel):
    """How ``torch.compile`` treats the functions of a layer; see :mod:`ds_al.compute.compile`."""

    functions: list[Literal["f", "b", "g", "h"]] = Field(
        default=["f", "b"], description="The functions to compile, each function of each layer separately."
    )
    backend: str = Field(default="inductor", description="Backend of `torch.compile`.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of inductor. `fallback_random` is always on: random draws are those of the uncompiled "
        "layer.",
    )

    @model_validator(mode="after")
    def _fitting(self) -> CompileConfig:
        if self.options and self.backend != "inductor":
            raise ValueError(f"options are inductor's, and the backend is {self.backend!r}: leave them out")
        if self.options.get("fallback_random", True) is not True:
            raise ValueError("fallback_random must be true: draws would not be those of the layer that is not compiled")
        return self


class TraceConfig(StrictModel):
    """What to record of the instructions that the stages execute."""

    enabled: bool = Field(default=False, description="Whether to record.")
    batches: tuple[int, int] = Field(
        default=(2, 6),
        description="First and last `train_batch()` call to record, counted from 1. After the last one the stages "
        "gather their events, which drains the pipeline once.",
    )
    folder: str = Field(
        default="trace",
        description="Folder of `trace.json` (for Perfetto and chrome://tracing) and `trace.csv`, which the last stage "
        "writes. `run/train.py` creates it in the run folder.",
    )
    memory: bool = Field(
        default=False,
        description="Whether to record the bytes that autograd holds for backward, too. This takes time: a hook per "
        "saved tensor.",
    )
    profiler_ranks: list[int] = Field(
        default_factory=list,
        description="Ranks that also run `torch.profiler` over these batches, and write `profiler-rank<n>.json` to "
        "the same folder, with ranges named `forward`, `backward` and `update`.",
    )

    @field_validator("batches")
    @classmethod
    def _ordered(cls, batches: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= batches[0] <= batches[1]:
            raise ValueError("expected [first, last] with 1 <= first <= last")
        return batches


class CheckpointConfig(StrictModel):
    """How ``save_checkpoint`` writes."""

    asynchronous: bool = Field(
        default=False,
        description="`save_checkpoint()` copies the state to the host and returns; a thread writes it while training "
        "continues. `save_checkpoint(asynchronous=...)` overrides it.",
    )
    keep_last: int | None = Field(
        default=None,
        ge=1,
        description="Number of checkpoints to keep: when a checkpoint is complete, older ones in its folder are "
        "removed. `null` keeps all.",
    )


class LinkConfig(StrictModel):
    """An artificial slow link between neighbouring stages of one machine, for tests and experiments."""

    delay_ms: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Milliseconds between sending a message and its delivery. The sender continues at once while its "
        "queue has a free slot.",
    )
    mbit: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Megabits per second, in each direction: a message starts when the previous one has been "
        "transferred. `null` is no limit.",
    )


class ALConfig(StrictModel):
    """The ``"associated_learning"`` block."""

    method: ALMethod | BackpropMethod = Field(
        default="streaming",
        description="The schedule. `streaming`: a stage sends right after its forward, then runs its local backward "
        "and steps; batches follow each other without a barrier. `forward_first`: the same with a barrier after every "
        "batch. `parallel_backward`: all stages run backward at once, after the forward of the last. `sequential`: "
        "one stage at a time. These four give identical weights. `bp_1f1b`, `bp_gpipe`, `bp_naive`: back-propagation "
        "through DeepSpeed's own engine, for a plain `PipelineModule`. `bp_dp`: the same, data parallel, for a "
        "`PipelineModule` of one stage, with a replica on every rank (`ds_al.baseline.data_parallel`).",
    )
    queue_depth: int = Field(
        default=2,
        ge=1,
        description="Number of messages to its successor that a stage may have in transit before it waits. The "
        "successor holds `receive_slots` more.",
    )
    receive_slots: int = Field(
        default=2,
        ge=2,
        description="Number of messages from its predecessor that a stage holds: the one in use and those received in "
        "advance. More slots cost memory and reduce the processor time per message.",
    )
    message_dtype: Literal["fp32", "bf16", "int8"] = Field(
        default="fp32",
        description="Wire format of float32 tensors between stages in training, for slow links. `fp32`: unchanged. "
        "`bf16`: 2 bytes per number, rounded to nearest. `int8`: 1 byte per number and 4 bytes per block of 128, in "
        "steps of 1/127 of the block's largest number; a block with NaN or infinity is received as NaN. Integers, "
        "boolean masks, losses and all messages of an evaluation are sent unchanged. With `bf16` and `int8` the "
        "weights depend on the partition, and are still the same bits for every schedule and queue depth.",
    )
    link: LinkConfig | None = Field(
        default=None,
        description="An artificial slow link between the stages on one machine, for tests and experiments; also for "
        "the `bp_*` methods, in both directions. It delays training messages only. `null` is off.",
    )
    steps_per_batch: int | None = Field(
        default=None,
        ge=1,
        description="Optimizer steps per `train_batch()`, evenly spaced; must divide the number of micro-batches "
        "(`gradient_accumulation_steps`). `null`: one step per micro-batch. Gradients between steps are averaged.",
    )
    count: Literal["batch", "step"] = Field(
        default="batch",
        description="Unit of `global_steps` and of the LR schedule: `train_batch()` calls, or optimizer steps.",
    )
    layer_gradient_clipping: float = Field(
        default=0.0,
        ge=0.0,
        description="Clips the gradients of f and b, and those of g and h, of each AL layer to this 2-norm; 0 is off. "
        "The norm is per layer, never of the whole model: for a global norm every stage would wait for all others, "
        "and with a norm per stage the result would depend on the partition.",
    )
    autoencoder_optimizer: OptimizerConfig | None = Field(
        default=None,
        description="Optimizer of g and h. `null`: the same as `optimizer`, which trains f and b, as a separate "
        "instance.",
    )
    compile: CompileConfig | None = Field(
        default=None,
        description="Compiles functions of every layer with `torch.compile`; `{}` compiles f and b with inductor. "
        "Compiled weights are the same for every schedule and number of stages; they differ from uncompiled ones by "
        "rounding. Needs a C++ compiler on CPUs, layers without graph breaks, and micro-batches of one shape. "
        "`engine.compile()` does the same.",
    )
    check_inputs: bool = Field(
        default=True,
        description="The first stage checks every micro-batch before training on it: finite inputs, integer labels "
        "within range, constant shapes. The checks run on the device of the batch, so the stage waits for no device "
        "while batches come from host memory.",
    )
    trace: TraceConfig = Field(
        default_factory=TraceConfig,
        description="What to record of the instructions that stages execute; also for the `bp_*` methods.",
    )
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig,
        description="How `save_checkpoint()` writes. Not for the `bp_*` methods, which save in DeepSpeed's own way.",
    )
    stall_seconds: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds without progress on any stage after which the watchdog of every rank prints the rank's "
        "instruction, micro-batch, what it waits for and from which rank, and its Python stack. Time that all ranks "
        "spend outside of `train_batch()` does not count. Must be longer than the slowest single instruction, such as "
        "a first forward that compiles. `null` is off. Also for the `bp_*` methods.",
    )
    on_stall: Literal["continue", "end"] = Field(
        default="continue",
        description="After a stall was printed: `continue` keeps waiting, and prints again after 2, 4, 8 ... times "
        "`stall_seconds`; `end` ends every rank with exit code 1.",
    )

    @field_validator("message_dtype")
    @classmethod
    def _of_local_learning(cls, message_dtype: str, info: ValidationInfo) -> str:
        if message_dtype != "fp32" and info.data.get("method") in BACKPROP_METHODS:
            raise ValueError("back-propagation's messages are DeepSpeed's own: expected 'fp32'")
        return message_dtype

    @field_validator("link")
    @classmethod
    def _of_pipelines(cls, link: LinkConfig | None, info: ValidationInfo) -> LinkConfig | None:
        if link is not None and info.data.get("method") == "bp_dp":
            raise ValueError("bp_dp has no messages between stages: expected null")
        return link


def al_config(config: Mapping[str, Any]) -> ALConfig:
    """The validated ``"associated_learning"`` block of a DeepSpeed config; defaults where it is absent.

    Raises:
        ALConfigError: an unknown key (the nearest valid one is named) or a value out of range.
    """
    return validate(ALConfig, config.get(BLOCK, {}), where=BLOCK)
