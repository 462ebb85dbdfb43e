"""``ALPipelineEngine``: DeepSpeed's pipeline engine, whose stages learn locally and step at once.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar, Literal

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import (
    LoadMicroBatch,
    OptimizerStep,
    PipeInstruction,
    PipeSchedule,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    SendActivation,
    SendGrad,
)
from torch import Tensor

from ds_al import host
from ds_al.batch import BatchPreparation, input_check
from ds_al.checkpoint import moves
from ds_al.checkpoint.check import Wanted
from ds_al.checkpoint.saving import Checkpoints
from ds_al.checkpoint.state import StageState
from ds_al.checkpoint.writer import Destination
from ds_al.compute.compile import compile_config, compile_layers
from ds_al.compute.recompute import Recomputed
from ds_al.config import groups
from ds_al.config.associated_learning import CompileConfig
from ds_al.config.base import BLOCK
from ds_al.config.optimizers import OptimizerConfig
from ds_al.config.settings import Settings
from ds_al.data.loader import ShuffledLoader, loader_of
from ds_al.decoders import DecoderCopies
from ds_al.errors import ALCheckpointError, ALConfigError, ALDataError
from ds_al.group.run import GroupRun
from ds_al.group.stage import GroupStage
from ds_al.group.together import Together
from ds_al.group_schedule import GROUP_SCHEDULES
from ds_al.inference import Inference
from ds_al.local_run import LocalRun
from ds_al.module import ALPipelineModule
from ds_al.optim import build, masters, names, schedules
from ds_al.optim.accepted import required
from ds_al.optim.groups import Layers, ParamGroups, Selection, given_elsewhere
from ds_al.optim.held import Held
from ds_al.optim.local import Factory, LocalOptimizer
from ds_al.optim.stop import SaveAndStop
from ds_al.optim.unused import UnusedWeights
from ds_al.parallel.agreement import agreed
from ds_al.parallel.replicas import Replicas
from ds_al.parallel.topology import StageTopology
from ds_al.partition.part import LayerPart
from ds_al.partition.plan import explicit
from ds_al.partition.rebalance import Rebalance
from ds_al.recovery.stage import StageRecovery
from ds_al.runner import Runner
from ds_al.schedule import AL_SCHEDULES, Barrier, RefreshDecoders, Repeated, SendDecoders
from ds_al.stage import LocalStage
from ds_al.system.generators import Generators
from ds_al.tensors import Activation, Target
from ds_al.trace import (
    Calls,
    Observation,
    Recording,
    Report,
    StageCounters,
    StageMeter,
    StageMetrics,
    StageStats,
    Tracing,
    Watchdog,
    batch_call,
    joint_call,
)
from ds_al.transport.compression import COMPRESSIONS
from ds_al.transport.neighbours import Links

STOPPED = "checkpoints"
"""Folder, in the working directory, of the checkpoint that ``"non_finite": "save_and_stop"`` saves by default."""


class ALPipelineEngine(PipelineEngine):
    """Trains an :class:`~ds_al.module.ALPipelineModule`. Made by :func:`ds_al.initialize`.

    It is a ``deepspeed.PipelineEngine``: ``train_batch``, ``eval_batch``, ``set_batch_fn``,
    ``set_train_batch_size``, ``reset_activation_shape``, ``is_first_stage``, ``is_last_stage``,
    ``save_checkpoint`` and ``load_checkpoint`` keep their signatures.

    Private names of DeepSpeed that it overrides or uses (runtime/engine.py and runtime/pipe/engine.py, 0.19.0 and
    0.19.8): ``_config``, ``_broadcast_model``, ``_configure_optimizer``, ``_configure_basic_optimizer``,
    ``_configure_lr_scheduler``, ``_is_supported_optimizer``, ``_is_compiled``, ``_exec_schedule``,
    ``_INSTRUCTION_MAP``, ``_reserve_pipe_buffers``,
    ``_next_batch``.
    """

    module: ALPipelineModule
    client_optimizer: Any
    optimizer: LocalOptimizer | None
    _is_compiled: bool

    def __init__(
        self,
        *,
        model: ALPipelineModule,
        settings: Settings,
        training_data: Any = None,
        model_parameters: Any = None,
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
        self.checkpoints = Checkpoints(self.topology)
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
        self.inference = Inference(
            self.module,
            topology=self.topology,
            preparation=self.preparation,
            channels=self.links.evaluation,
            generators=self.generators,
            timed=self.runner.timed,
            calls=self.calls,
        )
        self.counters = StageCounters(self.stage_id, senders=self.links.senders, receivers=self.links.receivers)
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

        self._meter = StageMeter()
        self.stops: SaveAndStop | None = None
        """Its ``save`` may be set to what saves the checkpoint of ``"save_and_stop"``, and returns its path."""
        if self.al.non_finite == "save_and_stop":
            self.stops = SaveAndStop(self._save_at_stop)
            self.calls.joint = self.stops.call
        self._take_layers()
        self._schedules: dict[tuple[Any, ...], PipeSchedule] = {}
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

    def _prepare(self, layers: Layers) -> None:
        """Lets layers compute as the config says. Their masters, in low precision, come with the optimizer."""
        for _, layer in layers:
            layer.copies_inputs = self.al.copy_inputs
            if self.optimizer is None and self.settings.precision.is_low:
                masters.cast(layer, self.settings.precision.dtype)
            if interval := self.module.activation_checkpoint_interval:
                layer.recomputed = Recomputed(layer.f, interval=interval, copies_inputs=self.al.copy_inputs)

    def _take_layers(self, *, watch: bool = True) -> None:
        """Makes all that refers to the layers of this stage.

        Args:
            watch: whether the next batch is the first one, in which each trained weight must get a gradient.
        """
        self.layers = self.module.local_layers
        place = self.module.place
        common: dict[str, Any] = {
            "stage_id": self.stage_id,
            "base_seed": self.module.base_seed,
            "device": self.device,
            "number": self.replicas.number,
            "loss_scales": self.optimizer.scales if self.optimizer is not None else {},
            "fixed_shapes": self.num_stages > 1 and not self.dynamic_shape,
            "generators": self.generators,
            "recording": self.recording,
            "skips": self.al.non_finite != "raise",
            "found": None if self.stops is None else self.stops.found,
        }
        if self.optimizer is not None:
            self.counters.skips = lambda: required(self.optimizer).skipped
        self.stage: LocalStage
        index, part = self.layers[0]
        if place is not None and place.size > 1 and isinstance(part, LayerPart):
            self.stage = GroupStage(index, part, place=place, split=self.al.group_schedule != "1f1b", **common)
        else:
            self.stage = LocalStage(self.layers, **common)
        allowed = self.al.unused_parameters if watch else "allow"
        self.unused = UnusedWeights(
            self.layers,
            optimizer=self.optimizer,
            stage_id=self.stage_id,
            allowed=allowed,
        )
        self._held: Held | None = None
        if self.optimizer is not None and self.module.new_parts_first:
            self._held = Held((layer for _, layer in self.layers), samples=self.module.new_parts_first)
        self.decoder_copies: DecoderCopies | None = None
        if self.module.objective.needs_earlier_decoders:
            self.decoder_copies = DecoderCopies(
                self.layers,
                decoders=self.preparation.on_device(
                    self.module.build_decoders(self.layers[0][0] + sum(layer.ends for _, layer in self.layers))
                ),
                channels=self.links.decoders,
            )
        self._report = Report(
            stages=self.num_stages,
            layers=self.module.num_layers,
            stage=self.stage_id,
            first_layer=self.layers[0][0],
            device=self.device,
        )
        self.report = self._report.losses
        """Latest known ``(A_i, E_i)`` of every layer up to this stage, means over a batch; NaN where unknown."""
        common = {
            "load": self._load,
            "links": self.links,
            "compression": self.compression,
            "report": self._report,
            "target_tensors": self.preparation.objective.target_tensors,
            "scale": self._scale,
            "counters": self.counters,
        }
        self.run: LocalRun | GroupRun
        self.together: Together | None = None
        if isinstance(self.stage, GroupStage):
            self.run = GroupRun(self.stage, **common)
            if self.al.group_step == "together" and self.optimizer is not None:
                self.optimizer.together = self.together = Together(self.links, device=self.device)
        else:
            self.run = LocalRun(self.stage, **common)
        self._handlers.update(self.run.handlers)

    @torch.no_grad()
    def _broadcast_model(self) -> None:
        """Gives all replicas of the stage the weights of the first one; called by DeepSpeed's constructor. Its own
        method fails on weights whose channels lie last, and on those without dimensions."""
        if self.replicas.count > 1:
            for parameter in self.module.parameters():
                value = parameter.detach().contiguous()
                self.replicas.broadcast(value, source=0)
                parameter.copy_(value)

    # ---- optimizers, which DeepSpeed's constructor makes --------------------------------------------

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
        """Called by DeepSpeed's constructor, when only settings, topology, module and selection are there."""
        self.basic_optimizer = self.optimizer = build.local_optimizer(
            self.module.local_layers,
            settings=self.settings,
            replicas=self.replicas,
            given=client_optimizer,
            by_config=self._factory,
            selection=self._selection,
        )

    def _configure_lr_scheduler(self) -> None:
        """Makes the LR schedule as DeepSpeed does; what it or torch raises becomes an error that names the schedule."""
        with schedules.made(self._config, given=self.client_lr_scheduler, instance=self.client_optimizer):
            super()._configure_lr_scheduler()
        schedules.check_made(self.lr_scheduler)

    def get_lr(self) -> list[float]:
        """Returns the learning rates of this stage's parameter groups; ``[0.0]`` if it trains nothing."""
        return super().get_lr() or [0.0]

    def _factory(self, block: OptimizerConfig | None) -> Factory:
        """Makes optimizers by a block of the config, as DeepSpeed makes that of ``"optimizer"``."""
        if block is None:
            return self._configure_basic_optimizer

        def make(groups: ParamGroups) -> torch.optim.Optimizer:
            given, self.client_optimizer = self.client_optimizer, None  # it would name the optimizer
            try:
                with host.optimizer_block(self._config, type=block.type, params=block.params):
                    return self._configure_basic_optimizer(groups)
            finally:
                self.client_optimizer = given

        return make

    def _is_supported_optimizer(self, optimizer_name: str) -> bool:
        return names.is_ours(optimizer_name) or super()._is_supported_optimizer(optimizer_name)

    def _configure_basic_optimizer(self, model_parameters: Any) -> torch.optim.Optimizer:
        return names.from_config(
            self._config,
            model_parameters,
            module=self.module,
            device=self.device,
            by_deepspeed=super()._configure_basic_optimizer,
        )

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
            _check_iterator(data_iter)
            self.set_dataiterator(data_iter)
        if not self.module.training:
            self.module.train()
        if self._held is not None:
            self._held.before_batch(self.global_samples)
        return self._train_batch() if self._recovery is None else self._recovery.train_batch(self._train_batch)

    def _train_batch(self) -> Tensor:
        if self.tracing is not None:
            self.tracing.before_batch(micro_batches=self.micro_batches)
        if self.rebalance is not None:
            self.rebalance.before_batch()
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
        self._report.set_metrics(self._meter.stop(self._totals(), micro_batches=trained, skipped=skipped))
        if self.tracing is not None:
            self.tracing.after_batch()
        if self.rebalance is not None:
            self._move_if_better(self.rebalance)
        if self.stops is not None:
            self.stops.after_batch()
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
        self._report.remember(losses)
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

    @property
    def _step_after(self) -> Literal["batch", "micro_batch", "config"]:
        if self.al.steps_per_batch is not None:
            return "config"
        return "micro_batch" if self.steps_per_batch == self.micro_batches else "batch"

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

    # ---- what a stage reports ----------------------------------------------------------------------

    def reset_stats(self) -> None:
        """Resets :meth:`stats`."""
        self.counters.reset()

    def stats(self) -> StageStats:
        """Returns this stage's times and bytes since the last :meth:`reset_stats`."""
        return self.counters.stats()

    def stage_metrics(self) -> dict[int, StageMetrics]:
        """Returns the latest known metrics of this stage and those before it; waits for the device, not for a stage."""
        return dict(enumerate(self._report.stage_metrics()[: self.stage_id + 1]))

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
        history = self._report.history
        self.forget_losses()
        losses = torch.stack(history).cpu() if history else torch.zeros(0, len(self.layers), 2)
        return torch.cat(self.gather(self.replicas.mean(losses.to(self.device)).cpu()), dim=1)

    def _totals(self) -> dict[str, float]:
        totals = {**self.runner.progress.seconds, "samples": self.counters.samples}
        if self.sender is not None and self.device.type == "cpu":  # on a GPU the host does not wait for a slot
            totals |= {"messages": self.sender.messages, "found_full": self.sender.found_full}
        return totals

    def _observe(self, instruction: PipeInstruction, seconds: float) -> Observation | None:
        """What to record of an instruction that has just been executed; ``None`` where it had nothing to do."""
        match instruction:
            case Barrier() | ReduceGrads():
                return Observation(wait=seconds)
            case OptimizerStep() if self.together is not None:
                return Observation(wait=self.together.take_waited())
            case LoadMicroBatch():
                return Observation(wait=self.counters.waited_for_data)
            case RecvActivation():
                channel: Any = self.receiver
            case SendActivation():
                channel = self.sender
            case RecvGrad():
                channel = self.links.gradients.receiver
            case SendGrad():
                channel = self.links.gradients.sender
            case RefreshDecoders() | SendDecoders():
                assert self.decoder_copies is not None
                if not self.decoder_copies.due(self.stage.next_micro_batch):
                    return None
                sends = isinstance(instruction, SendDecoders)
                channel = self.decoder_copies.sender if sends else self.decoder_copies.receiver
            case _:
                channel = None
        return Observation(*channel.latest) if channel is not None else Observation()

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

    def set_batch_fn(self, fn: Callable[[Any], Any]) -> None:
        """Applies a function to every batch of training and evaluation, on the first stage."""
        super().set_batch_fn(fn)
        self.inference.batch_fn = fn

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

    def _compile(self, config: CompileConfig) -> None:
        if self.module.runs is not None:
            raise ALConfigError("engine.compile() with more stages than AL layers: it would depend on the stages' cuts")
        if self._is_compiled:
            raise ALConfigError(
                f'the layers are compiled already, by "{BLOCK}.compile" or engine.compile(): do it once'
            )
        compile_layers(self.module.local_layers, config, dynamic_shape=self.dynamic_shape)
        self._is_compiled, self._compiled = True, config

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
            report=self._report,
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
            former, count = self._report, self.stage.trained_micro_batches
            moved = moves.move(self.state(), found)
            self._make_optimizer_again()
            arrived = [(index, layer) for index, layer in self.module.local_layers if index in moved.arrived]
            self._prepare(arrived)
            if self._compiled is not None:
                compile_layers(arrived, self._compiled, dynamic_shape=self.dynamic_shape)
            self.param_names = {weight: name for name, weight in self.module.named_parameters()}
            self._take_layers(watch=count == 0)
            self.stage.trained_micro_batches = count
            self._report.continue_from(former, layers=found[self.stage_id + 1])
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

    def _make_optimizer_again(self) -> None:
        """Makes optimizer and LR schedule for the layers that this stage holds now; the optimizer stays the object that
        it was."""
        former, precision = self.optimizer, self.settings.precision
        if former is None:
            return
        host.set_precision(self._config, dtype=torch.float32, zero_stage=0)  # as in DeepSpeed's constructor
        try:
            self._configure_optimizer(self.client_optimizer, None)
        finally:
            host.set_precision(self._config, dtype=precision.dtype, zero_stage=self.settings.zero_stage)
        former.become(required(self.optimizer))
        self.basic_optimizer = self.optimizer = former
        self._configure_lr_scheduler()

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
        return self._report.flat

    def forget_losses(self) -> None:
        """Forgets the losses that :meth:`gather_losses` has returned."""
        self._report.history = []

    def _refuse_with_recovery(self, call: str) -> None:
        if self._recovery is not None:
            raise ALConfigError(f'{call} with "{BLOCK}.recovery": a new process could not repeat it. Leave it out')

    # ---- more of what users of a PipelineEngine call -------------------------------------------------

    def reset_activation_shape(self) -> None:
        """Accepts new shapes of micro-batches; must be called on every rank, between batches."""
        self._refuse_with_recovery("reset_activation_shape()")
        self.links.reset()
        self.stage.reset_shapes()
        self.preparation.reset_shape()

    @joint_call
    def eval_batch(
        self,
        data_iter: Iterator[Any] | None,
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Any:
        """Evaluates the next micro-batches of ``data_iter``, of any size, without training; every rank must call it.

        Args:
            data_iter: yields ``(x, labels)``; read on the first stage.
            return_logits: also return the scores ``(samples, V)`` of all micro-batches, on every rank.
            reduce_output: ``"avg"``, or ``None`` for the losses of the single micro-batches.
            bcast_loss: has no effect: every rank gets the loss.
            num_micro_batches: by default as many as in training. Further arguments as in DeepSpeed.

        Returns:
            The loss of the last exit's scores against the labels (``D_E`` of the first layer), or ``None`` without
            ``compute_loss``; with ``return_logits`` ``(loss, scores)``.
        """
        if data_iter is not None:
            _check_iterator(data_iter)
        return self.inference.eval_batch(
            data_iter,
            micro_batches=self.micro_batches if num_micro_batches is None else num_micro_batches,
            return_logits=return_logits,
            compute_loss=compute_loss,
            reduce_output=reduce_output,
        )

    @joint_call
    def evaluate(self, batches: Iterable[Any] | None) -> dict[str, Any]:
        """Returns accuracy and loss at every exit over a data set; every rank must call it.

        Args:
            batches: a sized iterable of ``(x, labels)``, such as a ``DataLoader``; batches of any size. Read on the
                first stage; may be ``None`` elsewhere.

        Returns:
            ``{"accuracy": [a_1, ..., a_N], "loss": [l_1, ..., l_N], "samples": n}`` on every rank; exit N is
            the full inference path.
        """
        return self.inference.evaluate(batches)

    @joint_call
    def predict(self, x: Activation | None, exit: int | None = None, average: int = 1) -> Tensor:
        """Returns label scores ``(B, V)`` after ``exit`` layers (1-based, by default all); every rank must call it.

        Args:
            x: input of the first layer; read on the first stage; may be ``None`` elsewhere.
            average: number of exits to average, ``exit`` and those before it; 2 or more return the log of their mean
                probability.

        Returns:
            The scores, on every rank.
        """
        return self.inference.predict(x, exit=exit, average=average)


for _call, _instead in host.INSTEAD.items():
    setattr(ALPipelineEngine, _call, host.refused(_call, _instead))


def _check_iterator(data: Any) -> None:
    """Refuses what is no iterator, on every rank that got it: only the first stage would read it."""
    if not hasattr(data, "__next__"):
        raise ALDataError(
            f"got a {type(data).__name__}: expected an iterator over micro-batches, which the next call continues. "
            "Make one before the loop: iter(loader), or iter(deepspeed.utils.RepeatingLoader(loader)) for many epochs"
        )
