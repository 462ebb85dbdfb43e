"""Links of a stage to its neighbours: for each kind of message a sender, a receiver, and process groups of their own.

::

    stage 0      stage 1      stage 2      stage 3
       ---- 1 ---->  ---- 2 ---->  ---- 1 ---->         a group of two ranks per border and kind of message

    kinds: "training" (s, t, report) · "decoders" (copies of decoders) · "evaluation"
           "gradients" (from the later stage to the earlier one, inside a group)

All ranks connect the kinds in the same order, and of each kind first the borders 1, which do not touch, then the
borders 2: no rank waits for one that waits for it, and no chain of ranks waits for each other.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from ds_al.config.associated_learning import ALConfig, LinkConfig
from ds_al.group_schedule import Place
from ds_al.parallel.pairs import pair
from ds_al.parallel.topology import StageTopology
from ds_al.transport.channel import Receiver, Sender
from ds_al.transport.slow_link import SlowReceiver, SlowSender, check_one_host


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
        decoders: whether to open channels for copies of decoders.

    Raises:
        ALConfigError: on every rank: the artificial slow link is to be between several hosts.
    """

    def __init__(
        self,
        topology: StageTopology,
        *,
        config: ALConfig,
        device: torch.device,
        dynamic: bool,
        decoders: bool,
        place: Place | None = None,
    ) -> None:
        self._topology, self._config, self._device = topology, config, device
        if config.link is not None:
            check_one_host(topology)
        self._graphs = 0 if place is None else 2 * place.size
        self.training = self._open("training", dynamic=dynamic, link=config.link)
        self.decoders = self._open("decoders", dynamic=False) if decoders else Channels(None, None)
        self.evaluation = self._open("evaluation", dynamic=True)
        self.gradients = Channels(None, None) if place is None else self._open_back(place, dynamic=dynamic)

    def _open(self, kind: str, *, dynamic: bool, link: LinkConfig | None = None) -> Channels:
        make_sender = Sender if link is None else partial(SlowSender, link=link)
        make_receiver = Receiver if link is None else SlowReceiver
        here = self._topology.stage
        groups = self._connect(kind, {here - 1, here + 1})
        depth, slots = max(self._config.queue_depth, self._graphs), max(self._config.receive_slots, self._graphs)
        common = self._common(dynamic)
        sender = receiver = None
        if (after := groups.get(here + 1)) is not None:
            sender = make_sender(after, queue_depth=depth, stages=(here, here + 1), **common)
        if (before := groups.get(here - 1)) is not None:
            receiver = make_receiver(before, slots=slots, stages=(here, here - 1), **common)
        return Channels(sender, receiver)

    def _open_back(self, place: Place, *, dynamic: bool) -> Channels:
        """Opens the channels of gradients: to the previous stage of the group, and from the next one."""
        here = self._topology.stage
        there = {*([] if place.is_first else [here - 1]), *([] if place.is_last else [here + 1])}
        groups, common = self._connect("gradients", there), self._common(dynamic)
        sender = receiver = None
        if (before := groups.get(here - 1)) is not None:
            sender = Sender(before, queue_depth=self._graphs, stages=(here, here - 1), **common)
        if (after := groups.get(here + 1)) is not None:
            receiver = Receiver(after, slots=self._graphs, stages=(here, here + 1), **common)
        return Channels(sender, receiver)

    def _common(self, dynamic: bool) -> dict[str, Any]:
        return {"device": self._device, "dynamic": dynamic, "checksum": self._config.message_checksum}

    def _connect(self, kind: str, stages: set[int]) -> dict[int, Any]:
        """Returns the process group of one kind of message with each of these neighbours, by its stage."""
        here, ranks = self._topology.stage, self._topology.pipeline
        first, second = (here + 1, here - 1) if here % 2 == 0 else (here - 1, here + 1)
        return {
            stage: pair(kind, ranks[stage], device=self._device)
            for stage in (first, second)
            if stage in stages and 0 <= stage < self._topology.stages
        }

    @property
    def senders(self) -> list[Sender]:
        """Senders used in training."""
        return [each.sender for each in (self.training, self.decoders, self.gradients) if each.sender is not None]

    @property
    def receivers(self) -> list[Receiver]:
        """Receivers used in training."""
        return [each.receiver for each in (self.training, self.decoders, self.gradients) if each.receiver is not None]

    def reset(self) -> None:
        """Discards the shapes of training messages. Every rank must call it, between batches."""
        for channel in filter(None, (*self.training, *self.decoders, *self.gradients)):
            channel.reset()
