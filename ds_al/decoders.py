"""Frozen copies of earlier layers' decoders, for objectives that decode while they train.

At micro-batch 0, R, 2R, ... every stage takes over the copies that its predecessor has at that very micro-batch,
adds its own decoders as they are before it, and sends all of them on. A layer so decodes with the weights that
``h_1 .. h_{i-1}`` had before the last such micro-batch, wherever it lives: the bits depend on R alone.

The copies travel in messages of their own, on a process group of their own, so that those of activations keep
their shape and their order. Taking over and sending on are instructions before the forward pass, ``RefreshDecoders``
and ``SendDecoders``: a stage that waits for them does not compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from deepspeed import comm as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from ds_al.transport.channel import Receiver, Sender

if TYPE_CHECKING:
    from ds_al.engine import ALPipelineEngine


class DecoderCopies:
    """The copies of one stage. Every rank makes one, where the objective asks for them.

    Args:
        engine: of the stage; its layers' objectives get their copies from here.
    """

    def __init__(self, engine: ALPipelineEngine) -> None:
        self._device = engine.device
        self.refresh_every = engine.module.objective.refresh_every
        self._own = [layer.h for _, layer in engine.layers]
        self._first = engine.layers[0][0]
        # Only those of earlier layers are decoded with here; this stage's own are sent on.
        self._copies = [
            h.to(engine.device, engine.preparation.dtype)
            for h in engine.module.build_decoders(self._first + len(self._own))
        ]
        for index, layer in engine.layers:
            layer.objective.take_earlier(self._copies[:index])
        ranks = [engine.grid.stage_to_global(stage) for stage in range(engine.num_stages)]
        # Every rank makes the group of every copy of the pipeline, as torch asks.
        groups = {tuple(each): dist.new_group(each) for each in engine.grid._topo.get_axis_comm_lists("pipe")}
        group = groups.get(tuple(ranks))
        stage = engine.stage_id
        common: dict[str, Any] = {"device": engine.device, "dynamic": False, "group": group}
        self.sender = None if engine.is_last_stage() else Sender(
            ranks[stage + 1], queue_depth=2, stages=(stage, stage + 1), **common
        )  # fmt: skip
        self.receiver = None if engine.is_first_stage() else Receiver(
            ranks[stage - 1], stages=(stage, stage - 1), **common
        )  # fmt: skip

    def due(self, micro_batch: int) -> bool:
        """Whether copies are refreshed before the forward of this micro-batch, counted from 0."""
        return micro_batch % self.refresh_every == 0

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the predecessor's copies, and adds this stage's own decoders."""
        if self.receiver is not None:
            self.receiver.expect(1)
            (flat,) = self.receiver.receive()
            _load(self._copies[: self._first], flat)
            self.receiver.release()
        for copy, own in zip(self._copies[self._first :], self._own, strict=True):
            for kept, present in zip(copy.parameters(), own.parameters(), strict=True):
                kept.copy_(present)

    @torch.no_grad()
    def send(self) -> None:
        """Sends the copies on, as they are now; not called on the last stage."""
        assert self.sender is not None
        self.sender.send((_flat(self._copies),))

    def state(self, layer: int) -> dict[str, Tensor]:
        """The weights of one layer's copy, by name: they are older than the decoder itself."""
        return {name: value.detach() for name, value in self._copies[layer].named_parameters()}

    @torch.no_grad()
    def restore(self, layer: int, state: Mapping[str, Tensor]) -> None:
        """Sets one layer's copy to what :meth:`state` gave, on whichever stage."""
        for name, value in self._copies[layer].named_parameters():
            value.copy_(state[name])

    def __len__(self) -> int:
        """Layers whose copies are here: this stage's, and all before them."""
        return len(self._copies)


def _flat(modules: Sequence[nn.Module]) -> Tensor:
    return parameters_to_vector(p for module in modules for p in module.parameters())


def _load(modules: Sequence[nn.Module], flat: Tensor) -> None:
    at = 0
    for module in modules:
        for parameter in module.parameters():
            parameter.copy_(flat[at : at + parameter.numel()].view_as(parameter))
            at += parameter.numel()
