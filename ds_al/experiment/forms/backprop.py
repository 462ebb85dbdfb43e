"""The backprop twin: in DeepSpeed's pipeline, or as data parallel replicas of the whole network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from deepspeed.pipe import PipelineModule
from deepspeed.runtime.utils import set_random_seed
from torch import nn

from ds_al.baseline.engine import BackpropPipelineEngine
from ds_al.config.associated_learning import ALConfig
from ds_al.data import ShuffledLoader
from ds_al.entry import initialize
from ds_al.errors import ALConfigError
from ds_al.experiment.architecture import Architecture
from ds_al.experiment.config import BLOCK, ExperimentConfig
from ds_al.experiment.forms.form import EpochLosses
from ds_al.experiment.layout import Layout


@dataclass(frozen=True)
class BackpropPipeline:
    """Form of the ``bp_*`` methods in a pipeline; see :class:`~ds_al.experiment.forms.form.Form`.

    Attributes:
        config: the ``"associated_learning"`` block.
    """

    config: ALConfig
    has_exits: ClassVar[bool] = False

    def layout(self, *, num_stages: int | None, world: int, rank: int) -> Layout:
        """Assigns each process a stage of a replica of the pipeline."""
        return Layout.of_pipeline(num_stages=num_stages, world=world, rank=rank)

    def reads_data(self, layout: Layout) -> bool:
        """Whether this is the first stage, which reads x, or the last one, which reads labels."""
        return layout.is_first_stage or layout.is_last_stage

    def micro_batches(self, total: int, *, replicas: int) -> int:
        """Returns ``total``: each replica trains as many micro-batches as the config says."""
        return total

    def check(self, experiment: ExperimentConfig) -> None:
        """Refuses partition methods that only an ``ALPipelineModule`` has."""
        method = experiment.partition_method
        if method.startswith(("measured", "cuts:")):
            raise ALConfigError(
                f'"{BLOCK}.partition_method": got {method!r}, which is for AL methods: a {self.config.method} run is '
                "DeepSpeed's own, use uniform, parameters or type:<regex>"
            )

    def schedule_steps(self, micro_batches: int) -> int:
        """Returns 1: there is one step per batch."""
        return 1

    def build(
        self,
        architecture: Architecture,
        experiment: ExperimentConfig,
        config: Mapping[str, Any],
        *,
        num_stages: int,
        loader: ShuffledLoader | None,
    ) -> BackpropPipelineEngine:
        """Builds a plain ``PipelineModule`` with cross-entropy, and its engine."""
        module = PipelineModule(
            architecture.twin_layers(),
            num_stages=num_stages,
            loss_fn=nn.CrossEntropyLoss(label_smoothing=experiment.label_smoothing or 0.0),
            seed_layers=True,
            seed_fn=lambda number: set_random_seed(int(number)),  # DeepSpeed's default fails on its own numpy bounds
            base_seed=experiment.seed,
            partition_method=experiment.partition_method,
            dynamic_shape=architecture.data.varying,
        )
        engine: BackpropPipelineEngine = initialize(model=module, config=config)[0]
        if loader is not None:
            engine.set_dataiterator(iter(loader))
        return engine

    def resume(self, engine: BackpropPipelineEngine, folder: str, *, loader: ShuffledLoader | None) -> None:
        """Loads the latest checkpoint, and moves the loader, which DeepSpeed's engine does not do."""
        engine.load_checkpoint(folder)
        if loader is not None:
            _, replicas = loader.share
            loader.seek(engine.global_samples // (loader.batch_size * replicas))

    def save(self, engine: BackpropPipelineEngine, folder: Path, *, tag: str, complete: bool) -> None:
        """Saves a checkpoint; DeepSpeed's are complete when the call returns."""
        engine.save_checkpoint(str(folder), tag=tag)

    def evaluate(
        self,
        engine: BackpropPipelineEngine,
        batches: Iterable[Any],
        *,
        exit_confidence: Sequence[float] = (),
        averaged: bool = False,
    ) -> dict[str, Any]:
        """Evaluates the last layer, the one exit of the twin."""
        return engine.evaluate(batches)

    def epoch_losses(self, engine: BackpropPipelineEngine) -> EpochLosses:
        """Returns the loss of the last batch."""
        return EpochLosses({"loss": float(engine.agg_train_loss)}, None)

    def latest_losses(self, engine: BackpropPipelineEngine, stages: Iterable[int]) -> list[list[float]]:
        """Returns the loss of the last batch for every stage."""
        loss = float(engine.agg_train_loss)
        return [[loss] for _ in stages]

    def partition_table(self, engine: BackpropPipelineEngine) -> str | None:
        """Returns ``None``: DeepSpeed measures no layers."""
        return None


@dataclass(frozen=True)
class BackpropReplicas(BackpropPipeline):
    """Form of ``bp_dp``: every process is a replica of the whole twin, and replicas share the micro-batches."""

    def layout(self, *, num_stages: int | None, world: int, rank: int) -> Layout:
        """Assigns each process the whole network.

        Raises:
            ALConfigError: more than one stage is asked for.
        """
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
