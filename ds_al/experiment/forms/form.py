"""``Form``: what depends on the training method of a run. All else is the same for every method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from ds_al.data import ShuffledLoader
from ds_al.experiment.architecture import Architecture
from ds_al.experiment.config import ExperimentConfig
from ds_al.experiment.layout import Layout


class EpochLosses(NamedTuple):
    """Training losses of one epoch."""

    means: dict[str, Any]
    """Entries of the epoch's row in ``metrics.jsonl``."""
    batches: Tensor | None
    """Local losses ``(batches, N, 2)`` of associated learning; ``None`` for back-propagation."""


class Form(Protocol):
    """Builds, trains, evaluates, saves and resumes a network by one family of methods.

    A form keeps no state of the run: methods that need the engine get the one that :meth:`build` returned.
    """

    has_exits: ClassVar[bool]
    """Whether every layer has an exit; if not, the network has the last one alone."""

    def layout(self, *, num_stages: int | None, world: int, rank: int) -> Layout:
        """Assigns stages and replicas to processes.

        Raises:
            ALConfigError: the number of processes or of stages does not fit.
        """

    def reads_data(self, layout: Layout) -> bool:
        """Whether this process reads the data set."""

    def micro_batches(self, total: int, *, replicas: int) -> int:
        """Returns how many micro-batches each replica trains per batch.

        Args:
            total: the config's ``gradient_accumulation_steps``.
            replicas: number of replicas.

        Raises:
            ALConfigError: replicas cannot share them evenly.
        """

    def check(self, experiment: ExperimentConfig) -> None:
        """Refuses keys that are for other forms.

        Raises:
            ALConfigError: such a key is set.
        """

    def schedule_steps(self, micro_batches: int) -> int:
        """Returns the steps of the LR schedule per batch of so many micro-batches in each replica."""

    def build(
        self,
        architecture: Architecture,
        experiment: ExperimentConfig,
        config: Mapping[str, Any],
        *,
        num_stages: int,
        loader: ShuffledLoader | None,
    ) -> Any:
        """Builds the module and its engine; every rank must call it.

        Args:
            architecture: the network.
            experiment: the ``"experiment"`` block.
            config: DeepSpeed's keys and the block ``"associated_learning"``.
            num_stages: stages of the pipeline.
            loader: training micro-batches, where this process reads data.
        """

    def resume(self, engine: Any, folder: str, *, loader: ShuffledLoader | None) -> None:
        """Loads the latest checkpoint of a folder, and moves the loader to the micro-batch that follows it."""

    def save(self, engine: Any, folder: Path, *, tag: str, complete: bool) -> None:
        """Saves a checkpoint; with ``complete``, all its files exist when this returns."""

    def evaluate(
        self, engine: Any, batches: Iterable[Any], *, exit_confidence: Sequence[float] = (), averaged: bool = False
    ) -> dict[str, Any]:
        """Evaluates the network on a part of the data; every rank must call it.

        Args:
            engine: what :meth:`build` returned.
            batches: evaluation batches.
            exit_confidence: thresholds of early exit; of a form without exits they are not used.
            averaged: also evaluate averages of exits; of a form without exits it is not used.

        Returns:
            ``accuracy`` and ``loss`` per exit, ``samples``; where asked for, ``early_exit`` and ``averaged``.
        """

    def epoch_losses(self, engine: Any) -> EpochLosses:
        """Returns the losses since the last call; every rank must call it after each epoch."""

    def latest_losses(self, engine: Any, stages: Iterable[int]) -> list[list[float]]:
        """Returns the losses that this process knows of the last batch, per stage; waits for the device alone."""

    def partition_table(self, engine: Any) -> str | None:
        """Returns the table of a measured partition, where one was measured."""
