"""``ALPipelineEngine``: DeepSpeed's pipeline engine, whose stages learn locally and step at once.

How a stage trains a batch is in :mod:`ds_al.training.engine`, with its numbered steps; evaluation, checkpoints and
layers that move are in the files beside it. Here is what else users call: statistics, data and sizes, the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_al import host
from ds_al.compute.compile import compile_config
from ds_al.config.settings import Settings
from ds_al.data.loader import ShuffledLoader, loader_of
from ds_al.errors import ALConfigError
from ds_al.module import ALPipelineModule
from ds_al.optim.stop import SaveAndStop
from ds_al.partition.rebalance import Rebalance
from ds_al.trace import StageMetrics, StageStats, Tracing, Watchdog, joint_call
from ds_al.training.moving import MovingEngine

STOPPED = "checkpoints"
"""Folder, in the working directory, of the checkpoint that ``"non_finite": "save_and_stop"`` saves by default."""


class ALPipelineEngine(MovingEngine):
    """Trains an :class:`~ds_al.module.ALPipelineModule`. Made by :func:`ds_al.initialize`.

    It is a ``deepspeed.PipelineEngine``: ``train_batch``, ``eval_batch``, ``set_batch_fn``,
    ``set_train_batch_size``, ``reset_activation_shape``, ``is_first_stage``, ``is_last_stage``,
    ``save_checkpoint`` and ``load_checkpoint`` keep their signatures.
    """

    def __init__(
        self,
        *,
        model: ALPipelineModule,
        settings: Settings,
        training_data: Any = None,
        model_parameters: Any = None,
        **options: Any,
    ) -> None:
        stops = SaveAndStop(self._save_at_stop) if settings.al.non_finite == "save_and_stop" else None
        super().__init__(model=model, settings=settings, model_parameters=model_parameters, stops=stops, **options)
        if training_data is not None and self.is_first_stage():
            self.loader = loader_of(
                training_data,
                batch_size=self.micro_batch_size,
                seed=self.module.base_seed,
                collate_fn=self.collate_fn,
                share=(self.replicas.index, self.replicas.count),
            )
            self.set_dataloader(self.loader)
        self.tracing = Tracing.of(
            self.al,
            topology=self.topology,
            device=self.device,
            recording=self.recording,
            parameters=self.module.parameters,
        )
        self.rebalance: Rebalance | None = None
        if self.al.repartition is not None:
            self._check_can_move()
            self.rebalance = Rebalance(
                self.al.repartition, topology=self.topology, device=self.device, recording=self.recording
            )
        self.watchdog = Watchdog.start(
            self.runner.progress,
            calls=self.calls,
            topology=self.topology,
            seconds=self.al.stall_seconds,
            on_stall=self.al.on_stall,
        )
        if self._recovery is not None:
            self._recovery.attach(self)

    def _train_batch(self) -> Tensor:
        if self.tracing is not None:
            self.tracing.before_batch(micro_batches=self.micro_batches)
        if self.rebalance is not None:
            self.rebalance.before_batch()
        loss = super()._train_batch()
        if self.tracing is not None:
            self.tracing.after_batch()
        if self.rebalance is not None:
            self._move_if_better(self.rebalance)
        if self.stops is not None:
            self.stops.after_batch()
        return loss

    # ---- what a stage reports ----------------------------------------------------------------------

    def reset_stats(self) -> None:
        """Resets :meth:`stats`."""
        self.counters.reset()

    def stats(self) -> StageStats:
        """Returns this stage's times and bytes since the last :meth:`reset_stats`."""
        return self.counters.stats()

    def stage_metrics(self) -> dict[int, StageMetrics]:
        """Returns the latest known metrics of this stage and those before it; waits for the device, not for a stage."""
        return dict(enumerate(self._parts.report.stage_metrics()[: self.stage_id + 1]))

    @joint_call
    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all stages, in their order; drains the pipeline. Every rank must call it."""
        return self.topology.gather(value)

    @joint_call
    def gather_losses(self) -> Tensor:
        """Returns the local losses of all layers since the last call, ``(batches, N, 2)``, means over data parallel
        replicas; drains the pipeline. Of more than 65,536 batches the latest are kept.

        ``[..., 0]`` is the associated, ``[..., 1]`` the autoencoder loss, each the mean over a batch. Every
        rank must call it.
        """
        history = self._parts.report.history
        self.forget_losses()
        losses = torch.stack(history).cpu() if history else torch.zeros(0, len(self.layers), 2)
        return torch.cat(self.gather(self.replicas.mean(losses.to(self.device)).cpu()), dim=1)

    # ---- what users of a PipelineEngine call -------------------------------------------------------

    def set_dataloader(self, loader: Iterable[Any]) -> None:
        """Sets the data loader; on the first stage alone, since no other reads data."""
        if self.is_first_stage():
            self.training_dataloader = loader
            self.data_iterator = iter(loader)

    def set_dataiterator(self, iterator: Iterator[Any] | None) -> None:
        """Sets the iterator over micro-batches; on the first stage alone."""
        if self.is_first_stage():
            self.training_dataloader = None  # type: ignore[assignment]
            self.data_iterator = iterator  # type: ignore[assignment]

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Sets the number of micro-batches per batch; must be called on every rank between batches.

        Raises:
            ALConfigError: the size is no positive multiple of the micro-batch size times the number of replicas, or
                ``steps_per_batch`` does not divide the new number of micro-batches.
        """
        self._refuse_with_recovery("set_train_batch_size()")
        unit = self.micro_batch_size * self.replicas.count
        if type(train_batch_size) is not int or train_batch_size < 1 or train_batch_size % unit:
            raise ALConfigError(
                f"set_train_batch_size: got {train_batch_size!r}: expected a positive multiple of {unit}, "
                f"{self.micro_batch_size} samples of a micro-batch on {self.replicas.count} replicas"
            )
        micro_batches = train_batch_size // unit
        if self.al.steps_per_batch and micro_batches % self.al.steps_per_batch:
            raise ALConfigError(
                f"train_batch_size={train_batch_size} makes {micro_batches} micro-batches, which steps_per_batch="
                f"{self.al.steps_per_batch} does not divide"
            )
        super().set_train_batch_size(train_batch_size)

    def reset_activation_shape(self) -> None:
        """Accepts new shapes of micro-batches; must be called on every rank, between batches."""
        self._refuse_with_recovery("reset_activation_shape()")
        self.links.reset()
        self.stage.reset_shapes()
        self.preparation.reset_shape()

    def flush(self) -> None:
        """Waits until all messages of this stage are sent and the checkpoint that is being written is complete.

        The engine does so itself when the process ends.

        Raises:
            ALCheckpointError: an asynchronous save failed.
            ALLayerError: a number of the latest micro-batches was NaN or infinite. With ``"save_and_stop"`` a joint
                call before raises it on all ranks, and saves.
        """
        if self.sender is not None:
            self.sender.flush()
        self.checkpoints.flush()
        self.stage.finite.settle()
        if self.stops is not None:
            self.stops.settle()

    def destroy(self) -> None:
        """Waits for the last messages, ends the watchdog, and frees the resources of DeepSpeed."""
        try:
            self.flush()
        finally:
            if self.watchdog is not None:
                self.watchdog.stop()
            super().destroy()

    def _save_at_stop(self) -> Path:
        """Saves the checkpoint of ``"save_and_stop"``, where nobody else does."""
        self.save_checkpoint(STOPPED, asynchronous=False)
        return Path(STOPPED, f"global_step{self.global_steps}").resolve()

    def compile(  # type: ignore[override]
        self, backend: str = "inductor", compile_kwargs: dict[str, Any] | None = None, **unsupported: Any
    ) -> None:
        """Compiles f and b of every layer of this stage, as the config's ``compile`` block does; on every rank.

        Args:
            backend: of ``torch.compile``.
            compile_kwargs: ``{"options": {...}}`` for the backend.

        Raises:
            ALConfigError: the layers are already compiled, shapes may change, or an option is not supported.
        """
        self._compile(compile_config(backend, compile_kwargs, unsupported))

    # ---- for a process that takes the place of another one (ds_al/recovery) ---------------------------

    def skip_batch(self) -> None:
        """Moves the data, the counters and the LR schedule as :meth:`train_batch` does."""
        data = self.data_iterator if self.is_first_stage() else None
        if isinstance(data, ShuffledLoader) and self.batch_fn is None:
            data.seek(data.position + self.micro_batches)
        elif data is not None:
            for _ in range(self.micro_batches):
                self._next_batch()
        self._count_batch()
        self.stage.trained_micro_batches += self.micro_batches
        steps = 1 if self.al.count == "batch" else self.steps_per_batch
        for _ in range(steps):
            self._count_step()

    @property
    def whole_report(self) -> Tensor:
        """Losses and metrics of all stages up to this one, which messages carry."""
        return self._parts.report.flat

    def forget_losses(self) -> None:
        """Forgets the losses that :meth:`gather_losses` has returned."""
        self._parts.report.history = []


for _call, _instead in host.INSTEAD.items():
    setattr(ALPipelineEngine, _call, host.refused(_call, _instead))
