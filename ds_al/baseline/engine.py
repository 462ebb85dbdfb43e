"""Engine of the backprop twin: DeepSpeed's own, with two more schedules, and the tracing of the AL engine."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any, ClassVar

import torch
from deepspeed import comm as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe import p2p
from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    LoadMicroBatch,
    PipeInstruction,
    PipeSchedule,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    SendActivation,
    SendGrad,
    TrainSchedule,
)

from ds_al.baseline.schedules import BACKPROP_SCHEDULES
from ds_al.config.settings import Settings
from ds_al.optim.accepted import required
from ds_al.optim.names import NamedOptimizers
from ds_al.parallel.topology import StageTopology
from ds_al.runner import Runner
from ds_al.system.secrets import without_secrets
from ds_al.trace import (
    Calls,
    Observation,
    Recording,
    StageMeter,
    StageMetrics,
    StageStats,
    Tracing,
    Watchdog,
    batch_call,
    joint_call,
)
from ds_al.transport.slow_link import SlowLink, check_one_host, wait_until


class BackpropPipelineEngine(NamedOptimizers):
    """Trains a plain ``PipelineModule`` by back-propagation, with DeepSpeed's own instructions.

    Private names of DeepSpeed that it overrides or uses (runtime/pipe/engine.py, 0.19.0 and 0.19.8): ``_config``,
    ``_exec_schedule``, ``_exec_*``, ``_INSTRUCTION_MAP``, ``_reserve_pipe_buffers``, ``_aggregate_total_loss``.

    Args:
        settings: ``al.method`` is ``"bp_1f1b"`` (DeepSpeed's ``TrainSchedule``), ``"bp_gpipe"``,
            ``"bp_naive"``, or ``"bp_dp"`` (:mod:`ds_al.baseline.data_parallel`); the engines of all others derive from
            this one (:mod:`ds_al.baseline.build`).
    """

    config: Any
    SENDS_AHEAD: ClassVar[bool] = False
    """Whether a stage goes on before its neighbour has received a message."""

    def __init__(self, *, model: PipelineModule, settings: Settings, **options: Any) -> None:
        self.settings, self.al = settings, settings.al
        self.method = self.al.method
        self.calls = Calls()
        self._wall = 0.0
        self._samples = self._messages_sent = self._latest_bytes = 0
        self.sent: Counter[str] = Counter()
        """Bytes of ``"activations"`` and of ``"gradients"`` that this stage has sent since the last reset."""
        self._down, self._up = (SlowLink(self.al.link) if self.al.link else None for _ in range(2))
        self._losses: dict[int, torch.Tensor] = {}
        self._meter = StageMeter()
        self._metrics: dict[int, StageMetrics] = {}
        super().__init__(model=model, **options)
        self.config = without_secrets(self.config)  # DeepSpeed writes it into checkpoints
        self.topology = StageTopology.of(self.module)
        if self.al.link is not None:
            check_one_host(self.topology)
        self.recording = Recording()
        handlers = {kind: MethodType(handler, self) for kind, handler in self._INSTRUCTION_MAP.items()}
        self.runner = Runner(handlers, observe=self._observe, recording=self.recording)
        self.tracing = Tracing.of(
            self.al,
            topology=self.topology,
            device=self.device,
            recording=self.recording,
            parameters=self.module.parameters,
        )
        self.watchdog = Watchdog.start(
            self.runner.progress,
            calls=self.calls,
            topology=self.topology,
            seconds=self.al.stall_seconds,
            on_stall=self.al.on_stall,
            sends_ahead=self.SENDS_AHEAD,
        )

    @batch_call
    def train_batch(self, data_iter: Any = None) -> torch.Tensor:
        """Calls DeepSpeed's ``train_batch``, timed for :meth:`stats`, and traced if the config enables it."""
        required(self.optimizer)
        if self.tracing is not None:
            self.tracing.before_batch(micro_batches=self.micro_batches)
        start = time.perf_counter()
        self._meter.start(self._totals())
        self._start_batch()
        loss = super().train_batch(data_iter)
        self._wall += time.perf_counter() - start
        self._samples += self.train_batch_size()
        batches = self.global_steps
        self._metrics[self.stage_id] = self._meter.stop(self._totals(), micro_batches=batches * self.micro_batches)
        if self.tracing is not None:
            self.tracing.after_batch()
        return loss

    def _start_batch(self) -> None:
        """Called before each batch."""

    def _aggregate_total_loss(self) -> torch.Tensor:
        """Times the broadcast of each batch's loss from DeepSpeed's last stage to all others."""
        with self.runner.timed("LossBroadcast", waiting=True):
            return super()._aggregate_total_loss()

    def _totals(self) -> dict[str, float]:
        return {**self.runner.progress.seconds, "samples": self._samples}

    def stage_metrics(self) -> dict[int, StageMetrics]:
        """Returns this stage's metrics by its index; messages of the twin contain no metrics of other stages."""
        return self._metrics

    def destroy(self) -> None:
        """Stops the watchdog, and frees DeepSpeed's resources."""
        if self.watchdog is not None:
            self.watchdog.stop()
        super().destroy()

    @joint_call
    def eval_batch(self, *args: Any, **options: Any) -> Any:
        """Calls DeepSpeed's ``eval_batch``."""
        return super().eval_batch(*args, **options)

    @joint_call
    def save_checkpoint(self, *args: Any, **options: Any) -> bool:
        """Calls DeepSpeed's ``save_checkpoint``."""
        return super().save_checkpoint(*args, **options)

    @joint_call
    def load_checkpoint(self, *args: Any, **options: Any) -> Any:
        """Calls DeepSpeed's ``load_checkpoint``."""
        return super().load_checkpoint(*args, **options)

    def _exec_schedule(self, pipe_schedule: PipeSchedule) -> None:
        """Runs a schedule; replaces the 1F1B schedule that DeepSpeed's ``train_batch`` builds by the method's own."""
        if type(pipe_schedule) is TrainSchedule and self.method in BACKPROP_SCHEDULES:
            pipe_schedule = BACKPROP_SCHEDULES[self.method](self.micro_batches, self.num_stages, self.stage_id)
        self._reserve_pipe_buffers(pipe_schedule.num_pipe_buffers())
        self.fwd_outputs: list[Any] = []
        self.runner.run(pipe_schedule)

    @joint_call
    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all stages, in order; drains the pipeline. Every rank must call it."""
        return self.topology.gather(value)

    def _exec_forward_pass(self, buffer_id: int) -> None:
        super()._exec_forward_pass(buffer_id)
        if self.is_last_stage() and torch.is_grad_enabled():
            self._losses[buffer_id] = self.loss

    def _exec_backward_pass(self, buffer_id: int) -> None:
        """Restores the micro-batch's loss: DeepSpeed's last stage keeps only the latest one, ``bp_gpipe`` needs all."""
        if self.is_last_stage():
            self.loss = self._losses.pop(buffer_id)
        super()._exec_backward_pass(buffer_id)
        self.loss = None  # type: ignore[assignment]  # frees the last graph

    def _exec_send_activations(self, buffer_id: int) -> None:
        self._count("activations", self.pipe_buffers["outputs"][buffer_id])
        arrival = self._arrival(self._down)
        super()._exec_send_activations(buffer_id)
        if arrival is not None:
            p2p.send(arrival, self.next_stage)

    def _exec_recv_activations(self, buffer_id: int) -> None:
        super()._exec_recv_activations(buffer_id)
        self._latest_bytes = _nbytes(self.pipe_buffers["inputs"][buffer_id])
        self._wait_for_link(self.prev_stage)

    def _exec_send_grads(self, buffer_id: int) -> None:
        inputs = self.pipe_buffers["inputs"][buffer_id]
        parts = inputs if isinstance(inputs, tuple) else (inputs,)
        self._count("gradients", tuple(x.grad for x in parts if x.grad is not None))
        arrival = self._arrival(self._up)
        super()._exec_send_grads(buffer_id)
        if arrival is not None:
            p2p.send(arrival, self.prev_stage)

    def _exec_recv_grads(self, buffer_id: int) -> None:
        super()._exec_recv_grads(buffer_id)
        self._latest_bytes = _nbytes(self.grad_layer)
        self._wait_for_link(self.next_stage)

    def _count(self, what: str, message: Any) -> None:
        self._latest_bytes = _nbytes(message)
        self.sent[what] += self._latest_bytes
        self._messages_sent += 1

    def _arrival(self, link: SlowLink | None) -> torch.Tensor | None:
        """Returns the arrival time of a message sent now, with a slow link in training; else ``None``."""
        return link.arrival(self._latest_bytes).to(self.device) if link and torch.is_grad_enabled() else None

    def _wait_for_link(self, stage: int) -> None:
        """Waits for the arrival time of the message just received from a stage, with a slow link in training."""
        if self._down is not None and torch.is_grad_enabled():
            arrival = torch.empty(1, dtype=torch.float64, device=self.device)
            p2p.recv(arrival, stage)
            wait_until(arrival)

    def _observe(self, instruction: PipeInstruction, seconds: float) -> Observation | None:
        """Counts all time of transfers as waiting: DeepSpeed's block until they are complete."""
        if isinstance(instruction, (SendActivation, SendGrad, RecvActivation, RecvGrad)):
            return Observation(wait=seconds, nbytes=self._latest_bytes)
        if isinstance(instruction, (LoadMicroBatch, ReduceGrads)):
            return Observation(wait=seconds)
        return Observation()

    _INSTRUCTION_MAP: ClassVar[dict[Any, Callable[..., None]]] = {
        **NamedOptimizers._INSTRUCTION_MAP,
        ForwardPass: _exec_forward_pass,
        BackwardPass: _exec_backward_pass,
        SendActivation: _exec_send_activations,
        RecvActivation: _exec_recv_activations,
        SendGrad: _exec_send_grads,
        RecvGrad: _exec_recv_grads,
    }

    @joint_call
    def evaluate(self, batches: Iterable[Any]) -> dict[str, Any]:
        """Computes accuracy and loss over a data set. Every rank must call it with the same batches, of any size.

        Returns:
            ``{"accuracy": [a], "loss": [l], "samples": n}`` on every rank: the twin has one exit.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for x, labels in batches:
            self.reset_activation_shape()  # otherwise DeepSpeed would reuse buffers of the last shape
            loss, logits = self.eval_batch(iter([(x, labels)]), return_logits=True, num_micro_batches=1)
            if self.is_last_stage():
                correct = (logits.argmax(dim=1) == labels.to(self.device)).sum()
                sums += torch.stack([correct.double(), loss.double().sum() * len(labels), sums.new_tensor(len(labels))])
        self.reset_activation_shape()
        dist.broadcast(sums, self.topology.pipeline[-1], group=self.topology.pipeline_group)
        return self._evaluation(sums)

    def _evaluation(self, sums: torch.Tensor) -> dict[str, Any]:
        correct, loss, samples = sums.tolist()
        return {"accuracy": [correct / samples], "loss": [loss / samples], "samples": int(samples)}

    def reset_stats(self) -> None:
        """Resets :meth:`stats`."""
        self._wall, self._samples = 0.0, 0
        self._messages_sent = 0
        self.sent.clear()
        self.runner.progress.seconds.clear()

    def stats(self) -> StageStats:
        """Returns this stage's statistics since the last :meth:`reset_stats`; sent are activations and gradients."""
        seconds = self.runner.progress.seconds
        return StageStats(
            stage=self.stage_id,
            wall=self._wall,
            wait_input=seconds["RecvActivation"]
            + seconds["RecvGrad"]
            + seconds["CommitP2P"]
            + seconds["LossBroadcast"],
            wait_queue=seconds["SendActivation"] + seconds["SendGrad"],
            wait_data=seconds["LoadMicroBatch"],
            bytes_sent=self.sent.total(),
            messages_sent=self._messages_sent,
            samples=self._samples,
        )


def _nbytes(message: Any) -> int:
    """Returns the bytes of a tensor, or of all tensors in a tuple or list."""
    return sum(tensor.nbytes for tensor in (message if isinstance(message, (tuple, list)) else (message,)))
