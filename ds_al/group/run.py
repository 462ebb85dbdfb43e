"""Executes the instructions of a schedule inside a group (:mod:`ds_al.group_schedule`) on one stage.

    [1] LoadMicroBatch / RecvActivation   load or receive (s, t), inside a group with the state of the generators
    [2] ForwardPass                       run this stage's blocks
    [3] SendActivation                    send (s, t) without a graph
    [4] RecvGrad                          receive the gradient of s from the next stage of the group
    [5] BackwardPass                      gradients of the input and of the weights;
        BackwardInput, BackwardWeight     or first those of the input, and those of the weights later
    [6] SendGrad                          send the gradient of the input to the previous stage of the group

A micro-batch has a buffer from [1] to the last of its gradients, and keeps its slots in both receivers until then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    LoadMicroBatch,
    PipeInstruction,
    RecvActivation,
    RecvGrad,
    SendActivation,
    SendGrad,
)

from ds_al.group.stage import GroupStage, MicroBatch, context_of
from ds_al.group_schedule import BackwardInput, BackwardWeight
from ds_al.tensors import Activation, Target, first
from ds_al.trace import StageCounters
from ds_al.trace.metrics import Report
from ds_al.transport.compression import Compression
from ds_al.transport.message import pack, unpack
from ds_al.transport.neighbours import Links


class GroupRun:
    """What one stage of a group executes.

    Args:
        stage: the computation.
        load: loads ``(s, t)`` of the next micro-batch, on the first stage of the pipeline.
        links: channels to both neighbours.
        compression: of messages between groups; those inside a group are exact.
        report: losses and metrics, part of every message.
        target_tensors: number of tensors of a target.
        scale: returns the factor of the losses.
        counters: counts the samples.
    """

    def __init__(
        self,
        stage: GroupStage,
        *,
        load: Callable[[], tuple[Activation, Target]],
        links: Links,
        compression: Compression,
        report: Report,
        target_tensors: int,
        scale: Callable[[], float],
        counters: StageCounters,
    ) -> None:
        self.stage = stage
        self._load, self._scale = load, scale
        self._sender, self._receiver = links.training
        self._gradient_sender, self._gradient_receiver = links.gradients
        self._compression, self._report, self._target_tensors = compression, report, target_tensors
        self._counters = counters
        self._buffers: dict[int, MicroBatch] = {}
        self.handlers: Mapping[type[PipeInstruction], Callable[..., None]] = {
            LoadMicroBatch: self._exec_load_micro_batch,
            RecvActivation: self._exec_recv_activation,
            ForwardPass: self._exec_forward_pass,
            SendActivation: self._exec_send_activation,
            RecvGrad: self._exec_recv_grad,
            BackwardPass: self._exec_backward_pass,
            BackwardInput: self._exec_backward_input,
            BackwardWeight: self._exec_backward_weight,
            SendGrad: self._exec_send_grad,
        }

    def expect(self, micro_batches: int) -> None:
        """Announces the micro-batches of a batch and their gradients, so that they are received ahead."""
        for receiver in (self._receiver, self._gradient_receiver):
            if receiver is not None:
                receiver.expect(micro_batches)

    def _exec_load_micro_batch(self, buffer_id: int) -> None:
        """[1] Loads a micro-batch, on the first stage of the pipeline."""
        self._buffers[buffer_id] = MicroBatch(*self._load())

    def _exec_recv_activation(self, buffer_id: int) -> None:
        """[1] Receives a micro-batch from the previous stage."""
        assert self._receiver is not None
        message, context = self._receiver.receive(), None
        if self.stage.place.is_first:
            message = self._compression.decode(message)
        else:
            context, *rest = message
            message = tuple(rest)
        s, t, report = unpack(message, target_tensors=self._target_tensors)
        self._report.take_over(report)
        self._buffers[buffer_id] = MicroBatch(s, t, context)

    def _exec_forward_pass(self, buffer_id: int) -> None:
        """[2] Runs this stage's blocks."""
        batch = self._buffers[buffer_id]
        self._counters.samples += first(batch.s).shape[0]
        self.stage.run_forward(batch)

    def _exec_send_activation(self, buffer_id: int) -> None:
        """[3] Sends what the next stage needs; waits only for a free slot."""
        assert self._sender is not None
        batch = self._buffers[buffer_id]
        message = pack(*self.stage.message(batch), self._report.flat)
        if self.stage.place.is_last:
            self._sender.send(self._compression.encode(message))
        else:
            self._sender.send((context_of(batch.s_out, self._report.flat.device), *message))

    def _exec_recv_grad(self, buffer_id: int) -> None:
        """[4] Receives the gradients of what this stage has sent."""
        assert self._gradient_receiver is not None
        self._buffers[buffer_id].gradients = self._gradient_receiver.receive()

    def _exec_backward_pass(self, buffer_id: int) -> None:
        """[5] Computes all gradients of a micro-batch."""
        self._exec_backward_input(buffer_id)
        self._exec_backward_weight(buffer_id)

    def _exec_backward_input(self, buffer_id: int) -> None:
        """[5] Computes the gradients of the input, and those of weights that cannot be put off."""
        self.stage.run_backward(self._buffers[buffer_id], scale=self._scale())

    def _exec_backward_weight(self, buffer_id: int) -> None:
        """[5] Computes the gradients of weights that were put off, and frees the slots of the micro-batch."""
        self.stage.run_weights(self._buffers[buffer_id])
        for receiver in (self._receiver, self._gradient_receiver):
            if receiver is not None:
                receiver.release()

    def _exec_send_grad(self, buffer_id: int) -> None:
        """[6] Sends the gradients of the input; waits only for a free slot."""
        assert self._gradient_sender is not None
        batch = self._buffers[buffer_id]
        self._gradient_sender.send(batch.gradients or (torch.zeros(1, device=self._report.flat.device),))
        batch.gradients = ()
