"""``bp_zb_h1`` and ``bp_zb_h2``: back-propagation with less of a bubble, or none, and the gradients of ``bp_1f1b``.

DeepSpeed's engine executes the schedules of :mod:`ds_al.group_schedule` for one group of all stages. In training its
messages go through the channels of AL stages (:mod:`ds_al.transport`), which block nobody: DeepSpeed's own calls return
once the neighbour receives, and with these schedules neighbours would wait for each other. The loss of a micro-batch
returns with its gradients, so that no stage waits for a broadcast at the end of a batch either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from deepspeed import comm as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    PipeInstruction,
    RecvActivation,
    RecvGrad,
    SendActivation,
    SendGrad,
)
from torch import Tensor

from ds_al.baseline.engine import BackpropPipelineEngine
from ds_al.compute.split import QueuedGradients, SplitBackward
from ds_al.config.settings import Settings
from ds_al.group_schedule import BackwardInput, BackwardWeight, Place
from ds_al.tensors import Activation
from ds_al.trace import Observation, StageStats
from ds_al.trace.stats import StageCounters
from ds_al.transport.neighbours import Links

METHODS = ("bp_zb_h1", "bp_zb_h2")


class ZeroBubbleEngine(BackpropPipelineEngine):
    """Trains a plain ``PipelineModule`` by a zero-bubble schedule. Evaluation and checkpoints are those of its base.

    Args:
        model, settings, options: as for :class:`~ds_al.baseline.engine.BackpropPipelineEngine`.
    """

    SENDS_AHEAD: ClassVar[bool] = True
    total_loss: Tensor | None

    def __init__(self, *, model: PipelineModule, settings: Settings, **options: Any) -> None:
        super().__init__(model=model, settings=settings, **options)
        stage, stages = self.topology.stage, self.topology.stages
        self.links = Links(
            self.topology,
            config=self.al,
            device=self.device,
            dynamic=self.dynamic_shape,
            decoders=False,
            place=Place(stage, stages, stage, stages),
        )
        self._counters = StageCounters(self.stage_id, senders=self.links.senders, receivers=self.links.receivers)
        self._queues: dict[int, QueuedGradients] = {}
        self._reported: dict[int, Tensor] = {}  # losses on the way to the first stage

    def _start_batch(self) -> None:
        for receiver in self.links.receivers:
            receiver.expect(self.micro_batches)

    def _aggregate_total_loss(self) -> Tensor:
        """Returns the mean loss of the batch, which each stage has summed up."""
        self.dp_group_loss = self._scale_loss_by_gas(self.total_loss).float()
        loss = self.dp_group_loss.clone()
        if self.is_data_parallel:
            dist.all_reduce(loss, group=self.topology.replica_group)
            loss /= self.topology.replicas
        return loss

    def reset_activation_shape(self) -> None:
        """Discards the shapes of messages. Every rank must call it, between batches."""
        super().reset_activation_shape()
        self.links.reset()

    def _exec_forward_pass(self, buffer_id: int) -> None:
        if not torch.is_grad_enabled() or self.is_first_stage():
            super()._exec_forward_pass(buffer_id)
            return
        queue = self._queues[buffer_id] = QueuedGradients()
        with SplitBackward(queue):
            super()._exec_forward_pass(buffer_id)

    def _exec_backward_pass(self, buffer_id: int) -> None:
        """Computes all gradients, on the first stage; nobody waits for those of its input."""
        self._exec_backward_input(buffer_id)
        self._exec_backward_weight(buffer_id)

    def _exec_backward_input(self, buffer_id: int) -> None:
        if self.is_last_stage():
            self._reported[buffer_id] = self._losses[buffer_id].detach()
        super()._exec_backward_pass(buffer_id)

    def _exec_backward_weight(self, buffer_id: int) -> None:
        if (queue := self._queues.pop(buffer_id, None)) is not None:
            queue.compute()
        for receiver in self.links.receivers:
            receiver.release()

    def _exec_send_activations(self, buffer_id: int) -> None:
        if not torch.is_grad_enabled():
            super()._exec_send_activations(buffer_id)
            return
        message = _packed(self.pipe_buffers["outputs"][buffer_id])
        self._count("activations", message)
        self.links.training.sender.send(message)  # type: ignore[union-attr]

    def _exec_recv_activations(self, buffer_id: int) -> None:
        if not torch.is_grad_enabled():
            super()._exec_recv_activations(buffer_id)
            return
        message = self.links.training.receiver.receive()  # type: ignore[union-attr]
        leaves = tuple(part.detach().requires_grad_(part.is_floating_point()) for part in message)
        self.pipe_buffers["inputs"][buffer_id] = _unpacked(leaves)

    def _exec_send_grads(self, buffer_id: int) -> None:
        inputs = self.pipe_buffers["inputs"][buffer_id]
        parts = [part for part in (inputs if isinstance(inputs, tuple) else (inputs,)) if part.is_floating_point()]
        gradients = tuple(torch.zeros_like(part) if part.grad is None else part.grad for part in parts)
        self._count("gradients", gradients)
        self.links.gradients.sender.send(  # type: ignore[union-attr]
            (self._reported.pop(buffer_id).float().view(1), *gradients)
        )
        self.pipe_buffers["inputs"][buffer_id] = None

    def _exec_recv_grads(self, buffer_id: int) -> None:
        loss, *gradients = self.links.gradients.receiver.receive()  # type: ignore[union-attr]
        tensor = isinstance(self.pipe_buffers["outputs"][buffer_id], Tensor)
        self.grad_layer = gradients[0] if tensor else gradients
        if not self.is_first_stage():
            self._reported[buffer_id] = loss.clone()
        self.total_loss = loss[0].clone() if self.total_loss is None else self.total_loss + loss[0]

    def _observe(self, instruction: PipeInstruction, seconds: float) -> Observation | None:
        training, gradients = self.links.training, self.links.gradients
        channels: dict[type[PipeInstruction], Any] = {
            SendActivation: training.sender,
            RecvActivation: training.receiver,
            SendGrad: gradients.sender,
            RecvGrad: gradients.receiver,
        }
        channel = channels.get(type(instruction))
        return super()._observe(instruction, seconds) if channel is None else Observation(*channel.latest)

    def reset_stats(self) -> None:
        """Resets :meth:`stats`."""
        super().reset_stats()
        self._counters.reset()

    def stats(self) -> StageStats:
        """Returns this stage's statistics since the last :meth:`reset_stats`; waits are those of the channels."""
        own = self._counters.stats()
        return replace(super().stats(), wait_input=own.wait_input, wait_queue=own.wait_queue)

    _INSTRUCTION_MAP: ClassVar[dict[Any, Callable[..., None]]] = {
        **BackpropPipelineEngine._INSTRUCTION_MAP,
        ForwardPass: _exec_forward_pass,
        BackwardPass: _exec_backward_pass,
        BackwardInput: _exec_backward_input,
        BackwardWeight: _exec_backward_weight,
        SendActivation: _exec_send_activations,
        RecvActivation: _exec_recv_activations,
        SendGrad: _exec_send_grads,
        RecvGrad: _exec_recv_grads,
    }


def _packed(output: Activation) -> tuple[Tensor, ...]:
    """Returns a message of one tensor, or of those of a tuple with an empty one behind them."""
    if isinstance(output, Tensor):
        return (output.detach(),)
    return (*(part.detach() for part in output), output[0].new_empty(0))


def _unpacked(message: tuple[Tensor, ...]) -> Activation:
    """Inverts :func:`_packed`."""
    return message[0] if len(message) == 1 else message[:-1]
