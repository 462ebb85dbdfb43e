"""``SavingEngine``: the state of a stage, checkpoints of it, and the calls after which it could not be made again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ds_al.checkpoint.check import Wanted
from ds_al.checkpoint.saving import Checkpoints
from ds_al.checkpoint.state import StageState
from ds_al.checkpoint.writer import Destination
from ds_al.config.base import BLOCK
from ds_al.data.loader import ShuffledLoader
from ds_al.errors import ALCheckpointError, ALConfigError
from ds_al.trace import joint_call
from ds_al.training.evaluation import EvaluatingEngine


class SavingEngine(EvaluatingEngine):
    """Saves and loads what a :class:`~ds_al.training.engine.TrainingEngine` trains."""

    loader: ShuffledLoader | None = None
    """Loader of ``training_data``, whose position is part of the state; on the first stage alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.checkpoints = Checkpoints(self.topology)

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

    def set_counters(self, state: StageState) -> None:
        """Sets all counters to those of a state that was restored."""
        self.stage.trained_micro_batches = state.counters.pop("trained_micro_batches")
        for counter, value in state.counters.items():
            setattr(self, counter, value)

    def _refuse_with_recovery(self, call: str) -> None:
        if self._recovery is not None:
            raise ALConfigError(f'{call} with "{BLOCK}.recovery": a new process could not repeat it. Leave it out')
