"""An artificial slow link between stages of one machine, for tests and experiments.

A message carries the moment at which it is to arrive, on the clock that all processes of a machine share. The sender
goes on at once; the receiver takes the message in no earlier than then. So nothing occupies a core, and messages
travel behind one another as they would on a wire::

    sender      send m ------ transfer ------ on its way -----> arrival       bytes / rate, then delay
                     send m+1 - waits its turn - transfer -----------> arrival

What is not modelled is a wire that is full: as many messages are on their way as the queues of both ends hold.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from ds_al.config.associated_learning import LinkConfig
from ds_al.transport.channel import Receiver, Sender


class SlowLink:
    """One direction of a link.

    Args:
        config: delay and speed.
    """

    def __init__(self, config: LinkConfig) -> None:
        self._delay = config.delay_ms / 1000
        self._bytes_per_second = config.mbit * 1e6 / 8 if config.mbit else float("inf")
        self._free = 0.0

    def arrival(self, nbytes: int) -> Tensor:
        """When a message of so many bytes arrives that is sent now: float64 ``(1,)``, seconds of ``time.monotonic``."""
        self._free = max(time.monotonic(), self._free) + nbytes / self._bytes_per_second
        return torch.tensor([self._free + self._delay], dtype=torch.float64)


def wait_until(arrival: Tensor) -> None:
    """Sleeps until the moment that :meth:`SlowLink.arrival` gave."""
    moment = arrival.item()
    while (left := moment - time.monotonic()) > 0:
        time.sleep(left)


class SlowSender(Sender):
    """A :class:`~ds_al.transport.channel.Sender` whose messages say when they arrive."""

    def __init__(self, peer: int, *, link: LinkConfig, **options: Any) -> None:
        super().__init__(peer, **options)
        self._link = SlowLink(link)

    def send(self, message: tuple[Tensor, ...]) -> None:
        """As ever; what the link delays is the arrival."""
        super().send((*message, self._link.arrival(sum(tensor.nbytes for tensor in message))))


class SlowReceiver(Receiver):
    """A :class:`~ds_al.transport.channel.Receiver` of messages that say when they arrive."""

    def receive(self) -> tuple[Tensor, ...]:
        """As ever, and no earlier than the message says. This counts as waiting for it."""
        *message, arrival = super().receive()
        start = time.perf_counter()
        wait_until(arrival)
        seconds = time.perf_counter() - start
        self.waited += seconds
        self.latest = self.latest[0] + seconds, self.latest[1]
        return tuple(message)
