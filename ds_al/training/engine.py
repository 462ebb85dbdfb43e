"""``TrainingEngine``: DeepSpeed's pipeline engine, whose stages learn locally and step at once.

For every micro-batch a stage executes, in the order of its schedule (:mod:`ds_al.schedule`):

    [1] LoadMicroBatch / RecvActivation   load or receive (s, t); receives are posted ahead
        RefreshDecoders, SendDecoders     at fixed intervals, where the objective decodes while it trains
    [2] ForwardPass                       s_i = f_i(s_{i-1}), t_i = g_i(t_{i-1}) for each local layer
    [3] SendActivation                    send (s, t) of the last local layer, without waiting
    [4] BackwardPass                      A_i and E_i of each local layer, and their gradients
        ReduceGrads                       their means, where the pipeline has data parallel replicas
    [5] OptimizerStep                     local, on this stage alone

Nothing is sent from a later stage to an earlier one. Losses are sent downstream with the activations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, ClassVar

import torch
from deepspeed.runtime.pipe.schedule import OptimizerStep, PipeInstruction, PipeSchedule, ReduceGrads
from torch import Tensor

from ds_al import host
from ds_al.batch import BatchPreparation, input_check
from ds_al.compute.compile import compile_layers
from ds_al.compute.recompute import Recomputed
from ds_al.config import groups
from ds_al.config.associated_learning import CompileConfig
from ds_al.config.base import BLOCK
from ds_al.config.settings import Settings
from ds_al.errors import ALConfigError, ALDataError
from ds_al.group.run import GroupRun
from ds_al.group_schedule import GROUP_SCHEDULES
from ds_al.module import ALPipelineModule
from ds_al.optim import masters, schedules
from ds_al.optim.accepted import required
from ds_al.optim.groups import Layers, Selection, given_elsewhere
from ds_al.optim.stop import SaveAndStop
from ds_al.parallel.replicas import Replicas
from ds_al.parallel.topology import StageTopology
from ds_al.recovery.stage import StageRecovery
from ds_al.runner import Runner
from ds_al.schedule import AL_SCHEDULES, Barrier, RefreshDecoders, Repeated, SendDecoders
from ds_al.system.generators import Generators
from ds_al.tensors import Activation, Target
from ds_al.trace import Calls, Observation, Recording, StageCounters, StageMeter, batch_call
from ds_al.training.observation import observed
from ds_al.training.optimizer import OptimizerEngine
from ds_al.training.parts import StageParts, Surroundings
from ds_al.transport.compression import COMPRESSIONS
from ds_al.transport.neighbours import Links


class TrainingEngine(OptimizerEngine):
    """Trains the layers of one stage; base of :class:`~ds_al.engine.ALPipelineEngine`.

    Private names of DeepSpeed that it overrides or uses (runtime/engine.py and runtime/pipe/engine.py, 0.19.0 and
    0.19.8), in addition to those of its base: ``_config``, ``_broadcast_model``, ``_is_compiled``, ``_exec_schedule``,
    ``_INSTRUCTION_MAP``, ``_reserve_pipe_buffers``, ``_next_batch``.

    Args:
        model: the network.
        settings: the config, validated.
        model_parameters: what the optimizer trains; by default all weights that require a gradient.
        stops: stops all ranks after the same batch, with ``"non_finite": "save_and_stop"``.
        options: of DeepSpeed's engine.
    """

    _is_compiled: bool

    def __init__(
        self,
        *,
        model: ALPipelineModule,
        settings: Settings,
        model_parameters: Any = None,
        stops: SaveAndStop | None = None,
        **options: Any,
    ) -> None:
        self.settings, self.al = settings, settings.al
        self.topology = StageTopology.of(model)
        if model.runs is not None:
            groups.check(settings, layers=model.num_layers, stages=self.topology.stages)
            self.al = groups.chosen(settings, sizes=model.groups)
            if self.al is not settings.al and self.topology.stage == self.topology.replica == 0:
                print(f"group_schedule auto: {self.al.group_schedule}", flush=True)
        self.replicas = Replicas(self.topology.replica, self.topology.replicas, group=self.topology.replica_group)
        self._selection = None
        if model_parameters is not None:
            self._selection = Selection.of(
                model_parameters,
                model.local_layers,
                elsewhere=given_elsewhere(model.al_layers, model.local_layers),
                where="model_parameters",
            )
        super().__init__(model=model, training_data=None, **options)
        host.set_precision(self._config, dtype=settings.precision.dtype, zero_stage=settings.zero_stage)
        self._compiled: CompileConfig | None = None
        self._prepare(self.module.local_layers)
        if self.al.compile is not None:
            self._compile(self.al.compile)

        self.calls = Calls()
        self.recording = Recording()
        self._handlers: dict[type[PipeInstruction], Callable[..., None]] = {
            kind: MethodType(handler, self) for kind, handler in self._INSTRUCTION_MAP.items()
        }
        self.runner = Runner(self._handlers, observe=self._observe, recording=self.recording)
        self.generators = Generators()
        self.preparation = BatchPreparation(
            objective=self.module.objective,
            num_classes=self.module.num_classes,
            micro_batch_size=self.micro_batch_size,
            device=self.device,
            dtype=settings.precision.dtype if settings.precision.is_low else None,
            check=self.al.check_inputs,
            dynamic_shape=self.dynamic_shape,
            check_input=input_check(self.module.local_layers),
        )
        self._recovery: StageRecovery | None = None
        if self.al.recovery is not None:
            self._recovery = StageRecovery(self.al.recovery, self.topology, group=self.module.group)
        self.links = Links(
            self.topology,
            config=self.al,
            device=self.device,
            dynamic=self.dynamic_shape,
            decoders=self.module.objective.needs_earlier_decoders,
            place=self.module.place,
            recovery=None if self._recovery is None else self._recovery.borders,
        )
        self.sender, self.receiver = self.links.training
        self.compression = COMPRESSIONS[self.al.message_dtype]()
        self.counters = StageCounters(self.stage_id, senders=self.links.senders, receivers=self.links.receivers)
        self._meter = StageMeter()
        self.stops = stops
        """Its ``save`` may be set to what saves the checkpoint of ``"save_and_stop"``, and returns its path."""
        if stops is not None:
            self.calls.joint = stops.call
        self._around = Surroundings(
            al=self.al,
            topology=self.topology,
            replicas=self.replicas,
            device=self.device,
            dynamic_shape=self.dynamic_shape,
            preparation=self.preparation,
            links=self.links,
            compression=self.compression,
            counters=self.counters,
            generators=self.generators,
            recording=self.recording,
            load=self._load,
            scale=self._scale,
            found=None if stops is None else stops.found,
        )
        self._take_layers()
        self._schedules: dict[tuple[Any, ...], PipeSchedule] = {}

    def _prepare(self, layers: Layers) -> None:
        """Lets layers compute as the config says. Their masters, in low precision, come with the optimizer."""
        for _, layer in layers:
            layer.copies_inputs = self.al.copy_inputs
            if self.optimizer is None and self.settings.precision.is_low:
                masters.cast(layer, self.settings.precision.dtype)
            if interval := self.module.activation_checkpoint_interval:
                layer.recomputed = Recomputed(layer.f, interval=interval, copies_inputs=self.al.copy_inputs)

    def _compile(self, config: CompileConfig) -> None:
        if self.module.runs is not None:
            raise ALConfigError("engine.compile() with more stages than AL layers: it would depend on the stages' cuts")
        if self._is_compiled:
            raise ALConfigError(
                f'the layers are compiled already, by "{BLOCK}.compile" or engine.compile(): do it once'
            )
        compile_layers(self.module.local_layers, config, dynamic_shape=self.dynamic_shape)
        self._is_compiled, self._compiled = True, config

    def _take_layers(self, *, watch: bool = True) -> None:
        """Makes all that refers to the layers of this stage, see :class:`~ds_al.training.parts.StageParts`."""
        parts = StageParts(self.module, optimizer=self.optimizer, around=self._around, watch=watch)
        self._parts, self.layers, self.stage, self.run = parts, parts.layers, parts.stage, parts.run
        self.unused, self.decoder_copies = parts.unused, parts.decoder_copies
        self.report = parts.report.losses
        """Latest known ``(A_i, E_i)`` of every layer up to this stage, means over a batch; NaN where unknown."""
        self._handlers.update(parts.run.handlers)

    @torch.no_grad()
    def _broadcast_model(self) -> None:
        """Gives all replicas of the stage the weights of the first one; called by DeepSpeed's constructor. Its own
        method fails on weights whose channels lie last, and on those without dimensions."""
        if self.replicas.count > 1:
            for parameter in self.module.parameters():
                value = parameter.detach().contiguous()
                self.replicas.broadcast(value, source=0)
                parameter.copy_(value)

    # ---- training ----------------------------------------------------------------------------------

    @batch_call
    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """Trains this stage on the next ``gradient_accumulation_steps()`` micro-batches.

        Returns as soon as this stage is done: other stages may be behind or ahead.

        Args:
            data_iter: yields micro-batches ``(x, labels)``; read on the first stage only. ``x`` is a tensor
                ``(B, ...)`` or a tuple of tensors, ``labels`` are integers ``(B,)``. May be omitted if ``initialize``
                received training data.

        Returns:
            The sum of this stage's local losses, mean over the batch of this replica of the pipeline: a scalar tensor
            on the device, not waited for. :attr:`report` and :meth:`gather_losses` have the losses of other stages.

        Raises:
            ALConfigError: there is no optimizer, a weight requires a gradient since ``initialize``, or the call is
                inside ``torch.autocast``.
            ALDataError: a batch that cannot be trained on (first stage).
            ALLayerError: a layer raised or returned something that cannot be sent, or a loss, an output of f or g or a
                gradient is NaN or infinite: on a CPU before the step, on a GPU, whose host does not wait, up to 8
                micro-batches later. A weight is, up to 8 micro-batches later. With ``"non_finite": "save_and_stop"`` on
                all ranks after the same batch, whose checkpoint is saved.
            ALTransportError: a neighbouring stage is gone, or shapes changed.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("train_batch() requires gradients enabled. Use eval_batch() instead.")
        if torch.is_autocast_enabled(self.device.type):
            raise ALConfigError(
                "train_batch() was called inside torch.autocast, which keeps its copies of weights until it is left, "
                "so that no forward would read what a step has changed: call it outside, and set "
                '"bf16": {"enabled": true} in the config'
            )
        optimizer = required(self.optimizer)
        optimizer.check_weights()
        optimizer.refresh_fp32_params()
        if data_iter is not None:
            check_iterator(data_iter)
            self.set_dataiterator(data_iter)
        if not self.module.training:
            self.module.train()
        if self._parts.held is not None:
            self._parts.held.before_batch(self.global_samples)
        return self._train_batch() if self._recovery is None else self._recovery.train_batch(self._train_batch)

    def _train_batch(self) -> Tensor:
        start = time.perf_counter()
        self._meter.start(self._totals())
        self.run.expect(self.micro_batches)
        try:
            with self.generators.aside():
                self._exec_schedule(self._train_schedule())
        except BaseException:  # Ctrl-C in a notebook, too: the next batch must not begin with gradients of this one
            required(self.optimizer).zero_grad()
            raise
        loss = self._end_batch()
        self.counters.wall += time.perf_counter() - start
        trained, skipped = self.stage.trained_micro_batches, sum(self.counters.skips().values())
        self._parts.report.set_metrics(self._meter.stop(self._totals(), micro_batches=trained, skipped=skipped))
        return loss

    def _train_schedule(self) -> PipeSchedule:
        key = self.micro_batches, self.num_stages, self.stage_id, self.steps_per_batch
        if key not in self._schedules:
            schedule: PipeSchedule = AL_SCHEDULES[self.al.method](*key)
            if isinstance(self.run, GroupRun):
                kind = GROUP_SCHEDULES[self.al.group_schedule]
                schedule = kind(self.micro_batches, self.run.stage.place, self.steps_per_batch)
            self._schedules[key] = Repeated(
                schedule,
                reduce_gradients=self.replicas.count > 1,
                refresh_decoders=self.decoder_copies is not None,
            )
        return self._schedules[key]

    def _exec_schedule(self, pipe_schedule: PipeSchedule) -> None:
        self._reserve_pipe_buffers(pipe_schedule.num_pipe_buffers())
        self.fwd_outputs: list[Any] = []
        self.runner.run(pipe_schedule)

    def _end_batch(self) -> Tensor:
        self._count_batch()
        losses = self.stage.take_losses(self.micro_batches)
        self._parts.report.remember(losses)
        index = self.layers[0][0]
        self.report[index : index + len(losses)] = losses
        if self.al.count == "batch":
            self._count_step()
        self.agg_train_loss = losses.sum()
        self.unused.after_batch()
        self._log()
        return self.agg_train_loss

    def _count_batch(self) -> None:
        self.micro_steps += self.micro_batches
        self.global_samples += self.train_batch_size()

    def _count_step(self) -> None:
        self.global_steps += 1
        if self.lr_scheduler is not None:
            schedules.step(self.lr_scheduler)

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

    # ---- instructions beside those of ds_al/local_run.py and ds_al/group/run.py ----------------------

    def _load(self) -> tuple[Activation, Target]:
        """Loads the next micro-batch, on the first stage."""
        start = time.perf_counter()
        try:
            with self.generators.restored():
                batch = self._next_batch()
        except StopIteration:
            raise ALDataError(
                f"the data ran out after {self.stage.trained_micro_batches} micro-batches: a batch takes "
                f"{self.micro_batches}. Wrap the loader in deepspeed.utils.RepeatingLoader, or train fewer batches"
            ) from None
        counters = self.counters
        counters.waited_for_data = time.perf_counter() - start
        counters.wait_data += counters.waited_for_data
        return self.preparation(batch)

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps per batch: by default one per micro-batch, and one where layers span stages, K < P."""
        return self.al.steps_per_batch or (self.micro_batches if self.module.place is None else 1)

    def _scale(self) -> float:
        """Factor of a micro-batch's losses: gradients between two steps are averaged."""
        return self.steps_per_batch / self.micro_batches

    def _exec_refresh_decoders(self) -> None:
        """[1] Receives the copies of earlier decoders, where that is due at this micro-batch."""
        assert self.decoder_copies is not None
        if self.decoder_copies.due(self.stage.next_micro_batch):
            self.decoder_copies.refresh()

    def _exec_send_decoders(self) -> None:
        """[1] Sends these copies to the next stage, before the forward pass."""
        assert self.decoder_copies is not None
        if self.decoder_copies.due(self.stage.next_micro_batch):
            self.decoder_copies.send()

    def _exec_reduce_grads(self) -> None:
        """[4] Averages the gradients over the replicas of this stage."""
        assert self.optimizer is not None
        self.replicas.average_gradients(self.optimizer.gradients_of())

    def _exec_optimizer_step(self, lr_kwargs: Any = None) -> None:
        """[5] Steps the local layers."""
        assert self.optimizer is not None
        self.unused.before_step()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.al.count == "step":
            self._count_step()

    def _exec_barrier(self) -> None:
        """Waits for all stages; never part of the streaming schedule."""
        self.topology.barrier()

    _INSTRUCTION_MAP: ClassVar[dict[Any, Callable[..., None]]] = {
        RefreshDecoders: _exec_refresh_decoders,
        SendDecoders: _exec_send_decoders,
        ReduceGrads: _exec_reduce_grads,
        OptimizerStep: _exec_optimizer_step,
        Barrier: _exec_barrier,
    }

    def _totals(self) -> dict[str, float]:
        totals = {**self.runner.progress.seconds, "samples": self.counters.samples}
        if self.sender is not None and self.device.type == "cpu":  # on a GPU the host does not wait for a slot
            totals |= {"messages": self.sender.messages, "found_full": self.sender.found_full}
        return totals

    def _observe(self, instruction: PipeInstruction, seconds: float) -> Observation | None:
        return observed(instruction, seconds, parts=self._parts, links=self.links, counters=self.counters)


def check_iterator(data: Any) -> None:
    """Refuses what is no iterator, on every rank that got it: only the first stage would read it."""
    if not hasattr(data, "__next__"):
        raise ALDataError(
            f"got a {type(data).__name__}: expected an iterator over micro-batches, which the next call continues. "
            "Make one before the loop: iter(loader), or iter(deepspeed.utils.RepeatingLoader(loader)) for many epochs"
        )
