"""``bp_dualpipev``: DeepSpeed's own DualPipeV, with the recording of the other twins.

Stage r holds the parts r and 2P - 1 - r of the network, so that data, labels and losses are all on stage 0. Sends and
receives are queued, and complete in ``CommitP2P``: that is where a stage waits. This module needs DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from deepspeed import comm as dist
from deepspeed.runtime.pipe import p2p
from deepspeed.runtime.pipe.dualpipev import DualPipeVEngine, DualPipeVModule
from deepspeed.runtime.pipe.schedule import (
    CommitP2P,
    PipeInstruction,
    PipeSchedule,
    RecvActivation,
    RecvGrad,
    SendActivation,
    SendGrad,
)
from torch import Tensor

from ds_al.baseline.engine import BackpropPipelineEngine
from ds_al.baseline.twin import TwinModule
from ds_al.tensors import Activation
from ds_al.trace import Observation, joint_call

_QUEUED = (SendActivation, RecvActivation, SendGrad, RecvGrad)


class DualPipeVTwin(DualPipeVModule, TwinModule):
    """DeepSpeed's module, whose two parts count micro-batches apart: dropout is that of a module with one part.

    It has the ``partition_method`` ``"cuts:"`` of :class:`~ds_al.baseline.twin.TwinModule`, with 2P parts.
    """

    micro_offset: int
    _counts: list[int]

    def activate_phase(self, phase: int) -> None:
        """Exposes the layers of a part, and its number of micro-batches, from which layers are seeded."""
        if hasattr(self, "active_phase"):
            self._counts[self.active_phase] = self.micro_offset
        else:
            self._counts = [0, 0]
        super().activate_phase(phase)
        self.micro_offset = self._counts[phase]


class DualPipeVTwinEngine(BackpropPipelineEngine, DualPipeVEngine):
    """Trains a ``DualPipeVModule``."""

    def _exec_schedule(self, pipe_schedule: PipeSchedule) -> None:
        self._latest_bytes = 0
        super()._exec_schedule(pipe_schedule)

    def _queue_p2p(self, op: Any, tensors: Any, stage: int) -> None:
        if op is dist.isend:
            self._latest_bytes += sum(tensor.nbytes for tensor in tensors)
        super()._queue_p2p(op, tensors, stage)

    def _exec_send_activations(self, buffer_id: int, phase: int) -> None:  # type: ignore[override]
        before = self._latest_bytes
        DualPipeVEngine._exec_send_activations(self, buffer_id, phase)
        self._sent("activations", self._latest_bytes - before)

    def _exec_send_grads(self, buffer_id: int, phase: int) -> None:  # type: ignore[override]
        before = self._latest_bytes
        DualPipeVEngine._exec_send_grads(self, buffer_id, phase)
        self._sent("gradients", self._latest_bytes - before)

    def _sent(self, what: str, nbytes: int) -> None:
        self.sent[what] += nbytes
        self._messages_sent += 1

    def _observe(self, instruction: PipeInstruction, seconds: float) -> Observation | None:
        """Counts the time of ``CommitP2P`` as waiting; what is queued for it takes none, and is not recorded."""
        if isinstance(instruction, _QUEUED):
            return None
        if isinstance(instruction, CommitP2P):
            nbytes, self._latest_bytes = self._latest_bytes, 0
            return Observation(wait=seconds, nbytes=nbytes)
        return super()._observe(instruction, seconds)

    @joint_call
    def evaluate(self, batches: Iterable[Any]) -> dict[str, Any]:
        """Computes accuracy and loss over a data set, a batch at a time: the schedule would need 2P of one shape.

        Every rank must call it with the same batches, of any size.

        Returns:
            As :meth:`ds_al.baseline.engine.BackpropPipelineEngine.evaluate`.
        """
        self.module.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for x, labels in batches:
            logits = self._through(x)
            if self.stage_id == 0:
                labels = labels.to(self.device)
                loss = self.module.loss_fn(logits, labels).double() * len(labels)
                sums += torch.stack(
                    [(logits.argmax(dim=1) == labels).sum().double(), loss, sums.new_tensor(len(labels))]
                )
        dist.broadcast(sums, self.topology.pipeline[0], group=self.topology.pipeline_group)
        return self._evaluation(sums)

    @torch.no_grad()
    def _through(self, x: Any) -> Any:
        """Sends a batch through all parts; returns the output of the last one, on stage 0."""
        parts = 2 * self.num_stages
        stages = [min(part, parts - 1 - part) for part in range(parts)]
        value = None
        for part in (part for part in range(parts) if stages[part] == self.stage_id):
            if part == 0:
                value = _on_device(x, self.device)
            elif stages[part - 1] != self.stage_id:
                value = self._receive(stages[part - 1])
            self.module.activate_phase(part // self.num_stages)
            value = self.module(value)
            if part + 1 < parts and stages[part + 1] != self.stage_id:
                self._send(value, stages[part + 1])
        return value

    def _send(self, value: Activation, stage: int) -> None:
        self._send_tensor_meta(value, stage)
        for part in value if isinstance(value, tuple) else (value,):
            p2p.send(part.contiguous(), stage)

    def _receive(self, stage: int) -> Activation:
        self._grad_layer_buf: list[Tensor] = []
        value: Activation = self._recv_tensor_meta(stage)
        for part in value if isinstance(value, tuple) else (value,):
            p2p.recv(part, stage)
        return value

    _INSTRUCTION_MAP: ClassVar[dict[Any, Callable[..., None]]] = {
        **DualPipeVEngine._INSTRUCTION_MAP,
        SendActivation: _exec_send_activations,
        SendGrad: _exec_send_grads,
    }


def _on_device(x: Any, device: torch.device) -> Any:
    return x.to(device) if isinstance(x, Tensor) else tuple(part.to(device) for part in x)
