"""Frozen copies of earlier layers' decoders, for objectives that decode while they train.

At micro-batch 0, R, 2R, ... every stage receives the copies that its predecessor holds at that micro-batch, adds its
own decoders as they are before the micro-batch, and sends all of them on. A layer therefore decodes with the weights
that ``h_1 .. h_{i-1}`` had before the last such micro-batch, on any partition: the bits depend on R alone.

The copies are sent in separate messages on a separate process group, so that messages of activations keep their shape
and their order. Receiving and sending are instructions before the forward pass, ``RefreshDecoders`` and
``SendDecoders``: a stage that waits for copies does not compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from ds_al.layer import ALLayer
from ds_al.transport.neighbours import Channels


class DecoderCopies:
    """The copies that one stage holds. Every rank constructs one where the objective needs them.

    Args:
        layers: ``(index in the network, layer)`` of the stage; their objectives get the copies of earlier layers.
        decoders: ``[h_1, ..., h_n]`` up to the stage's last decoder, frozen, on the device: they become the copies.
        channels: channels that carry the copies alone.
    """

    def __init__(
        self,
        layers: Sequence[tuple[int, ALLayer]],
        *,
        decoders: Sequence[nn.Module],
        channels: Channels,
    ) -> None:
        self.refresh_every = layers[0][1].objective.refresh_every
        self.sender, self.receiver = channels
        self._own = [layer.h for _, layer in layers if layer.ends]
        self._first = layers[0][0]
        # Only those of earlier layers are decoded with here; this stage's own are sent on.
        self._copies = list(decoders)
        for index, layer in layers:
            layer.objective.earlier = self._copies[:index]

    def due(self, micro_batch: int) -> bool:
        """Whether copies are refreshed before the forward of this micro-batch, counted from 0."""
        return micro_batch % self.refresh_every == 0

    def refreshed_before(self, micro_batch: int) -> int:
        """Returns how often copies are refreshed before this micro-batch."""
        return -(-micro_batch // self.refresh_every)

    @torch.no_grad()
    def refresh(self) -> None:
        """Receives the predecessor's copies, and adds this stage's own decoders."""
        if self.receiver is not None and self._first:
            self.receiver.expect(1)
            (flat,) = self.receiver.receive()
            _load(self._copies[: self._first], flat)
            self.receiver.release()
        for copy, own in zip(self._copies[self._first :], self._own, strict=True):
            for kept, present in zip(copy.parameters(), own.parameters(), strict=True):
                kept.copy_(present)

    @torch.no_grad()
    def send(self) -> None:
        """Sends the present copies to the next stage; must not be called on the last stage."""
        assert self.sender is not None
        if self._copies:  # none on the first stages of a group that the first layer spans
            self.sender.send((_flat(self._copies),))

    def state(self, layer: int) -> dict[str, Tensor]:
        """Returns the weights of one layer's copy, by name; they are older than the decoder itself."""
        return {name: value.detach() for name, value in self._copies[layer].named_parameters()}

    @torch.no_grad()
    def restore(self, layer: int, state: Mapping[str, Tensor]) -> None:
        """Sets one layer's copy to what :meth:`state` gave, on whichever stage."""
        for name, value in self._copies[layer].named_parameters():
            value.copy_(state[name])

    def __len__(self) -> int:
        """Number of layers whose copies this stage holds: its own, and all before them."""
        return len(self._copies)


def _flat(modules: Sequence[nn.Module]) -> Tensor:
    return parameters_to_vector(p for module in modules for p in module.parameters())


def _load(modules: Sequence[nn.Module], flat: Tensor) -> None:
    at = 0
    for module in modules:
        for parameter in module.parameters():
            parameter.copy_(flat[at : at + parameter.numel()].view_as(parameter))
            at += parameter.numel()
