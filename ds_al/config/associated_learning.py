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
        default=["f", "b"], description="What to compile, each function of each layer by itself."
    )
    backend: str = Field(default="inductor", description="Of `torch.compile`.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Of inductor. `fallback_random` is always on: draws are those of the layer that is not compiled.",
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

    enabled: bool = Field(default=False, description="Record.")
    batches: tuple[int, int] = Field(
        default=(2, 6),
        description="The first and the last `train_batch()` call to record, counted from 1. After the last one "
        "the stages bring their events together, which drains the pipeline once.",
    )
    folder: str = Field(
        default="trace",
        description="Where `trace.json` (for Perfetto and chrome://tracing) and `trace.csv` go, written by the "
        "last stage. `run/train.py` puts them into the run's own folder.",
    )
    memory: bool = Field(
        default=False,
        description="Also record how much autograd holds for backward. This takes time: a hook per saved tensor.",
    )
    profiler_ranks: list[int] = Field(
        default_factory=list,
        description="Ranks that run `torch.profiler` over the same batches, too, and write "
        "`profiler-rank<n>.json` to the same folder, with ranges named `forward`, `backward` and `update`.",
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
        "goes on. `save_checkpoint(asynchronous=...)` overrides it.",
    )
    keep_last: int | None = Field(
        default=None,
        ge=1,
        description="Once a checkpoint is complete, all but the latest so many in its folder are removed.",
    )


class LinkConfig(StrictModel):
    """An artificial slow link between neighbouring stages of one machine, for tests and experiments."""

    delay_ms: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Milliseconds from the moment a message is sent until the next stage can have it. The sender goes "
        "on at once, as long as its queue has a free slot.",
    )
    mbit: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Megabits per second, in each direction: a message starts when the one before it is through. "
        "`null` is no limit.",
    )


class ALConfig(StrictModel):
    """The ``"associated_learning"`` block."""

    method: ALMethod | BackpropMethod = Field(
        default="streaming",
        description="The schedule. `streaming`: a stage sends right after its forward, then runs its local "
        "backward and steps; batches follow one another with no barrier. `forward_first`: the same with a "
        "barrier after every batch. `parallel_backward`: all stages run backward at once, after the forward "
        "of the last. `sequential`: one stage at a time. These four end on identical weights. `bp_1f1b`, "
        "`bp_gpipe`, `bp_naive`: back-propagation through DeepSpeed's own engine, for a plain "
        "`PipelineModule`. `bp_dp`: the same, data parallel, for one of a single stage, a replica on every rank "
        "(`ds_al.baseline.data_parallel`).",
    )
    queue_depth: int = Field(
        default=2,
        ge=1,
        description="Messages that a stage may have on their way to its successor before it waits. The "
        "successor holds `receive_slots` more.",
    )
    receive_slots: int = Field(
        default=2,
        ge=2,
        description="Messages that a stage holds of its predecessor: the one it works on, and those it receives ahead. "
        "More cost memory, and take less processor time per message.",
    )
    message_dtype: Literal["fp32", "bf16", "int8"] = Field(
        default="fp32",
        description="What float32 tensors travel as from stage to stage while training, for slow links. `fp32`: as "
        "they are. `bf16`: 2 bytes a number, rounded to the nearest. `int8`: 1 byte a number and 4 bytes a block of "
        "128, a step being 1/127 of the block's largest number; a block with NaN or infinity arrives as NaN. Integers, "
        "masks of booleans, losses and all messages of evaluation travel as they are. With `bf16` and `int8` the "
        "weights depend on where the network is cut, and are still the same bits for every schedule and queue depth.",
    )
    link: LinkConfig | None = Field(
        default=None,
        description="An artificial slow link between stages of one machine, for tests and experiments; for the `bp_*` "
        "methods, too, in both directions. Slows the messages of training alone. `null` is off.",
    )
    steps_per_batch: int | None = Field(
        default=None,
        ge=1,
        description="Optimizer steps per `train_batch()`, at equal distances; must divide the number of "
        "micro-batches (`gradient_accumulation_steps`). `null`: one step per micro-batch. Gradients between "
        "steps are averaged.",
    )
    count: Literal["batch", "step"] = Field(
        default="batch",
        description="What `global_steps` and the LR schedule count: `train_batch()` calls, or optimizer steps.",
    )
    layer_gradient_clipping: float = Field(
        default=0.0,
        ge=0.0,
        description="Clips the gradients of f and b, and those of g and h, of each AL layer to this 2-norm; "
        "0 is off. The norm is of one layer, never of the whole model: a global norm would make every stage "
        "wait for all others, and the result would depend on the partition if it were a stage's.",
    )
    autoencoder_optimizer: OptimizerConfig | None = Field(
        default=None,
        description="The optimizer of g and h. `null`: the same as `optimizer`, which then trains f and b, "
        "in an instance of its own.",
    )
    compile: CompileConfig | None = Field(
        default=None,
        description="Compiles functions of every layer with `torch.compile`; `{}` is f and b with inductor. Weights "
        "are the same for every schedule and number of stages, compiled like compiled; to the plain ones they differ "
        "by rounding. Needs a C++ compiler on CPU, layers without graph breaks, and micro-batches of one shape. "
        "`engine.compile()` does the same.",
    )
    check_inputs: bool = Field(
        default=True,
        description="The first stage checks every micro-batch before it trains on it: finite inputs, integer "
        "labels within range, constant shapes. Done where the batch lies, so no device is waited for as long "
        "as batches come from host memory.",
    )
    trace: TraceConfig = Field(
        default_factory=TraceConfig,
        description="What to record of the instructions that stages execute; for the `bp_*` methods, too.",
    )
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig,
        description="How `save_checkpoint()` writes. Not for the `bp_*` methods, which save as DeepSpeed does.",
    )
    stall_seconds: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds without progress on any stage after which every rank prints where it is: its "
        "instruction, micro-batch, what it waits for and from whom, and its Python stack. Time that all ranks "
        "spend outside of `train_batch()` does not count. Must be longer than the slowest single instruction, such "
        "as a first forward that compiles. `null` is off. For the `bp_*` methods, too.",
    )
    on_stall: Literal["continue", "end"] = Field(
        default="continue",
        description="After a stall is printed: `continue` waits on, and prints again after 2, 4, 8 ... times "
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
