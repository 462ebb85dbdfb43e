"""``partition_method: measured``: every rank times every layer, and all take the cut that is best by what all found."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from ds_al.partition.layer_times import MakeOptimizer, adamw, measure
from ds_al.partition.plan import balance
from ds_al.system import provenance
from ds_al.tensors import Activation

Build = Callable[[int], ALLayer]


@dataclass(frozen=True)
class Measuring:
    """What to measure with."""

    example: Activation
    """A micro-batch ``x``."""
    num_classes: int
    config: Mapping[str, Any]
    """The DeepSpeed config of the run, or an empty one."""
    memory_limit: float | Sequence[float] | None = None
    """Bytes of a stage, or of each stage."""
    cache: Literal["use", "refresh", "off"] = "use"
    interval: int = 0
    """Of activation checkpointing, unless the config says."""

    def __post_init__(self) -> None:
        if self.cache not in ("use", "refresh", "off"):
            raise ALConfigError(f'partition_cache: got {self.cache!r}: expected "use", "refresh" or "off"')


@dataclass(frozen=True)
class Found:
    """The cut, and what led to it."""

    bounds: list[int]
    times: time_cache.Times
    steps: float
    """Optimizer steps per micro-batch."""
    origin: str
    """Where the times come from, in words."""


def measure_stages(build: Build, *, layers: int, measuring: Measuring, stages: Sequence[Sequence[int]]) -> Found:
    """Measures on every rank, or takes what was measured before, and cuts; every rank must call it.

    Args:
        build: makes the layer of an index.
        layers: N.
        stages: the ranks that hold a copy of each stage, which is as fast as the slowest of them.

    Raises:
        ALConfigError: no cut keeps the memory limit, or the config cannot be honoured.
    """
    al, world = al_config(measuring.config), dist.get_world_size()
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
    copies = [[times[rank] for rank in ranks] for ranks in stages]
    times = [max(ranks, key=lambda rank: sum(layer.cost(steps) for layer in rank)) for ranks in copies]
    bounds = balance(
        [[layer.cost(steps) for layer in rank] for rank in times],
        memory=[max(column) for column in zip(*([layer.memory for layer in rank] for rank in times), strict=True)],
        limit=math.inf if measuring.memory_limit is None else measuring.memory_limit,
    )
    return Found(bounds, times, steps, origin)


def _facts(
    build: Build, layers: int, measuring: Measuring, al: ALConfig, interval: int, device: torch.device
) -> dict[str, Any]:
    """What decides how long layers take, of all ranks; the same on each."""
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
    """What rank 0 finds in its cache, and where, on every rank."""
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
    """The run's own, for one layer: as on a stage, an instance for f and b and one for g and h."""
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
