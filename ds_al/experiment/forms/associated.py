"""Associated learning: an AL pipeline, whose stages learn by local losses and have an exit at every layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from ds_al.config.associated_learning import ALConfig
from ds_al.data import ShuffledLoader
from ds_al.engine import ALPipelineEngine
from ds_al.entry import initialize
from ds_al.errors import ALConfigError
from ds_al.experiment.architecture import Architecture
from ds_al.experiment.config import BLOCK, ExperimentConfig
from ds_al.experiment.forms.form import EpochLosses
from ds_al.experiment.layout import Layout
from ds_al.module import ALPipelineModule


@dataclass(frozen=True)
class AssociatedLearning:
    """Form of the AL methods; see :class:`~ds_al.experiment.forms.form.Form`.

    Attributes:
        config: the ``"associated_learning"`` block.
    """

    config: ALConfig
    has_exits: ClassVar[bool] = True

    def layout(self, *, num_stages: int | None, world: int, rank: int) -> Layout:
        """Assigns each process a stage of a replica of the pipeline."""
        return Layout.of_pipeline(num_stages=num_stages, world=world, rank=rank)

    def reads_data(self, layout: Layout) -> bool:
        """Whether this is the first stage: labels are sent downstream with the target codes."""
        return layout.is_first_stage

    def micro_batches(self, total: int, *, replicas: int) -> int:
        """Returns ``total``: each replica trains as many micro-batches as the config says."""
        return total

    def check(self, experiment: ExperimentConfig) -> None:
        """Refuses ``label_smoothing``, which is an option of the objective here."""
        if experiment.label_smoothing is not None:
            raise ALConfigError(
                f'"{BLOCK}.label_smoothing" is for bp_* methods: got {self.config.method}, give it to its objective, '
                f'as "{BLOCK}.model.al_options.objective.label_smoothing"'
            )

    def schedule_steps(self, micro_batches: int) -> int:
        """Returns optimizer steps per batch, or 1 where the LR schedule counts batches."""
        return (self.config.steps_per_batch or micro_batches) if self.config.count == "step" else 1

    def build(
        self,
        architecture: Architecture,
        experiment: ExperimentConfig,
        config: Mapping[str, Any],
        *,
        num_stages: int,
        loader: ShuffledLoader | None,
    ) -> ALPipelineEngine:
        """Builds an ``ALPipelineModule`` and its engine."""
        data, method = architecture.data, experiment.partition_method
        memory = experiment.partition_memory
        micro_batch = config["train_micro_batch_size_per_gpu"]
        module = ALPipelineModule(
            architecture.al_layers(),
            num_stages=num_stages,
            num_classes=len(data.classes),
            base_seed=experiment.seed,
            partition_method=method,
            dynamic_shape=data.varying,
            example=data.example(micro_batch) if method == "measured" else None,
            config=config,
            memory_limit=memory and memory * 2**30,
            partition_cache=experiment.partition_cache,
        )
        engine: ALPipelineEngine = initialize(model=module, config=config, training_data=loader)[0]
        return engine

    def resume(self, engine: ALPipelineEngine, folder: str, *, loader: ShuffledLoader | None) -> None:
        """Loads the latest checkpoint; the engine moves its loader."""
        engine.load_checkpoint(folder)

    def save(self, engine: ALPipelineEngine, folder: Path, *, tag: str, complete: bool) -> None:
        """Saves a checkpoint, and waits for an asynchronous one where it must be complete."""
        engine.save_checkpoint(str(folder), tag=tag)
        if complete and self.config.checkpoint.asynchronous:
            engine.flush()

    def evaluate(
        self,
        engine: ALPipelineEngine,
        batches: Iterable[Any],
        *,
        exit_confidence: Sequence[float] = (),
        averaged: bool = False,
    ) -> dict[str, Any]:
        """Evaluates every exit."""
        return engine.inference.evaluate(batches, exit_confidence=exit_confidence, averaged=averaged)

    def epoch_losses(self, engine: ALPipelineEngine) -> EpochLosses:
        """Returns the local losses of every layer: per batch, and their means over the epoch."""
        losses = engine.gather_losses()  # (batches, N, 2)
        associated, autoencoder = losses.mean(dim=0).t().tolist()
        return EpochLosses({"associated_loss": associated, "autoencoder_loss": autoencoder}, losses)

    def latest_losses(self, engine: ALPipelineEngine, stages: Iterable[int]) -> list[list[float]]:
        """Returns ``[A, E]`` per stage, means over its layers."""
        report, bounds = engine.report.tolist(), engine.module.parts
        return [
            [fmean(losses) for losses in zip(*report[bounds[stage] : bounds[stage + 1]], strict=True)]
            for stage in stages
        ]

    def partition_table(self, engine: ALPipelineEngine) -> str | None:
        """Returns the table of times that a ``"measured"`` partition was chosen by."""
        return engine.module.partition_table
