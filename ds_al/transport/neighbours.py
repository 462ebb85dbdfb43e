"""Links of a stage to its neighbours: for each kind of message a sender, a receiver, and process groups of their own.

::

    stage 0      stage 1      stage 2      stage 3
       ---- 1 ---->  ---- 2 ---->  ---- 1 ---->         a group of two ranks per border and kind of message

    kinds: "training" (s, t, report) · "decoders" (copies of decoders) · "evaluation"
           inside a group "gradients", from the later stage to the earlier one, and "together", in both directions

All ranks connect the kinds in the same order, and of each kind first the borders 1, which do not touch, then the
borders 2: no rank waits for one that waits for it, and no chain of ranks waits for each other. With ``recovery`` a
border is connected as a whole, and again when the process at its other end has died (:mod:`ds_al.transport.border`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from ds_al.config.associated_learning import ALConfig, LinkConfig
from ds_al.group_schedule import Place
from ds_al.parallel.pairs import pair
from ds_al.parallel.topology import StageTopology
from ds_al.transport.border import EVALUATION, Border, Recovery, Reformed
from ds_al.transport.channel import Receiver, Sender, flush_at_exit
from ds_al.transport.recoverable import RecoverableReceiver, RecoverableSender, RenewedReceiver, RenewedSender
from ds_al.transport.slow_link import SlowReceiver, SlowSender, check_one_host

MakeSender = Callable[[Any], Sender]
MakeReceiver = Callable[[Any], Receiver]
First = tuple[int | None, int | None]


class Channels(NamedTuple):
    """Channels of a stage for one kind of message."""

    sender: Sender | RecoverableSender | None
    """To the next stage; ``None`` on the last one."""
    receiver: Receiver | RecoverableReceiver | None
    """From the previous stage; ``None`` on the first one."""


class EvaluationChannels(NamedTuple):
    """Channels of a stage for evaluation."""

    sender: Sender | RenewedSender | None
    receiver: Receiver | RenewedReceiver | None


class Links:
    """All channels of a stage, for training, decoder copies and evaluation. Every rank of the job must create one.

    Args:
        topology: place of this rank.
        config: queue depths, and the artificial slow link of training.
        device: device of the buffers.
        dynamic: whether every training message has its own header with shapes.
        decoders: whether to open channels for copies of decoders.
        place: place of the stage in its group, where AL layers span stages.
        recovery: with it, channels survive the death of a neighbour's process.

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
        recovery: Recovery | None = None,
    ) -> None:
        self._topology, self._config, self._device = topology, config, device
        if config.link is not None:
            check_one_host(topology)
        self._graphs = 0 if place is None else 2 * place.size
        self._depth = max(config.queue_depth, self._graphs)
        self._slots = max(config.receive_slots, self._graphs)
        here = topology.stage
        order = (here + 1, here - 1) if here % 2 == 0 else (here - 1, here + 1)
        self._neighbours = [stage for stage in order if 0 <= stage < topology.stages]
        self._recovery = recovery
        self._borders = {}
        if recovery is not None:
            self._borders = {there: self._border(recovery, there, place) for there in self._neighbours}
        self.training = self._open("training", dynamic=dynamic, link=config.link)
        self.decoders = Channels(None, None)
        if decoders:
            self.decoders = self._open("decoders", first=(None, None) if recovery is None else recovery.decoders)
        self.evaluation = self._open_evaluation()
        none = Channels(None, None)
        self.gradients = none
        if place is not None:
            self.gradients = self._open_back("gradients", place, dynamic=dynamic, link=config.link)
        self.together = self.together_back = none
        if place is not None and config.group_step == "together":
            self.together = self._open_on("together", place)
            self.together_back = self._open_back("together back", place, dynamic=True, first=(0, 0))
        for border in self._borders.values():
            border.form()

    def _open(
        self, kind: str, *, dynamic: bool = False, link: LinkConfig | None = None, first: First = (None, None)
    ) -> Channels:
        here, make = self._topology.stage, self._makers(dynamic=dynamic, link=link)
        return self._channels(kind, (here + 1, here - 1), make, first=first)

    def _open_evaluation(self) -> EvaluationChannels:
        here, make = self._topology.stage, self._makers(dynamic=True, link=None)
        if self._recovery is None:
            return EvaluationChannels(*self._connect(EVALUATION, (here + 1, here - 1), make))
        after, before = self._borders.get(here + 1), self._borders.get(here - 1)
        return EvaluationChannels(
            None if after is None else RenewedSender(after, EVALUATION, make=make[0]),
            None if before is None else RenewedReceiver(before, EVALUATION, make=make[1]),
        )

    def _open_on(self, kind: str, place: Place) -> Channels:
        """Opens channels to the next stage of the group, and from the previous one."""
        here, make = self._topology.stage, self._makers(dynamic=True, link=None)
        ends = -1 if place.is_last else here + 1, -1 if place.is_first else here - 1
        return self._channels(kind, ends, make, first=(0, 0))

    def _open_back(
        self,
        kind: str,
        place: Place,
        *,
        dynamic: bool,
        link: LinkConfig | None = None,
        first: First = (None, None),
    ) -> Channels:
        """Opens channels to the previous stage of the group, and from the next one."""
        here, common = self._topology.stage, self._common(dynamic)
        sender, receiver = _kinds(link)
        make = (
            partial(sender, queue_depth=self._graphs, stages=(here, here - 1), **common),
            partial(receiver, slots=self._graphs, stages=(here, here + 1), **common),
        )
        ends = -1 if place.is_first else here - 1, -1 if place.is_last else here + 1
        return self._channels(kind, ends, make, first=first)

    def _makers(self, *, dynamic: bool, link: LinkConfig | None) -> tuple[MakeSender, MakeReceiver]:
        """What makes a sender to the next stage, and a receiver from the previous one, of a process group."""
        here, common = self._topology.stage, self._common(dynamic)
        sender, receiver = _kinds(link)
        return (
            partial(sender, queue_depth=self._depth, stages=(here, here + 1), **common),
            partial(receiver, slots=self._slots, stages=(here, here - 1), **common),
        )

    def _common(self, dynamic: bool) -> dict[str, Any]:
        return {"device": self._device, "dynamic": dynamic, "checksum": self._config.message_checksum}

    def _channels(
        self, kind: str, ends: tuple[int, int], make: tuple[MakeSender, MakeReceiver], *, first: First = (None, None)
    ) -> Channels:
        """Makes a sender to the first of these stages, and a receiver from the second one, where there are such;
        ``first`` has the numbers of the first messages received and sent."""
        if self._recovery is None:
            return Channels(*self._connect(kind, ends, make))
        after, before = (self._borders.get(stage) for stage in ends)
        sender = None if after is None else RecoverableSender(after, kind, make=make[0], first=first[1])
        if sender is not None:
            flush_at_exit(sender)
        return Channels(
            sender, None if before is None else RecoverableReceiver(before, kind, make=make[1], first=first[0])
        )

    def _connect(
        self, kind: str, ends: tuple[int, int], make: tuple[MakeSender, MakeReceiver]
    ) -> tuple[Sender | None, Receiver | None]:
        """Connects the ends of one kind of messages, which live as long as all processes."""
        ranks = self._topology.pipeline
        groups = {stage: pair(kind, ranks[stage], device=self._device) for stage in self._neighbours if stage in ends}
        sender = make[0](groups[ends[0]]) if ends[0] in groups else None
        if sender is not None:
            flush_at_exit(sender)
        return sender, make[1](groups[ends[1]]) if ends[1] in groups else None

    def _border(self, recovery: Recovery, there: int, place: Place | None) -> Border:
        return Border(
            recovery,
            stages=(self._topology.stage, there),
            device=self._device,
            ahead=self._depth + self._slots,
            elsewhere=partial(self._attend_others, there),
            coupled=place is not None and there in place.group,
        )

    @property
    def senders(self) -> list[Sender | RecoverableSender]:
        """Senders used in training."""
        return [each.sender for each in self._of_training if each.sender is not None]

    @property
    def receivers(self) -> list[Receiver | RecoverableReceiver]:
        """Receivers used in training."""
        return [each.receiver for each in self._of_training if each.receiver is not None]

    @property
    def _of_training(self) -> tuple[Channels, ...]:
        return self.training, self.decoders, self.gradients, self.together, self.together_back

    def reset(self) -> None:
        """Discards the shapes of training messages. Every rank must call it, between batches."""
        for channel in (*self.training, *self.decoders, *self.gradients):
            if channel is not None:
                channel.reset()

    # ---- with recovery -------------------------------------------------------------------------------

    def attend(self) -> None:
        """Connects again with neighbours whose processes have died; a stage that waits outside of channels calls it."""
        for border in self._borders.values():
            border.attend()

    def _attend_others(self, there: int) -> None:
        """Attends the borders to all neighbours but this one."""
        for stage, border in self._borders.items():
            if stage != there:
                border.attend()

    def renew(self, attempt: int) -> None:
        """Connects again with both neighbours, so that evaluation begins anew. Every rank must call it.

        Args:
            attempt: number that grows from call to call, the same on all ranks.
        """
        for border in self._borders.values():
            border.renew(attempt)

    @property
    def reformed(self) -> list[Reformed]:
        """How the borders of this stage were made, each time."""
        return [reformed for border in self._borders.values() for reformed in border.reformed]


def _kinds(link: LinkConfig | None) -> tuple[Callable[..., Sender], Callable[..., Receiver]]:
    """What makes the ends of a channel of training, which an artificial link slows."""
    return (Sender, Receiver) if link is None else (partial(SlowSender, link=link), SlowReceiver)
