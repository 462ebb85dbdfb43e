"""Forms of a run: what depends on its training method. All else is the same for every method."""

from __future__ import annotations

import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from deepspeed import comm as dist
from deepspeed.runtime.utils import set_random_seed
from torch import Tensor, nn

from ds_al.baseline import build, data_parallel, delayed
from ds_al.config.associated_learning import ALConfig
from ds_al.config.base import BLOCK as AL_BLOCK
from ds_al.config.methods import AL_METHODS
from ds_al.data import ShuffledLoader
from ds_al.entry import initialize
from ds_al.errors import ALConfigError
from ds_al.experiment.architecture import Architecture
from ds_al.experiment.config import BLOCK, ExperimentConfig
from ds_al.experiment.layout import Layout
from ds_al.experiment.observer import stage_means
from ds_al.module import ALPipelineModule

Loader = ShuffledLoader | None
KEEP = 2
"""Number of checkpoints that a run keeps, unless ``associated_learning.checkpoint.keep_last`` is set."""


@dataclass(frozen=True)
class Form(ABC):
    """Builds, trains, evaluates, saves and resumes a network by one family of methods.

    Methods with a body are the same for a pipeline of either kind. A form keeps no state of the run: methods that need
    the engine get the one that :meth:`build` returned. Every rank must call them, except for :meth:`latest_losses` and
    :meth:`batch_losses`.

    Attributes:
        config: the ``"associated_learning"`` block.
        has_exits: whether every layer has an exit; if not, the network has the last one alone.
        loss: what the losses that are shown are.
    """

    config: ALConfig
    has_exits: ClassVar[bool] = False
    loss: ClassVar[str] = "the loss is that of the last stage"

    def layout(self, *, num_stages: int | None, world: int, rank: int) -> Layout:
        """Assigns each process a stage of a replica, by default one stage per process.

        Raises:
            ALConfigError: the number of processes or of stages does not fit.
        """
        stages = world if num_stages is None else num_stages
        if world % stages:
            raise ALConfigError(
                f'"{BLOCK}.num_stages": got {stages} for {world} processes: start as many processes as stages, or a '
                "multiple of it for data parallel replicas (deepspeed --num_accelerators N)"
            )
        return Layout(stages, world // stages, rank)

    def micro_batches(self, total: int, *, replicas: int) -> int:
        """Returns how many micro-batches each replica trains per batch, of a config that says ``total``.

        Raises:
            ALConfigError: replicas cannot share them evenly.
        """
        return total

    def check_batch(self, micro_batches: int, *, stages: int) -> None:  # noqa: B027  most have nothing to check
        """Checks that so many micro-batches can be trained on so many stages.

        Raises:
            ALConfigError: they are too few.
        """

    def optimizer_steps(self, micro_batches: int, *, spanned: bool = False) -> int:
        """Returns the optimizer steps per batch of so many micro-batches in each replica.

        Args:
            spanned: whether an AL layer spans several stages.
        """
        return 1

    def schedule_steps(self, micro_batches: int, *, spanned: bool = False) -> int:
        """Returns the steps of the LR schedule per batch of so many micro-batches in each replica."""
        return 1

    def bounds(self, engine: Any) -> list[int]:
        """Returns the bounds of the stages, see :attr:`~ds_al.experiment.observer.RunInfo.partition`."""
        return [int(bound) for bound in engine.module.parts]

    @abstractmethod
    def reads_data(self, layout: Layout) -> bool:
        """Whether this process reads the data set."""

    @abstractmethod
    def check(self, experiment: ExperimentConfig) -> None:
        """Refuses keys that are for other forms.

        Raises:
            ALConfigError: such a key is set.
        """

    @abstractmethod
    def build(self, network: Architecture, config: Mapping[str, Any], *, num_stages: int, loader: Loader) -> Any:
        """Builds the module and its engine.

        Args:
            network: what to build.
            config: DeepSpeed's keys and the block ``"associated_learning"``.
            num_stages: stages of the pipeline.
            loader: training micro-batches, where this process reads data.
        """

    def resume(self, engine: Any, folder: str, *, tag: str | None, loader: Loader) -> dict[str, Any]:
        """Loads a checkpoint, the latest without a tag, and moves the loader to the micro-batch that follows it.

        Returns:
            The ``state`` that it was saved with.
        """
        return engine.load_checkpoint(folder, tag=tag)[1]

    def save(self, engine: Any, folder: Path, *, tag: str, complete: bool, state: dict[str, Any]) -> None:
        """Saves a checkpoint with a state of the run; with ``complete``, all its files exist when this returns."""
        engine.save_checkpoint(str(folder), tag=tag, client_state=state)

    def at_stop(self, engine: Any, save: Callable[[], Path]) -> None:  # noqa: B027  most engines do not stop
        """Lets an engine that stops by itself save its checkpoint so.

        Args:
            save: saves, and returns the path of the checkpoint.
        """

    def checkpoint_defaults(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns keys of the engine's config that bound the number of checkpoints, where the config does not."""
        return {}

    @abstractmethod
    def evaluate(self, engine: Any, batches: Iterable[Any], **exits: Any) -> dict[str, Any]:
        """Evaluates the network on a part of the data.

        Args:
            engine: what :meth:`build` returned.
            batches: evaluation batches.
            exits: ``exit_confidence`` and ``averaged``; not used where the network has one exit alone.

        Returns:
            ``accuracy`` and ``loss`` per exit, ``samples``; where asked for, ``early_exit`` and ``averaged``.
        """

    @abstractmethod
    def epoch_losses(self, engine: Any) -> tuple[dict[str, Any], Tensor | None]:
        """Returns the losses since the last call: entries of the epoch's row, and local losses ``(batches, N, 2)``."""

    @abstractmethod
    def latest_losses(self, engine: Any, stages: Iterable[int]) -> list[list[float]]:
        """Returns the losses that this process knows of the last batch, per stage; waits for the device alone."""

    @abstractmethod
    def batch_losses(self, engine: Any) -> dict[str, Any]:
        """Returns the losses that this process knows of the last batch, as ``losses`` by layer or ``loss``."""

    def partition_table(self, engine: Any) -> str | None:
        """Returns the table of times that a partition was chosen by, where they were measured."""
        return None


@dataclass(frozen=True)
class AssociatedLearning(Form):
    """Form of the AL methods: stages learn by local losses, and every layer has an exit."""

    has_exits: ClassVar[bool] = True
    loss: ClassVar[str] = "A and E are means of the local losses of a stage's layers"

    def reads_data(self, layout: Layout) -> bool:
        """Whether this is the first stage: labels are sent downstream with the target codes."""
        return layout.stage == 0

    def check(self, experiment: ExperimentConfig) -> None:
        """Refuses ``label_smoothing``, which is an option of the objective here."""
        if experiment.label_smoothing is not None:
            raise ALConfigError(
                f'"{BLOCK}.label_smoothing" is for bp_* methods: got {self.config.method}, give it to its objective, '
                f'as "{BLOCK}.model.al_options.objective.label_smoothing"'
            )

    def optimizer_steps(self, micro_batches: int, *, spanned: bool = False) -> int:
        """Returns ``steps_per_batch``, by default one step after every micro-batch, or one where layers are spanned."""
        return self.config.steps_per_batch or (1 if spanned else micro_batches)

    def schedule_steps(self, micro_batches: int, *, spanned: bool = False) -> int:
        """Returns optimizer steps per batch, or 1 where the LR schedule counts batches."""
        return self.optimizer_steps(micro_batches, spanned=spanned) if self.config.count == "step" else 1

    def build(self, network: Architecture, config: Mapping[str, Any], *, num_stages: int, loader: Loader) -> Any:
        """Builds an ``ALPipelineModule`` and its engine, which moves the loader itself."""
        data, experiment = network.data, network.experiment
        method, memory = experiment.partition_method, experiment.partition_memory
        module = ALPipelineModule(
            network.al_layers(),
            num_stages=num_stages,
            num_classes=len(data.classes),
            base_seed=experiment.seed,
            partition_method=method,
            dynamic_shape=data.varying,
            example=data.example(config["train_micro_batch_size_per_gpu"]) if method == "measured" else None,
            config=config,
            memory_limit=memory and memory * 2**30,
            partition_cache=experiment.partition_cache,
        )
        return initialize(model=module, config=config, training_data=loader)[0]

    def bounds(self, engine: Any) -> list[int]:
        """Returns the bounds of the stages by their exits."""
        return engine.module.bounds

    def save(self, engine: Any, folder: Path, *, tag: str, complete: bool, state: dict[str, Any]) -> None:
        """Saves a checkpoint, and waits for an asynchronous one where it must be complete."""
        super().save(engine, folder, tag=tag, complete=complete, state=state)
        if complete and self.config.checkpoint.asynchronous:
            engine.flush()

    def at_stop(self, engine: Any, save: Callable[[], Path]) -> None:
        """Sets what saves with ``"non_finite": "save_and_stop"``."""
        if engine.stops is not None:
            engine.stops.save = save

    def checkpoint_defaults(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Sets ``checkpoint.keep_last`` to :data:`KEEP`, unless it is set."""
        block = config.get(AL_BLOCK, {})
        return {AL_BLOCK: {**block, "checkpoint": {"keep_last": KEEP, **block.get("checkpoint", {})}}}

    def evaluate(self, engine: Any, batches: Iterable[Any], **exits: Any) -> dict[str, Any]:
        """Evaluates every exit."""
        return engine.inference.evaluate(batches, **exits)

    def epoch_losses(self, engine: Any) -> tuple[dict[str, Any], Tensor | None]:
        """Returns the local losses of every layer: their means over the epoch, and per batch."""
        losses = engine.gather_losses()  # (batches, N, 2)
        associated, autoencoder = losses.mean(dim=0).t().tolist()
        return {"associated_loss": associated, "autoencoder_loss": autoencoder}, losses

    def latest_losses(self, engine: Any, stages: Iterable[int]) -> list[list[float]]:
        """Returns ``[A, E]`` per stage, means over its layers."""
        report, bounds = engine.report.tolist(), engine.module.bounds
        means = list(zip(*(stage_means(losses, bounds) for losses in zip(*report, strict=True)), strict=True))
        return [list(means[stage]) for stage in stages]

    def batch_losses(self, engine: Any) -> dict[str, Any]:
        """Returns ``[A, E]`` of every layer."""
        return {"losses": engine.report.tolist()}

    def partition_table(self, engine: Any) -> str | None:
        """Returns the table of a ``"measured"`` partition."""
        return engine.module.partition_table


@dataclass(frozen=True)
class BackpropPipeline(Form):
    """Form of the ``bp_*`` methods: the backprop twin in DeepSpeed's pipeline."""

    def check_batch(self, micro_batches: int, *, stages: int) -> None:
        """Checks what ``bp_dualpipev`` needs."""
        if self.config.method == build.DUALPIPEV:
            build.check_micro_batches(micro_batches, stages=stages)

    def reads_data(self, layout: Layout) -> bool:
        """Whether this is the first stage, which reads x, or the last one, which reads labels."""
        return layout.stage in (0, layout.stages - 1)

    def check(self, experiment: ExperimentConfig) -> None:
        """Refuses partition methods that only an ``ALPipelineModule`` has, and a method that DeepSpeed lacks."""
        build.module_class(self.config.method)
        method = experiment.partition_method
        if method.startswith(("measured", "cuts:")):
            raise ALConfigError(
                f'"{BLOCK}.partition_method": got {method!r}, which is for AL methods: a {self.config.method} run is '
                "DeepSpeed's own, use uniform, parameters or type:<regex>"
            )

    def build(self, network: Architecture, config: Mapping[str, Any], *, num_stages: int, loader: Loader) -> Any:
        """Builds a plain ``PipelineModule`` with cross-entropy, and its engine."""
        experiment = network.experiment
        module = build.module_class(self.config.method)(
            network.twin_layers(),
            num_stages=num_stages,
            loss_fn=nn.CrossEntropyLoss(label_smoothing=experiment.label_smoothing or 0.0),
            seed_layers=True,
            seed_fn=lambda number: set_random_seed(int(number)),  # DeepSpeed's default fails on its own numpy bounds
            base_seed=experiment.seed,
            partition_method=experiment.partition_method,
            dynamic_shape=network.data.varying,
        )
        engine = initialize(model=module, config=config)[0]
        if loader is not None:
            engine.set_dataiterator(iter(loader))
        return engine

    def save(self, engine: Any, folder: Path, *, tag: str, complete: bool, state: dict[str, Any]) -> None:
        """Saves a checkpoint, and removes all but the last :data:`KEEP`, which DeepSpeed's engine does not do."""
        super().save(engine, folder, tag=tag, complete=complete, state=state)
        dist.barrier()  # all ranks have written
        if dist.get_rank() == 0:
            saved = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
            for old in saved[:-KEEP]:
                shutil.rmtree(old)

    def resume(self, engine: Any, folder: str, *, tag: str | None, loader: Loader) -> dict[str, Any]:
        """Loads a checkpoint, and moves the loader, which DeepSpeed's engine does not do."""
        state = super().resume(engine, folder, tag=tag, loader=loader)
        if loader is not None:
            _, replicas = loader.share
            loader.seek(engine.global_samples // (loader.batch_size * replicas))
        return state

    def evaluate(self, engine: Any, batches: Iterable[Any], **exits: Any) -> dict[str, Any]:
        """Evaluates the last layer, the one exit of the twin."""
        return engine.evaluate(batches)

    def epoch_losses(self, engine: Any) -> tuple[dict[str, Any], Tensor | None]:
        """Returns the loss of the last batch; NaN where a resumed epoch had none left."""
        loss = engine.agg_train_loss
        return {"loss": math.nan if loss is None else float(loss)}, None

    def latest_losses(self, engine: Any, stages: Iterable[int]) -> list[list[float]]:
        """Returns the loss of the last batch for every stage."""
        return [[float(engine.agg_train_loss)] for _ in stages]

    def batch_losses(self, engine: Any) -> dict[str, Any]:
        """Returns the loss of the last batch."""
        return {"loss": float(engine.agg_train_loss)}


@dataclass(frozen=True)
class BackpropReplicas(BackpropPipeline):
    """Form of ``bp_dp`` and ``bp_async``: every process is a replica of the whole twin, which share micro-batches."""

    def layout(self, *, num_stages: int | None, world: int, rank: int) -> Layout:
        """Assigns each process the whole network; refuses more than one stage."""
        if num_stages not in (None, 1):
            raise ALConfigError(
                f'"{BLOCK}.num_stages": got {num_stages} for {self.config.method}, where every process is a replica '
                "of the whole network: leave it out, or use another bp_* method"
            )
        return Layout(1, world, rank)

    def micro_batches(self, total: int, *, replicas: int) -> int:
        """Returns the share of each replica, so that a batch holds the samples of one pipeline's batch."""
        if total % replicas:
            raise ALConfigError(
                f'"gradient_accumulation_steps": got {total} for {replicas} replicas of {self.config.method}, which '
                "share the micro-batches of a batch: expected a multiple of them"
            )
        return total // replicas


def form_of(config: ALConfig) -> Form:
    """Returns the form of a run that trains by ``config.method``."""
    if config.method in AL_METHODS:
        return AssociatedLearning(config)
    replicated = config.method in (data_parallel.METHOD, delayed.METHOD)
    return (BackpropReplicas if replicated else BackpropPipeline)(config)
