"""Types of the ``"associated_learning"`` block of a DeepSpeed config.

Every key is honoured or refused by name; none is ignored. ``docs/config.md`` is generated from these types.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ds_al.config.base import BLOCK, StrictModel, validate
from ds_al.config.methods import BACKPROP_METHODS, ALMethod, BackpropMethod
from ds_al.config.optimizers import OptimizerConfig


class CompileConfig(StrictModel):
    """Compilation of the functions of a layer with ``torch.compile``; see :mod:`ds_al.compute.compile`."""

    functions: list[Literal["f", "b", "g", "h"]] = Field(
        default=["f", "b"], description="Functions to compile, each function of each layer separately."
    )
    backend: str = Field(default="inductor", description="Backend of `torch.compile`.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of inductor. `fallback_random` is always true: random draws equal those of the eager "
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
    """Tracing of the instructions that the stages execute."""

    enabled: bool = Field(default=False, description="Whether to record a trace.")
    batches: tuple[int, int] = Field(
        default=(2, 6),
        strict=False,  # JSON has lists
        description="The first and the last `train_batch()` call to record, counted from 1. After the last one "
        "the stages gather their events, which drains the pipeline once.",
    )
    folder: str = Field(
        default="trace",
        description="Folder for `trace.json` (for Perfetto and chrome://tracing) and `trace.csv`, written by the "
        "last stage. `run/train.py` replaces it by the folder of the run.",
    )
    memory: bool = Field(
        default=False,
        description="Also records the memory that autograd holds for backward. This costs time: a hook per saved "
        "tensor.",
    )
    profiler_ranks: list[int] = Field(
        default_factory=list,
        description="Ranks that also run `torch.profiler` over the same batches, and write "
        "`profiler-rank<n>.json` to the same folder, with ranges named `forward`, `backward` and `update`.",
    )

    @field_validator("batches")
    @classmethod
    def _ordered(cls, batches: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= batches[0] <= batches[1]:
            raise ValueError("expected [first, last] with 1 <= first <= last")
        return batches


class CheckpointConfig(StrictModel):
    """Options of ``save_checkpoint``."""

    asynchronous: bool = Field(
        default=False,
        description="`save_checkpoint()` copies the state to the host and returns; a thread writes it while training "
        "continues. `save_checkpoint(asynchronous=...)` overrides this key.",
    )
    keep_last: int | None = Field(
        default=None,
        ge=1,
        description="Number of checkpoints to keep in a folder: older ones are removed once a new one is complete. "
        "`null` keeps all.",
    )


class RepartitionConfig(StrictModel):
    """Moving of layers between stages while they train, where a stage has become slower than others."""

    every: int = Field(
        default=100,
        ge=1,
        description="Number of `train_batch()` calls between two checks. At a check the instructions of the batch are "
        "recorded, and all ranks learn the seconds of every layer, which drains the pipeline.",
    )
    threshold: float = Field(
        default=1.2,
        gt=1.0,
        description="The layers move if the slowest stage takes more than this many times as long as that of the best "
        "partition would, at two checks one after the other.",
    )


class RecoveryConfig(StrictModel):
    """Recovery of a stage whose process has died, while the other stages go on; see ``docs/recovery.md``."""

    folder: str = Field(
        default="recovery",
        min_length=1,
        description="Folder, on a disk of each host, for what a stage saves of its own, and for `recovery.jsonl`, "
        "which tells of every death. The saves are removed when the job ends.",
    )
    every: int = Field(
        ge=1,
        description="Micro-batches between two saves of a stage; a multiple of the micro-batches of a batch. A process "
        "that takes the place of another one trains at most about so many micro-batches again.",
    )
    max_restarts: int = Field(
        default=3, ge=0, description="Number of processes of one rank that are replaced; the next death ends the job."
    )
    log: Literal["memory", "disk"] = Field(
        default="memory",
        description="Where a stage keeps the messages that it has sent since the saves of its successor.",
    )
    log_mib: float = Field(
        default=1024.0,
        gt=0,
        description="Limit of these messages in MiB, for each border between stages. A stage waits at the limit until "
        "the next one has saved; a limit below what is sent between two saves ends the job.",
    )
    standby: bool = Field(
        default=False,
        description="Whether a process of each rank, which has run the script up to where it joins the ranks, waits to "
        "take the place of one that dies: the recovery is shorter by the imports and the reading of data, whose memory "
        "is needed once more.",
    )


class LinkConfig(StrictModel):
    """Artificial slow link between neighbouring stages of one machine, for tests and experiments."""

    delay_ms: float = Field(
        default=0.0,
        ge=0,
        description="Latency in milliseconds: time from sending a message until the next stage can receive it. The "
        "sender does not wait for it, as long as its queue has a free slot.",
    )
    mbit: float | None = Field(
        default=None,
        gt=0,
        description="Bandwidth in megabits per second, in each direction: a message starts once the previous one has "
        "passed. `null` is no limit.",
    )


_LOCAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "message_dtype": (("fp32",), "back-propagation's messages are DeepSpeed's own"),
    "message_checksum": ((False,), "back-propagation's messages are DeepSpeed's own"),
    "steps_per_batch": ((None, 1), "back-propagation makes one step per batch"),
    "layer_gradient_clipping": ((0.0,), 'back-propagation clips by "gradient_clipping"'),
    "autoencoder_optimizer": ((None,), "a backprop twin has neither g nor h"),
    "compile": ((None,), "back-propagation runs the layers uncompiled"),
    "copy_inputs": ((False,), "back-propagation calls the layers as DeepSpeed does"),
    "non_finite": (("raise",), "back-propagation's steps are DeepSpeed's own"),
    "repartition": ((None,), "back-propagation keeps its partition"),
}
"""Keys that need local learning: values that a ``bp_*`` method accepts, and why it accepts no other."""


class ALConfig(StrictModel):
    """The ``"associated_learning"`` block."""

    method: Literal[ALMethod, BackpropMethod] = Field(
        default="streaming",
        description="The schedule. `streaming`: a stage sends right after its forward, then runs its local "
        "backward and steps; batches follow one another without a barrier. `forward_first`: the same with a "
        "barrier after every batch. `parallel_backward`: all stages run backward concurrently, after the forward "
        "of the last stage. `sequential`: one stage at a time. These four yield identical weights. `bp_1f1b`, "
        "`bp_gpipe`, `bp_naive`: back-propagation with DeepSpeed's own engine, for a plain `PipelineModule`. "
        "`bp_zb_h1`, `bp_zb_h2`: zero bubble, with the weights of `bp_1f1b`, in float32 without ZeRO. `bp_dualpipev`: "
        "DeepSpeed's DualPipeV (DeepSpeed 0.19.8), for a `DualPipeVModule` and at least two micro-batches per stage. "
        "`bp_async`: emulates an asynchronous pipeline, whose gradients are one step late, in a single stage; its "
        "seconds are not those of a pipeline. `bp_dp`: data parallel back-propagation, for a `PipelineModule` of a "
        "single stage, with a replica on every rank (`ds_al.baseline.data_parallel`).",
    )
    group_schedule: Literal["1f1b", "zb_h1", "zb_h2", "auto"] = Field(
        default="1f1b",
        description="Schedule inside a group of stages, where an AL layer spans several stages (K < P). `1f1b`: one "
        "forward, one backward. `zb_h1`, `zb_h2`: zero bubble, with gradients of weights put off. `auto`: the "
        "fastest of them for the size of the largest group and the micro-batches per step, by its formula, whose "
        "graphs are at most `group_graphs`.",
    )
    group_graphs: int | None = Field(
        default=None,
        ge=1,
        description="The most micro-batches whose graphs a stage of a group may hold, for `group_schedule: auto`: "
        "memory for activations, divided by that of a micro-batch. `null` is no limit.",
    )
    group_step: Literal["alone", "together"] = Field(
        default="alone",
        description="Optimizer steps of the stages of a group (K < P). `alone`: a stage steps as soon as its own "
        "gradients are complete. `together`: before each step the stages of an AL layer exchange the norms of their "
        "gradients and whether they overflow, and wait for each other, as `layer_gradient_clipping` and loss scales "
        "need it; the zero-bubble schedules then have idle time at each step.",
    )
    queue_depth: int = Field(
        default=2,
        ge=1,
        le=10_000,
        description="Maximum number of messages that a stage has in flight to its successor before it waits. The "
        "successor buffers `receive_slots` more.",
    )
    receive_slots: int = Field(
        default=2,
        ge=2,
        le=10_000,
        description="Number of messages that a stage buffers of its predecessor: the one in use, and those received "
        "ahead. More slots cost memory, and reduce processor time per message.",
    )
    message_dtype: Literal["fp32", "bf16", "int8"] = Field(
        default="fp32",
        description="Compression of float32 tensors in messages between stages in training, for slow links. `fp32`: "
        "none. `bf16`: 2 bytes per number, rounded to nearest. `int8`: block-quantized, 1 byte per number and 4 bytes "
        "per block of 128, with a step of 1/127 of the block's largest magnitude; a block with NaN or infinity is "
        "received as NaN. Integers, boolean masks, losses and all messages of evaluation are sent unchanged. With "
        "`bf16` and `int8` the weights depend on the partition, and are still bit-identical for every schedule and "
        "queue depth.",
    )
    message_checksum: bool = Field(
        default=False,
        description="Every message between stages contains a checksum of each tensor, so that the receiver raises an "
        "error that names stage, message and tensor if a bit changed on the way, before it uses the message. On a GPU "
        "the host waits for every message. Not for the `bp_*` methods.",
    )
    link: LinkConfig | None = Field(
        default=None,
        description="Artificial slow link between stages of one machine, for tests and experiments; also for the "
        "`bp_*` methods, in both directions. It delays training messages only. Refused if the stages are on several "
        "hosts, whose clocks differ. `null` is off.",
    )
    steps_per_batch: int | None = Field(
        default=None,
        ge=1,
        description="Optimizer steps per `train_batch()`, evenly spaced; must divide the number of "
        "micro-batches (`gradient_accumulation_steps`). `null`: one step per micro-batch. Gradients between "
        "steps are averaged. 1 for the `bp_*` methods.",
    )
    count: Literal["batch", "step"] = Field(
        default="batch",
        description="Unit of `global_steps` and of the LR schedule: `train_batch()` calls, or optimizer steps.",
    )
    layer_gradient_clipping: float = Field(
        default=0.0,
        ge=0.0,
        description="Clips the gradients of f and b, and those of g and h, of each AL layer to this 2-norm; "
        "0 is off. The norm is computed per layer, never over the whole model: a global norm would make every stage "
        "wait for all others, and a norm per stage would make the result depend on the partition. Not for the `bp_*` "
        "methods, which clip by `gradient_clipping`.",
    )
    autoencoder_optimizer: OptimizerConfig | None = Field(
        default=None,
        description="The optimizer of g and h, whichever loss trains them. `null`: a second instance of `optimizer`, "
        "whose first instance trains f and b, and an h that the associated loss trains (`greedy`). Not for the `bp_*` "
        "methods, which have neither.",
    )
    compile: CompileConfig | None = Field(
        default=None,
        description="Compiles functions of every layer with `torch.compile`; `{}` compiles f and b with inductor. The "
        "weights of compiled runs are identical for every schedule and number of stages; they differ from those of "
        "eager runs by rounding. Requires a C++ compiler on CPU, layers without graph breaks, and micro-batches of one "
        "shape. `engine.compile()` does the same. Not for the `bp_*` methods.",
    )
    check_inputs: bool = Field(
        default=True,
        description="The first stage checks every micro-batch before it trains on it: finite inputs, integer "
        "labels within range, constant shapes. The check runs on the device that holds the batch, so batches in host "
        "memory cause no device synchronization.",
    )
    copy_inputs: bool = Field(
        default=False,
        description="Functions of a layer get copies of their inputs in every call. By default only those that work "
        "in place do, as their first calls show; a function that works in place at times only, and in none of its "
        "first calls, raises an error which names this key. Not for the `bp_*` methods.",
    )
    non_finite: Literal["raise", "skip", "save_and_stop"] = Field(
        default="raise",
        description="What happens where an output, a loss or a gradient of a layer is NaN or infinite. `raise`: an "
        "error that names layer, function and micro-batch; on a CPU before the step, on a GPU up to 8 micro-batches "
        "later. "
        "`skip`: this layer alone does not step: its weights, buffers, optimizer state and count of steps stay as they "
        "are, and the step is counted (`skipped_steps`). The same layers skip on any partition; those after it, which "
        "receive its output, too. "
        "`save_and_stop`: it does not step either, and all ranks stop after the same batch, one or a few later, or in "
        "the next call that all of them make. They save a checkpoint, and raise an error that names it, and layer, "
        "function and micro-batch: in `checkpoints`, or as a function that `engine.stops.save` is set to does, which "
        "returns the path; by `run/train.py` in the run's folder, by an `ALTrainer` in `output_dir`. Each rank looks "
        "into the job's store once per batch. "
        "A weight that is not finite raises, at the latest 8 micro-batches later or before the next save. `skip` and "
        "`save_and_stop` are refused on GPUs, with loss scales, which skip steps themselves, where a layer spans "
        "several stages, and for the `bp_*` methods; `save_and_stop` with `recovery`, too.",
    )
    unused_parameters: Literal["raise", "allow"] | list[str] = Field(
        default="raise",
        description="Trained weights that get no gradient in the first batch, in any micro-batch on any replica: "
        "`raise` an error that names them, since they would never change; `allow` them, for experts and layers that "
        'are left out at random; or a list of patterns of names that are allowed, such as `["3.f.experts.*"]`.',
    )
    trace: TraceConfig = Field(
        default_factory=TraceConfig,
        description="Tracing of the instructions that stages execute; also for the `bp_*` methods.",
    )
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig,
        description="Options of `save_checkpoint()`. Not for the `bp_*` methods, which save as DeepSpeed does.",
    )
    repartition: RepartitionConfig | None = Field(
        default=None,
        description="Moves layers to other stages by itself where a stage has become slower, such as by another job on "
        "its host; `{}` enables it. The weights are those of a run in which no layer moves. `engine.repartition()` "
        "moves them by call. `null` is off. Not for the `bp_*` methods, nor where AL layers span stages.",
    )
    recovery: RecoveryConfig | None = Field(
        default=None,
        description="Replaces the process of a stage that has died by a new one, while those of the other stages go "
        "on, with the same bits as if nothing had happened; where an AL layer spans stages, all processes of its group "
        "are replaced. `null` is off.",
    )
    stall_seconds: float | None = Field(
        default=1800.0,
        gt=0,
        description="Timeout of the watchdog: seconds without progress on any stage after which every rank prints its "
        "instruction, micro-batch, the message and rank it waits for, and its Python stack. Evaluation counts as "
        "progress; time that all ranks spend outside of calls of the engine does not count. Must be longer than the "
        "slowest single instruction, such as a first forward that compiles. Ranks that call different methods, as "
        "`evaluate()` on one rank alone, are found within seconds. `null` is off. Also for the `bp_*` methods.",
    )
    on_stall: Literal["continue", "end"] = Field(
        default="end",
        description="Action after a stall is printed: `end` ends every rank with exit code 1; `continue` keeps "
        "waiting, and prints again after 2, 4, 8 ... times `stall_seconds`.",
    )

    @field_validator("group_graphs")
    @classmethod
    def _of_auto(cls, group_graphs: int | None, info: ValidationInfo) -> int | None:
        if group_graphs is not None and info.data.get("group_schedule") != "auto":
            raise ValueError('it is for "group_schedule": "auto", which chooses by it')
        return group_graphs

    @field_validator(*_LOCAL)
    @classmethod
    def _of_local_learning(cls, value: Any, info: ValidationInfo) -> Any:
        expected, reason = _LOCAL[info.field_name or ""]
        if info.data.get("method") in BACKPROP_METHODS and value not in expected:
            raise ValueError(f"{reason}: expected {' or '.join(json.dumps(each) for each in expected)}")
        return value

    @field_validator("link")
    @classmethod
    def _of_pipelines(cls, link: LinkConfig | None, info: ValidationInfo) -> LinkConfig | None:
        if link is not None and info.data.get("method") == "bp_dp":
            raise ValueError("bp_dp has no messages between stages: expected null")
        return link


def al_config(config: Mapping[str, Any]) -> ALConfig:
    """Returns the validated ``"associated_learning"`` block of a DeepSpeed config; defaults if it is absent.

    Raises:
        ALConfigError: a key is unknown (the nearest valid one is named) or a value is out of range.
    """
    return validate(ALConfig, config.get(BLOCK, {}), where=BLOCK)
