"""``ALPipelineEngine``: DeepSpeed's pipeline engine, whose stages learn locally and step at once.

How a stage trains a batch is in :mod:`ds_al.training.engine`, with its numbered steps; evaluation is in
:mod:`ds_al.training.evaluation`. Here is what else users call: statistics, sizes, checkpoints, and layers that move.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ds_al import host
from ds_al.checkpoint import moves
from ds_al.checkpoint.check import Wanted
from ds_al.checkpoint.saving import Checkpoints
from ds_al.checkpoint.state import StageState
from ds_al.checkpoint.writer import Destination
from ds_al.compute.compile import compile_config, compile_layers
from ds_al.config.base import BLOCK
from ds_al.config.settings import Settings
from ds_al.data.loader import ShuffledLoader, loader_of
from ds_al.errors import ALCheckpointError, ALConfigError
from ds_al.module import ALPipelineModule
from ds_al.optim.stop import SaveAndStop
from ds_al.parallel.agreement import agreed
from ds_al.partition.plan import explicit
from ds_al.partition.rebalance import Rebalance
from ds_al.trace import StageMetrics, StageStats, Tracing, Watchdog, joint_call
from ds_al.training.evaluation import EvaluatingEngine

STOPPED = "checkpoints"
"""Folder, in the working directory, of the checkpoint that ``"non_finite": "save_and_stop"`` saves by default."""


class ALPipelineEngine(EvaluatingEngine):
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
        self.checkpoints = Checkpoints(self.topology)
        self.loader: ShuffledLoader | None = None
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

    @joint_call
    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        asynchronous: bool | None = None,
    ) -> bool:
        """Saves weights, optimizers, LR schedule, counters, random state and data position, by AL layer.

        Every rank calls it, after the same batch. The previous checkpoint stays intact if the save fails.

        Args:
            save_dir: folder of all checkpoints, accessible to every rank. Further arguments as in DeepSpeed.
            client_state: state of the caller, separate for each rank: numbers, strings, tensors, lists and dicts of
                them.
            asynchronous: copies the state to the host and returns; a thread writes it, and :meth:`flush` waits for it.
                By default what the config says.

        Raises:
            ALCheckpointError: on every rank, if one cannot write, or a value has no safe form; an asynchronous save
                raises it in the next save, in ``flush()`` or in ``destroy()``.
        """
        if not save_dir:
            raise ALCheckpointError(f"save_checkpoint: got save_dir={save_dir!r}, expected a folder")
        if asynchronous:
            self._refuse_with_recovery("save_checkpoint(asynchronous=True)")
        options = self.al.checkpoint
        name = f"global_step{self.global_steps}" if tag is None else str(tag)
        self.checkpoints.save(
            self.state(),
            Destination(Path(save_dir), name, latest=save_latest, keep=options.keep_last),
            client_state=client_state or {},
            leave_out_frozen=exclude_frozen_parameters,
            asynchronous=options.asynchronous if asynchronous is None else asynchronous,
            settle=self.stage.finite.settle,
        )
        return True

    def _save_at_stop(self) -> Path:
        """Saves the checkpoint of ``"save_and_stop"``, where nobody else does."""
        self.save_checkpoint(STOPPED, asynchronous=False)
        return Path(STOPPED, f"global_step{self.global_steps}").resolve()

    @joint_call
    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: None = None,
    ) -> tuple[str, dict[str, Any]]:
        """Loads what :meth:`save_checkpoint` saved on any number of stages; training continues bit for bit.

        Every rank calls it, and reads the files of its own layers. All ranks check everything before any changes.

        Args:
            load_dir: folder of all checkpoints. Further arguments as in DeepSpeed.
            load_module_only: loads weights and buffers only.

        Returns:
            The path of the checkpoint's index, and the ``client_state`` that this rank saved; on another number of
            stages than at the save that of the first stage.

        Raises:
            ALCheckpointError: on every rank: there is no checkpoint, a file is missing, truncated or altered, or the
                checkpoint is of another network, optimizer, LR schedule, seed or micro-batch size.
        """
        if custom_load_fn is not None:
            raise ALCheckpointError("load_checkpoint: a pipeline takes no custom_load_fn: see ds_al.load_weights")
        training = not load_module_only
        wanted = Wanted(
            training=training,
            optimizer=training and load_optimizer_states,
            schedule=training and load_lr_scheduler_states,
            strict=load_module_strict,
        )
        state = self.state()
        path, client_state = self.checkpoints.load(state, load_dir, tag, wanted)
        self.set_counters(state)
        if state.loaded_stages is not None:
            self.loaded_checkpoint_mp_world_size = state.loaded_stages
        return path, client_state

    def state(self) -> StageState:
        """Returns the state of this stage that a save consists of."""
        return StageState(
            topology=self.topology,
            module=self.module,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            report=self._parts.report,
            decoder_copies=self.decoder_copies,
            loader=self.loader,
            micro_batch_size=self.micro_batch_size,
            step_after=self._step_after,
            counters={
                "global_steps": self.global_steps,
                "global_samples": self.global_samples,
                "skipped_steps": self.skipped_steps,
                "micro_steps": self.micro_steps,
                "trained_micro_batches": self.stage.trained_micro_batches,
            },
            device=self.device,
        )

    @property
    def _step_after(self) -> Literal["batch", "micro_batch", "config"]:
        if self.al.steps_per_batch is not None:
            return "config"
        return "micro_batch" if self.steps_per_batch == self.micro_batches else "batch"

    @joint_call
    def repartition(self, bounds: Sequence[int] | str) -> bool:
        """Moves layers between the stages, with all their state; training continues bit for bit. Drains the pipeline.

        Every rank calls it, after the same batch. The layers that move are built anew on their new stage, and the
        stage's LR schedule on every rank: read :attr:`lr_scheduler` again afterwards.

        Args:
            bounds: of the stages, ``[0, ..., N]``, or the first layers of all stages but the first, ``"cuts:2,5"``.

        Returns:
            Whether a layer has moved.

        Raises:
            ALConfigError: on every rank, and nothing has changed: the bounds do not fit, or what the user gave to
                ``initialize`` or changed since cannot follow a layer, nor can a sparse tensor of a layer or its
                optimizer.
        """
        self._refuse_with_recovery("repartition()")
        found = agreed(
            "repartition", lambda: self._checked_bounds(bounds), facts=lambda found: {"bounds": found}, bounded=False
        )
        if found == self.module.bounds:
            return False
        self.flush()
        with self.runner.timed("Repartition"), self.generators.aside():
            former, count = self._parts.report, self.stage.trained_micro_batches
            moved = moves.move(self.state(), found)
            self._make_optimizer_again()
            arrived = [(index, layer) for index, layer in self.module.local_layers if index in moved.arrived]
            self._prepare(arrived)
            if self._compiled is not None:
                compile_layers(arrived, self._compiled, dynamic_shape=self.dynamic_shape)
            self.param_names = {weight: name for name, weight in self.module.named_parameters()}
            self._take_layers(watch=count == 0)
            self.stage.trained_micro_batches = count
            self._parts.report.continue_from(former, layers=found[self.stage_id + 1])
            self.preparation.objective = self.module.objective
            self.inference.reset()
            self.links.reset()
            moves.restore(self.state(), moved)
        return True

    def _move_if_better(self, rebalance: Rebalance) -> None:
        bounds = rebalance.after_batch(self.layers, self.module.bounds, micro_batches=self.micro_batches)
        if bounds is None:
            return
        if self.global_rank == 0 and self.steps_per_print():
            print(f"ds_al: layers move after {self.global_steps} steps: {self.module.bounds} -> {bounds}", flush=True)
        self.repartition(bounds)

    def _check_can_move(self) -> None:
        """Raises :class:`~ds_al.errors.ALConfigError` if something that the user gave cannot follow a layer."""
        given = {
            "more stages than AL layers": self.module.runs is not None,
            "new_parts_first": self.module.new_parts_first > 0,
            f'"{BLOCK}.recovery": a new process could not repeat it': self._recovery is not None,
            "an optimizer instance: give a callable, lambda groups: torch.optim.AdamW(groups)": isinstance(
                self.client_optimizer, torch.optim.Optimizer
            ),
            "model_parameters: freeze the others by requires_grad_(False)": self._selection is not None,
            "an LR schedule instance: give a callable, lr_scheduler=lambda optimizer: ...": not (
                self.client_lr_scheduler is None or callable(self.client_lr_scheduler)
            ),
        }
        for what, is_given in given.items():
            if is_given:
                raise ALConfigError(f"layers cannot change their stage with {what}")

    def _checked_bounds(self, bounds: Sequence[int] | str) -> list[int]:
        self._check_can_move()
        layers, stages = self.module.num_layers, self.num_stages
        text = bounds if isinstance(bounds, str) else f"cuts:{','.join(str(bound) for bound in list(bounds)[1:-1])}"
        found = explicit(text, layers=layers, stages=stages)
        if not isinstance(bounds, str) and list(bounds) != found:
            raise ALConfigError(f"got bounds {list(bounds)}: expected {stages + 1} of them, from 0 to {layers}")
        return found

    # ---- for a process that takes the place of another one (ds_al/recovery) ---------------------------

    def set_counters(self, state: StageState) -> None:
        """Sets all counters to those of a state that was restored."""
        self.stage.trained_micro_batches = state.counters.pop("trained_micro_batches")
        for counter, value in state.counters.items():
            setattr(self, counter, value)

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

    def _refuse_with_recovery(self, call: str) -> None:
        if self._recovery is not None:
            raise ALConfigError(f'{call} with "{BLOCK}.recovery": a new process could not repeat it. Leave it out')


for _call, _instead in host.INSTEAD.items():
    setattr(ALPipelineEngine, _call, host.refused(_call, _instead))
