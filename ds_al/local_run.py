"""Executes the instructions of a schedule (:mod:`ds_al.schedule`) on a stage whose layers are whole.

    [1] LoadMicroBatch / RecvActivation   load or receive (s, t)
    [2] ForwardPass                       s_i = f_i(s_{i-1}), t_i = g_i(t_{i-1}) for each local layer
    [3] SendActivation                    send (s, t) of the last local layer, without waiting
    [4] BackwardPass                      A_i and E_i of each local layer, and their gradients

Its counterpart for a stage that holds a part of a layer is :mod:`ds_al.group.run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    LoadMicroBatch,
    PipeInstruction,
    RecvActivation,
    SendActivation,
)

from ds_al.stage import LocalStage
from ds_al.tensors import Activation, Target, first
from ds_al.trace import StageCounters
from ds_al.trace.metrics import Report
from ds_al.transport.compression import Compression
from ds_al.transport.message import pack, unpack
from ds_al.transport.neighbours import Links


class LocalRun:
    """What one stage executes.

    Args:
        stage: the computation.
        load: loads ``(s, t)`` of the next micro-batch, on the first stage of the pipeline.
        links: channels to both neighbours.
        compression: of messages.
        report: losses and metrics, part of every message.
        target_tensors: number of tensors of a target.
        scale: returns the factor of the losses.
        counters: counts the samples.
    """

    s: Activation
    t: Target

    def __init__(
        self,
        stage: LocalStage,
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
        self._compression, self._report, self._target_tensors = compression, report, target_tensors
        self._counters = counters
        self.handlers: Mapping[type[PipeInstruction], Callable[..., None]] = {
            LoadMicroBatch: self._exec_load_micro_batch,
            RecvActivation: self._exec_recv_activation,
            ForwardPass: self._exec_forward_pass,
            SendActivation: self._exec_send_activation,
            BackwardPass: self._exec_backward_pass,
        }

    def expect(self, micro_batches: int) -> None:
        """Announces the micro-batches of a batch, so that they are received ahead."""
        if self._receiver is not None:
            self._receiver.expect(micro_batches)

    def _exec_load_micro_batch(self, buffer_id: int) -> None:
        """[1] Loads a micro-batch, on the first stage of the pipeline."""
        self.s, self.t = self._load()

    def _exec_recv_activation(self, buffer_id: int) -> None:
        """[1] Receives ``(s, t, report)`` from the previous stage; it may have arrived long before."""
        assert self._receiver is not None
        message = self._compression.decode(self._receiver.receive())
        self.s, self.t, report = unpack(message, target_tensors=self._target_tensors)
        self._report.take_over(report)

    def _exec_forward_pass(self, buffer_id: int) -> None:
        """[2] Runs f and g of the local layers, and keeps the graphs for their backward."""
        self._counters.samples += first(self.s).shape[0]
        self.s, self.t = self.stage.forward(self.s, self.t)

    def _exec_send_activation(self, buffer_id: int) -> None:
        """[3] Sends ``(s, t, report)`` of the last local layer, without a graph; waits only for a free slot."""
        assert self._sender is not None
        self._sender.send(self._compression.encode(pack(self.s, self.t, self._report.flat)))

    def _exec_backward_pass(self, buffer_id: int) -> None:
        """[4] Computes the local losses and their gradients, and frees the slot of the input."""
        self.stage.backward(scale=self._scale())
        if self._receiver is not None:
            self._receiver.release()
