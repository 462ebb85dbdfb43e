"""Channels of a stage to its neighbours: one sender and one receiver for each kind of message."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from ds_al.config.associated_learning import ALConfig, LinkConfig
from ds_al.parallel.topology import StageTopology
from ds_al.transport.channel import Receiver, Sender
from ds_al.transport.slow_link import SlowReceiver, SlowSender


class Channels(NamedTuple):
    """Channels of a stage for one kind of message."""

    sender: Sender | None
    """To the next stage; ``None`` on the last one."""
    receiver: Receiver | None
    """From the previous stage; ``None`` on the first one."""


class Links:
    """All channels of a stage, for training, decoder copies and evaluation. Every rank of the job must create one.

    Args:
        topology: place of this rank.
        config: queue depths, and the artificial slow link of training.
        device: device of the buffers.
        dynamic: whether every training message has its own header with shapes.
        decoders: whether to open channels for copies of decoders, on a process group of their own.
    """

    def __init__(
        self, topology: StageTopology, *, config: ALConfig, device: torch.device, dynamic: bool, decoders: bool
    ) -> None:
        self._topology, self._config, self._device = topology, config, device
        self.training = self._open(dynamic=dynamic, link=config.link)
        self.decoders = (
            self._open(dynamic=False, group=topology.new_pipeline_group()) if decoders else Channels(None, None)
        )
        self.evaluation = self._open(dynamic=True)

    def _open(self, *, dynamic: bool, group: Any = None, link: LinkConfig | None = None) -> Channels:
        make_sender = Sender if link is None else partial(SlowSender, link=link)
        make_receiver = Receiver if link is None else SlowReceiver
        common: dict[str, Any] = {"device": self._device, "dynamic": dynamic, "group": group}
        depth, slots = self._config.queue_depth, self._config.receive_slots
        here, ranks = self._topology.stage, self._topology.pipeline
        sender = receiver = None
        if not self._topology.is_last:
            sender = make_sender(ranks[here + 1], queue_depth=depth, stages=(here, here + 1), **common)
        if not self._topology.is_first:
            receiver = make_receiver(ranks[here - 1], slots=slots, stages=(here, here - 1), **common)
        return Channels(sender, receiver)

    @property
    def senders(self) -> list[Sender]:
        """Senders used in training."""
        return [each.sender for each in (self.training, self.decoders) if each.sender is not None]

    @property
    def receivers(self) -> list[Receiver]:
        """Receivers used in training."""
        return [each.receiver for each in (self.training, self.decoders) if each.receiver is not None]

    def reset(self) -> None:
        """Discards the shapes of training messages. Every rank must call it, between batches."""
        for channel in filter(None, self.training):
            channel.reset()
