"""``partition_method: measured``: all ranks measure all layers and choose the partition with the fastest slowest
stage."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from ds_al.compute.compile import compile_layer
from ds_al.compute.recompute import Recomputed
from ds_al.config import deepspeed as deepspeed_keys
from ds_al.config.associated_learning import ALConfig, al_config
from ds_al.config.optimizers import OptimizerConfig
from ds_al.errors import ALConfigError
from ds_al.layer import ALLayer
from ds_al.optim import names as optimizer_names
from ds_al.optim.local import LocalOptimizer
from ds_al.partition import cache as time_cache
from ds_al.partition.groups import Run, spread
from ds_al.partition.layer_times import MakeOptimizer, adamw, measure
from ds_al.partition.plan import balance
from ds_al.system import provenance
from ds_al.tensors import Activation

Build = Callable[[int], ALLayer]


@dataclass(frozen=True)
class Measuring:
    """Options of the measurement."""

    example: Activation
    """A micro-batch ``x``."""
    num_classes: int
    config: Mapping[str, Any]
    """The DeepSpeed config of the run; may be empty."""
    memory_limit: float | Sequence[float] | None = None
    """Maximum bytes of a stage, or of each stage."""
    cache: Literal["use", "refresh", "off"] = "use"
    interval: int = 0
    """Interval of activation checkpointing, unless the config has one."""

    def __post_init__(self) -> None:
        if self.cache not in ("use", "refresh", "off"):
            raise ALConfigError(f'partition_cache: got {self.cache!r}: expected "use", "refresh" or "off"')


@dataclass(frozen=True)
class Found:
    """The chosen partition and the measurements behind it."""

    bounds: list[int]
    times: time_cache.Times
    steps: float
    """Optimizer steps per micro-batch."""
    origin: str
    """Origin of the times, as text."""


def measure_stages(build: Build, *, layers: int, measuring: Measuring, stages: Sequence[Sequence[int]]) -> Found:
    """Measures on every rank or reads an earlier measurement, and chooses the partition; every rank must call it.

    Args:
        build: builds the layer with a given index.
        layers: N.
        stages: for each stage, the ranks that hold a replica of it; the slowest of them determines its speed.

    Raises:
        ALConfigError: no partition satisfies the memory limit, or the config cannot be honoured.
    """
    al = al_config(measuring.config)
    times, origin = _measured(build, layers=layers, measuring=measuring, al=al, stages=stages)
    steps = _steps(measuring.config, al)
    bounds = balance(
        [[layer.cost(steps) for layer in rank] for rank in times],
        memory=[max(column) for column in zip(*([layer.memory for layer in rank] for rank in times), strict=True)],
        limit=math.inf if measuring.memory_limit is None else measuring.memory_limit,
    )
    return Found(bounds, times, steps, origin)


def measure_groups(
    build: Build, *, blocks: Sequence[int], measuring: Measuring, stages: Sequence[Sequence[int]]
) -> tuple[Found, list[Run]]:
    """Does what :func:`measure_stages` does where layers span stages, and returns what each stage holds.

    A layer's bridge, g and h, and their losses, are part of its last block. Stages step once per batch unless the
    config says otherwise. A block costs what it costs on the slowest rank.

    Args:
        build: builds the part of a layer that is one block, by the index of the block over all layers.
        blocks: number of blocks of each layer.

    Raises:
        ALConfigError: a memory limit is given, or the config cannot be honoured.
    """
    if measuring.memory_limit is not None:
        raise ALConfigError(
            "memory_limit for more stages than AL layers: the activations of a stage depend on its place in a group; "
            "leave it out, and limit the graphs that a stage holds (group_graphs)"
        )
    al, count = al_config(measuring.config), sum(blocks)
    times, origin = _measured(build, layers=count, measuring=measuring, al=al, stages=stages)
    steps = (al.steps_per_batch or 1) / measuring.config.get("gradient_accumulation_steps", 1)
    costs = iter([max(rank[index].cost(steps) for rank in times) for index in range(count)])
    runs = spread([[next(costs) for _ in range(size)] for size in blocks], len(stages))
    bounds = [0, *accumulate(len(run) for _, run in runs)]
    return Found(bounds, times, steps, origin), runs


def _measured(
    build: Build, *, layers: int, measuring: Measuring, al: ALConfig, stages: Sequence[Sequence[int]]
) -> tuple[time_cache.Times, str]:
    """Returns the times of the layers on the slowest rank of each stage, and their origin."""
    world = dist.get_world_size()
    deepspeed_keys.honour(measuring.config, al)
    device = torch.device(get_accelerator().current_device_name())
    interval = measuring.config.get("pipeline", {}).get("activation_checkpoint_interval", 0) or measuring.interval

    def prepared(index: int) -> ALLayer:
        layer = build(index)
        if interval:
            layer.recomputed = Recomputed(layer.f, interval=interval)
        if al.compile is not None:
            compile_layer(layer, al.compile, index=index)
        return layer

    with torch.random.fork_rng():
        facts = _facts(build, layers, measuring, al, interval, device)
        times, origin = _shared(facts, ranks=world, layers=layers) if measuring.cache == "use" else (None, "")
        if times is None:
            own = measure(
                prepared,
                layers=layers,
                example=measuring.example,
                num_classes=measuring.num_classes,
                device=device,
                make_optimizer=_optimizer(measuring.config, al),
            )
            times = _gathered(list(own))
            origin = "measured just now"
            if measuring.cache != "off" and dist.get_rank() == 0:
                time_cache.write(facts, times)
    steps = _steps(measuring.config, al)
    replicas = [[times[rank] for rank in ranks] for ranks in stages]
    return [max(ranks, key=lambda rank: sum(layer.cost(steps) for layer in rank)) for ranks in replicas], origin


def _facts(
    build: Build, layers: int, measuring: Measuring, al: ALConfig, interval: int, device: torch.device
) -> dict[str, Any]:
    """Returns the facts that determine layer times on all ranks; the result is the same on every rank."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else provenance.cpu()
    signature = time_cache.signature(build(index) for index in range(layers))
    example = measuring.example if isinstance(measuring.example, tuple) else (measuring.example,)
    facts = {
        "example": [[list(part.shape), str(part.dtype)] for part in example],
        "classes": measuring.num_classes,
        "optimizer": measuring.config.get("optimizer"),
        "autoencoder_optimizer": al.autoencoder_optimizer and al.autoencoder_optimizer.model_dump(),
        "clipping": al.layer_gradient_clipping,
        "compile": al.compile and al.compile.model_dump(),
        "activation_checkpoint_interval": interval,
        "ranks": _gathered([name, torch.get_num_threads(), signature]),
        "versions": {package: provenance.version(package) for package in ("ds_al", "torch", "deepspeed")},
    }
    return json.loads(json.dumps(facts))


def _shared(facts: Any, *, ranks: int, layers: int) -> tuple[time_cache.Times | None, str]:
    """Broadcasts the cached times of rank 0 and their origin to all ranks."""
    found: list[Any] = [None, ""]
    if dist.get_rank() == 0:
        found = [
            time_cache.read(facts, ranks=ranks, layers=layers),
            f"measured before: {time_cache.path_of(facts)}",
        ]
    dist.broadcast_object_list(found, src=0)
    return found[0], found[1]


def _gathered(own: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def _steps(config: Mapping[str, Any], al: ALConfig) -> float:
    micro_batches = config.get("gradient_accumulation_steps", 1)
    return 1.0 if al.steps_per_batch is None else al.steps_per_batch / micro_batches


def _optimizer(config: Mapping[str, Any], al: ALConfig) -> MakeOptimizer:
    """Returns the builder of the run's own optimizer for one layer: as on a stage, one instance for (f, b), one for (g,
    h)."""
    block = config.get("optimizer")
    if not isinstance(block, Mapping):
        return adamw
    first = OptimizerConfig(type=str(block.get("type", "AdamW")), params=block.get("params", {}))
    second = al.autoencoder_optimizer or first

    def make(layer: ALLayer) -> torch.optim.Optimizer:
        return LocalOptimizer(
            [(0, layer)],
            associated=optimizer_names.without_engine(first, layer),
            autoencoder=optimizer_names.without_engine(second, layer),
            clip=al.layer_gradient_clipping,
        )

    return make
