"""``ds_al.initialize``: the counterpart of ``deepspeed.initialize``, with the engine of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from deepspeed.runtime import zero
from deepspeed.runtime.config import DeepSpeedConfig

from ds_al import host
from ds_al.baseline import build
from ds_al.config import recovery
from ds_al.config.base import checked, read_file
from ds_al.config.settings import Settings
from ds_al.engine import ALPipelineEngine
from ds_al.errors import ALConfigError
from ds_al.module import ALPipelineModule
from ds_al.optim import names, schedules
from ds_al.parallel import worker
from ds_al.parallel.agreement import agreed, flat
from ds_al.parallel.facts import environment
from ds_al.parallel.world import check_joined_here, join_world
from ds_al.recovery.keeper import keep
from ds_al.system.generators import Generators
from ds_al.system.versions import check_deepspeed

_OWN = frozenset(
    (
        *("steps_per_print", "wall_clock_breakdown", "dump_state", "log_level"),
        *("tensorboard", "csv_monitor", "wandb", "comet"),
    )
)
"""Keys of a config that may differ between ranks."""


def initialize(
    args: Any = None,
    model: PipelineModule | None = None,
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: None = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """Builds the engine for a model; signature and result as ``deepspeed.initialize``.

    Args:
        args: may have the attributes ``deepspeed_config`` and ``local_rank``, as in DeepSpeed's scripts.
        model: an :class:`~ds_al.module.ALPipelineModule`, or a plain ``PipelineModule`` for a ``bp_*`` method.
        optimizer: a callable that returns an optimizer for parameter groups (called once for f and b, once for g and
            h), or an instance over weights of this stage; by default the config's. With ``autoencoder_optimizer`` in
            the config an instance steps weights of f and b alone.
        model_parameters: weights to train, or parameter groups with options of their own, such as ``weight_decay``;
            by default all that require gradients. A stage splits groups by AL layer and by side, (f, b) and (g, h).
        training_data: a sized map-style data set of ``(x, label)``, which AL shuffles by the module's
            ``base_seed``, on the first stage; or a :class:`~ds_al.data.ShuffledLoader` of your own.
        lr_scheduler: a callable of the optimizer, or an instance over the optimizer instance; by default the config's.
        config: path of a JSON file, or a mapping.

    Returns:
        ``(engine, optimizer, training_dataloader, lr_scheduler)``.

    Example:
        >>> layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)]
        >>> x, labels = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
        >>> network = ds_al.from_layers(layers, num_al_layers=1, num_classes=3, example=x)
        >>> config = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "steps_per_print": None}
        >>> config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
        >>> engine, *_ = ds_al.initialize(model=network, config=config)
        >>> loss = engine.train_batch(iter([(x, labels)] * 2))
        >>> engine.global_samples, engine.predict(x).shape
        (8, torch.Size([4, 3]))

    Raises:
        ALVersionError: DeepSpeed is too old.
        ALConfigError: on all ranks, if on one of them the config is missing or malformed, or requests something that
            is not supported, or if config, network, releases or code are not the same.
    """
    check_deepspeed()
    if not isinstance(model, PipelineModule):
        raise ALConfigError(
            f"got a model of {type(model).__name__}: expected an ALPipelineModule, or a PipelineModule for a "
            "bp_* method. Other models train with deepspeed.initialize"
        )
    if mpu is not None:
        raise ALConfigError("mpu must be None: a pipeline brings its own")
    zero.partition_parameters.shutdown_init_context()
    join_world(distributed_port=distributed_port, dist_init_required=dist_init_required)
    is_al = isinstance(model, ALPipelineModule)
    replicas = model.mpu().get_data_parallel_world_size()

    def checked() -> tuple[dict[str, Any], Settings]:
        own = read_config(args, config)
        settings = Settings.of(own, is_al=is_al, module=type(model).__name__, replicas=replicas)
        if not is_al:
            micro_batches = settings.deepspeed["gradient_accumulation_steps"]
            build.check(settings.al.method, own, model, micro_batches=micro_batches)
            if optimizer is not None or "optimizer" in own:
                build.check_trains(model)
        names.check(own, settings.al)
        schedules.check(own, by_group=not is_al)
        _check_given(optimizer, lr_scheduler)
        settings.precision.check_device()
        return own, settings

    _, settings = agreed("initialize", checked, facts=lambda found: {**environment(), **_facts(found[0], model)})
    if settings.al.recovery is not None:
        recovery.check(
            settings,
            replicas=replicas,
            measured=is_al and model.partition_table is not None,
            device=get_accelerator().device_name(),
        )
        if not worker.IS_WORKER:
            check_joined_here()
            keep(settings.al.recovery, group=model.group)
    ds_config = _deepspeed_config(settings.deepspeed, model)
    deepspeed.set_optimizer_flags(ds_config, model)
    engine_class = ALPipelineEngine if is_al else build.engine_class(settings.al.method)
    with Generators().aside(), worker.collectives():
        engine = engine_class(
            settings=settings,
            args=args,
            model=model,
            optimizer=optimizer,
            model_parameters=model_parameters,
            training_data=training_data,
            lr_scheduler=lr_scheduler,
            mpu=model.mpu(),
            dist_init_required=dist_init_required,
            collate_fn=collate_fn,
            config=settings.deepspeed,
            config_class=ds_config,
        )
    model.parts = [int(bound) for bound in model.parts]  # numpy's where DeepSpeed balanced them: no JSON takes those
    zero.partition_parameters.restore_init_context()
    host.configure_python_gc(engine)
    if is_al and engine.global_rank == 0 and engine.steps_per_print():
        steps = engine.steps_per_batch
        print(
            f"ds_al: train_batch() makes {steps} optimizer steps on {engine.micro_batches} micro-batches of "
            f'{engine.micro_batch_size} ("steps_per_batch"); the loss is the sum of the local losses of stage 0, '
            f"layers 1 to {len(engine.layers)} of {host.num_layers(model)}",
            flush=True,
        )
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _check_given(optimizer: Any, lr_scheduler: Any) -> None:
    """Checks the types of an optimizer and an LR schedule of the user's own.

    Raises:
        ALConfigError: one of them is neither what it should be nor callable.
    """
    instance = isinstance(optimizer, torch.optim.Optimizer)
    if not (optimizer is None or instance or callable(optimizer)):
        raise ALConfigError(
            f"got optimizer={optimizer!r}: expected a callable of parameter groups, a torch.optim.Optimizer, or None "
            "for that of the config"
        )
    if lr_scheduler is not None and not callable(lr_scheduler):
        schedules.check_made(lr_scheduler)


def _deepspeed_config(config: dict[str, Any], model: PipelineModule) -> DeepSpeedConfig:
    """Builds DeepSpeed's view of the config.

    Raises:
        ALConfigError: DeepSpeed refuses a value that only it knows, such as one in a block for a ``bp_*`` method.
    """
    try:
        return DeepSpeedConfig(config, model.mpu())
    except Exception as error:  # assertions, and errors of pydantic and of the standard library
        raise ALConfigError(f"DeepSpeed refuses this config: {type(error).__name__}: {error}") from error


def _facts(config: Mapping[str, Any], model: PipelineModule) -> dict[str, Any]:
    """What has to be equal on all ranks of a job: the config, apart from what only prints, and the network."""
    shared = {key: value for key, value in config.items() if key not in _OWN}
    network = {
        "base_seed": model.base_seed,
        "number of layers": host.num_layers(model),
        "partition": [int(bound) for bound in model.parts],
    }
    return {**flat(shared), **network}


def read_config(args: Any, config: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """The config that is given either way, as a dict of its own.

    Raises:
        ALConfigError: none is given, or two, or a file that is missing or malformed.
    """
    from_args = getattr(args, "deepspeed_config", None)
    if config is not None and from_args is not None:
        raise ALConfigError("got a config both in args.deepspeed_config and as an argument: give one")
    config = config if config is not None else from_args
    if config is None:
        raise ALConfigError("no config: give --deepspeed_config PATH, or initialize(config=...)")
    if isinstance(config, Mapping):
        return checked(config)
    return read_file(config)
