"""``ALPipelineEngine``: DeepSpeed's pipeline engine, whose stages learn locally and step at once.

For every micro-batch a stage does, in the order of its schedule (:mod:`ds_al.schedule`):

    [1] LoadMicroBatch / RecvActivation   take (s, t) in; receives are posted ahead
        RefreshDecoders, SendDecoders     now and then, where the objective decodes while it trains
    [2] ForwardPass                       s_i = f_i(s_{i-1}), t_i = g_i(t_{i-1}) for each local layer
    [3] SendActivation                    send (s, t) of the last local layer on, without waiting
    [4] BackwardPass                      A_i and E_i of each local layer, and their gradients
        ReduceGrads                       their means, where the pipeline has data parallel copies
    [5] OptimizerStep                     local, on this stage alone

Nothing flows from a later stage to an earlier one. Losses travel downstream with the activations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from deepspeed import comm as dist
from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    LoadMicroBatch,
    OptimizerStep,
    PipeSchedule,
    RecvActivation,
    ReduceGrads,
    SendActivation,
)
from torch import Tensor

from ds_al.assembly import AssembledStage
from ds_al.batch import BatchPreparation
from ds_al.checkpoint import Checkpoints
from ds_al.compute.compile import ComputeOptions
from ds_al.config.associated_learning import ALConfig
from ds_al.config.precision import FULL, Precision
from ds_al.data.loader import ShuffledLoader
from ds_al.decoders import DecoderCopies
from ds_al.errors import ALDataError
from ds_al.inference import Inference
from ds_al.measured import MeasuredStage
from ds_al.module import ALPipelineModule
from ds_al.optim.local import LocalOptimizer
from ds_al.schedule import AL_SCHEDULES, Barrier, RefreshDecoders, Repeated, SendDecoders
from ds_al.stage import LocalStage
from ds_al.tensors import Activation, Target, first
from ds_al.trace import Report, StageMeter, Tracing, Watchdog
from ds_al.transport.compression import COMPRESSIONS
from ds_al.transport.message import pack, unpack


class _Now:
    """The micro-batch that a stage is at: ``(s, t)`` before or after its layers."""

    __slots__ = ("s", "t")
    s: Activation
    t: Target


class ALPipelineEngine(AssembledStage, MeasuredStage, Checkpoints, ComputeOptions):
    """Trains an :class:`~ds_al.module.ALPipelineModule`. Made by :func:`ds_al.initialize`.

    It is a ``deepspeed.PipelineEngine``: ``train_batch``, ``eval_batch``, ``set_batch_fn``,
    ``set_train_batch_size``, ``reset_activation_shape``, ``is_first_stage``, ``is_last_stage``,
    ``save_checkpoint`` and ``load_checkpoint`` keep their signatures.
    """

    module: ALPipelineModule
    watchdog: Watchdog | None = None

    def __init__(
        self,
        *args: Any,
        al_config: ALConfig,
        precision: Precision = FULL,
        zero_stage: int = 0,
        training_data: Any = None,
        **kwargs: Any,
    ) -> None:
        self.al, self.precision, self.zero_stage = al_config, precision, zero_stage
        self.training_step = False
        super().__init__(*args, training_data=None, **kwargs)
        self._is_made = True
        self.layers = self.module.local_layers
        self._prepare_layers()
        self.stage = LocalStage(
            self.layers,
            stage_id=self.stage_id,
            base_seed=self.module.base_seed,
            device=self.device,
            number=self.replicas.number,
            loss_scales=getattr(self.optimizer, "scales", {}),
        )
        self.preparation = BatchPreparation(
            objective=self.module.objective,
            num_classes=self.module.num_classes,
            micro_batch_size=self.micro_batch_size,
            device=self.device,
            dtype=precision.dtype if precision.is_low else None,
            check=al_config.check_inputs,
            dynamic_shape=self.dynamic_shape,
        )
        self.sender, self.receiver = self._open_channels()
        self.compression = COMPRESSIONS[al_config.message_dtype]()
        self.decoder_copies = DecoderCopies(self) if self.module.objective.needs_earlier_decoders else None
        self.inference = Inference(self)
        self.loader: ShuffledLoader | None = None
        if training_data is not None and self.is_first_stage():
            self.loader = self._loader(training_data)
            self.set_dataloader(self.loader)

        self._report = Report(
            stages=self.num_stages,
            layers=self.module.num_layers,
            stage=self.stage_id,
            first_layer=self.layers[0][0],
            device=self.device,
        )
        self.report = self._report.losses
        """Latest known ``(A_i, E_i)`` of every layer up to this stage, means over a batch; NaN where unknown."""
        self._meter = StageMeter()
        self._loss_history: list[Tensor] = []
        self._now = _Now()
        self._schedules: dict[tuple[Any, ...], PipeSchedule] = {}
        self.reset_stats()
        self.tracing = Tracing.of(self, al_config)

    # ---- training ----------------------------------------------------------------------------------

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """Trains this stage on the next ``gradient_accumulation_steps()`` micro-batches.

        Returns as soon as this stage is through: other stages may be behind or ahead.

        Args:
            data_iter: yields micro-batches ``(x, labels)``; read on the first stage alone. ``x`` is a tensor
                ``(B, ...)`` or a tuple of tensors, ``labels`` are integers ``(B,)``. May be left out where
                ``initialize`` was given training data.

        Returns:
            The sum of this stage's local losses, mean over the batch of this copy of the pipeline: a scalar tensor
            on the device, not waited for. :attr:`report` and :meth:`gather_losses` have the losses of other stages.

        Raises:
            ALDataError: a batch that cannot be trained on (first stage).
            ALLayerError: a layer raised or returned something that cannot travel.
            ALTransportError: a neighbouring stage is gone, or shapes changed.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("train_batch() requires gradients enabled. Use eval_batch() instead.")
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        if not self.module.training:
            self.module.train()
        if self.tracing is not None:
            self.tracing.before_batch()
        self.stage.recorder = self.recorder
        start = time.perf_counter()
        self._meter.start(self._totals())
        if self.receiver is not None:
            self.receiver.expect(self.micro_batches)
        self._exec_schedule(self._train_schedule())
        loss = self._end_batch()
        self._counters.wall += time.perf_counter() - start
        self._report.set_metrics(self._meter.stop(self._totals(), micro_batches=self.stage.trained_micro_batches))
        if self.tracing is not None:
            self.tracing.after_batch()
        return loss

    def _train_schedule(self) -> PipeSchedule:
        key = self.micro_batches, self.num_stages, self.stage_id, self.al.steps_per_batch
        if key not in self._schedules:
            schedule = AL_SCHEDULES[self.al.method](*key)
            self._schedules[key] = Repeated(
                schedule,
                reduce_gradients=self.replicas.count > 1,
                refresh_decoders=self.decoder_copies is not None,
            )
        return self._schedules[key]

    def _end_batch(self) -> Tensor:
        self.micro_steps += self.micro_batches
        self.global_samples += self.train_batch_size()
        losses = self.stage.take_losses(self.micro_batches)
        self._loss_history.append(losses)
        index = self.layers[0][0]
        self.report[index : index + len(self.layers)] = losses
        if self.al.count == "batch":
            self._count_step()
        self.agg_train_loss = losses.sum()
        if self.device.type == "cpu":
            self.stage.check_finite(losses)
        self._log()
        return self.agg_train_loss

    def _count_step(self) -> None:
        self.global_steps += 1
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()

    def _log(self) -> None:
        every = self.steps_per_print()
        if self.global_rank == 0 and every and self.global_steps and self.global_steps % every == 0:
            rates = ", ".join(f"{rate:.3g}" for rate in sorted(set(self.get_lr())))
            print(f"steps: {self.global_steps} stage 0 loss: {self.agg_train_loss.item():.4f} lr: {rates}", flush=True)
        if self.global_rank == 0 and self.monitor.enabled:
            self.monitor.write_events(
                [
                    ("Train/Samples/train_loss", self.agg_train_loss.item(), self.global_samples),
                    ("Train/Samples/lr", self.get_lr()[0], self.global_samples),
                ]
            )

    # ---- instructions ------------------------------------------------------------------------------

    def _exec_load_micro_batch(self, buffer_id: int) -> None:
        start = time.perf_counter()
        try:
            batch = self._next_batch()
        except StopIteration:
            raise ALDataError(
                f"the data ran out after {self.stage.trained_micro_batches} micro-batches: a batch takes "
                f"{self.micro_batches}. Wrap the loader in deepspeed.utils.RepeatingLoader, or train fewer batches"
            ) from None
        counters = self._counters
        counters.waited_for_data = time.perf_counter() - start
        counters.wait_data += counters.waited_for_data
        self._now.s, self._now.t = self.preparation(batch)

    def _exec_recv_activations(self, buffer_id: int) -> None:
        assert self.receiver is not None
        now, message = self._now, self.compression.decode(self.receiver.receive())
        now.s, now.t, report = unpack(message, target_tensors=self.preparation.objective.target_tensors)
        self._report.take_over(report)

    def _exec_forward_pass(self, buffer_id: int) -> None:
        now = self._now
        self._counters.samples += first(now.s).shape[0]
        now.s, now.t = self.stage.forward(now.s, now.t)

    def _exec_refresh_decoders(self) -> None:
        assert self.decoder_copies is not None
        if self.decoder_copies.due(self.stage.trained_micro_batches):
            self.decoder_copies.refresh()

    def _exec_send_decoders(self) -> None:
        assert self.decoder_copies is not None
        if self.decoder_copies.due(self.stage.trained_micro_batches):
            self.decoder_copies.send()

    def _exec_send_activations(self, buffer_id: int) -> None:
        assert self.sender is not None
        self.sender.send(self.compression.encode(pack(self._now.s, self._now.t, self._report.flat)))

    def _exec_backward_pass(self, buffer_id: int) -> None:
        self.stage.backward(scale=(self.al.steps_per_batch or self.micro_batches) / self.micro_batches)
        if self.receiver is not None:
            self.receiver.release()

    def _exec_reduce_grads(self) -> None:
        own = isinstance(self.optimizer, LocalOptimizer)
        self.replicas.average_gradients(self.optimizer.gradients_of() if own else self.module.parameters())

    def _exec_optimizer_step(self, lr_kwargs: Any = None) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.al.count == "step":
            self._count_step()

    def _exec_barrier(self) -> None:
        dist.barrier(group=self.grid.get_pipe_parallel_group())

    _INSTRUCTION_MAP: ClassVar[dict[Any, Callable[..., None]]] = {
        LoadMicroBatch: _exec_load_micro_batch,
        RecvActivation: _exec_recv_activations,
        RefreshDecoders: _exec_refresh_decoders,
        SendDecoders: _exec_send_decoders,
        ForwardPass: _exec_forward_pass,
        SendActivation: _exec_send_activations,
        BackwardPass: _exec_backward_pass,
        ReduceGrads: _exec_reduce_grads,
        OptimizerStep: _exec_optimizer_step,
        Barrier: _exec_barrier,
    }

    # ---- what users of a PipelineEngine call -------------------------------------------------------

    def set_dataloader(self, loader: Iterable[Any]) -> None:
        """Keeps a loader; on the first stage alone, since no other reads data."""
        if self.is_first_stage():
            self.training_dataloader = loader
            self.data_iterator = iter(loader)

    def set_dataiterator(self, iterator: Iterator[Any] | None) -> None:
        """Reads micro-batches from this iterator from now on; on the first stage alone."""
        if self.is_first_stage():
            self.training_dataloader = None  # type: ignore[assignment]
            self.data_iterator = iterator  # type: ignore[assignment]

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Changes the number of micro-batches per batch; must be called on every rank between batches.

        Raises:
            ValueError: the size is no multiple of the micro-batch size, or ``steps_per_batch`` does not
                divide the new number of micro-batches.
        """
        micro_batches = train_batch_size // self.micro_batch_size
        if self.al.steps_per_batch and micro_batches % self.al.steps_per_batch:
            raise ValueError(
                f"train_batch_size={train_batch_size} makes {micro_batches} micro-batches, which steps_per_batch="
                f"{self.al.steps_per_batch} does not divide"
            )
        super().set_train_batch_size(train_batch_size)

    def flush(self) -> None:
        """Waits until all messages of this stage have left, and the checkpoint that is being written is complete.

        Done by itself when the process ends.

        Raises:
            ALCheckpointError: an asynchronous save failed.
        """
        if self.sender is not None:
            self.sender.flush()
        self.checkpoint_writer.flush()

    def destroy(self) -> None:
        """Lets the last messages leave, ends the watchdog, and frees what DeepSpeed holds."""
        try:
            self.flush()
        finally:
            if self.watchdog is not None:
                self.watchdog.stop()
            super().destroy()

    def reset_activation_shape(self) -> None:
        """Lets the shapes of micro-batches change; on every rank, between batches."""
        for channel in (self.sender, self.receiver):
            if channel is not None:
                channel.reset()
        self.preparation.reset_shape()

    def eval_batch(
        self,
        data_iter: Iterator[Any] | None,
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Any:
        """Evaluates the next micro-batches of ``data_iter`` without training; every rank must call it.

        Micro-batches may have any size. See :meth:`evaluate` for a whole data set and every exit.

        Args:
            data_iter: yields ``(x, labels)``; read on the first stage.
            return_logits: also return the scores ``(samples, V)`` of all micro-batches, on every rank.
            compute_loss: ``False`` returns ``None`` in place of the loss.
            reduce_output: ``"avg"``, or ``None`` for the losses of the single micro-batches.
            bcast_loss: has no effect: every rank gets the loss.
            num_micro_batches: how many to take; by default as many as in training.

        Returns:
            The loss of the last exit's scores against the labels (``D_E`` of the first layer), or
            ``(loss, scores)``.
        """
        return self.inference.eval_batch(
            data_iter,
            micro_batches=self.micro_batches if num_micro_batches is None else num_micro_batches,
            return_logits=return_logits,
            compute_loss=compute_loss,
            reduce_output=reduce_output,
        )

    def evaluate(self, batches: Iterable[Any] | None) -> dict[str, Any]:
        """Accuracy and loss at every exit over a data set; every rank must call it.

        Args:
            batches: a sized iterable of ``(x, labels)``, such as a ``DataLoader``; batches of any size. Read on
                the first stage, ``None`` elsewhere is fine.

        Returns:
            ``{"accuracy": [a_1, ..., a_N], "loss": [l_1, ..., l_N], "samples": n}`` on every rank; exit N is
            the full inference path.
        """
        return self.inference.evaluate(batches)

    def predict(self, x: Activation | None, exit: int | None = None, average: int = 1) -> Tensor:
        """Label scores ``(B, V)`` after ``exit`` layers (1-based, by default all); every rank must call it.

        Args:
            x: input of the first layer; read on the first stage, ``None`` elsewhere is fine.
            average: of so many exits, ``exit`` and those before it; 2 or more give the log of their mean probability.

        Returns:
            The scores, on every rank.
        """
        return self.inference.predict(x, exit=exit, average=average)
