"""Artificial slow link between stages of one machine, for tests and experiments.

Each message contains its arrival time, on the clock that all processes of a machine share. The sender returns at once;
the receiver delivers the message no earlier than that. The simulation thus occupies no core, and messages queue behind
one another as on a real link::

    sender      send m ------ transfer ------ latency --------> arrival       bytes / rate, then delay
                     send m+1 --- queued ----- transfer -------------> arrival

A full link is not modelled: the queues of both ends alone limit the number of messages in flight.
"""

from __future__ import annotations

import socket
import time
from typing import Any

import torch
from torch import Tensor

from ds_al.config.associated_learning import LinkConfig
from ds_al.config.base import BLOCK
from ds_al.errors import ALConfigError
from ds_al.parallel.topology import StageTopology
from ds_al.transport.channel import Receiver, Sender


def check_one_host(topology: StageTopology) -> None:
    """Refuses stages whose clocks differ. Every rank must call it.

    Raises:
        ALConfigError: the stages are on several hosts; raised on every rank.
    """
    hosts = list(dict.fromkeys(topology.gather(socket.gethostname())))
    if len(hosts) > 1:
        raise ALConfigError(
            f'"{BLOCK}.link" emulates a link between processes that share a clock: got stages on the hosts '
            f"{', '.join(hosts)}, expected one host. Remove it: the messages between these hosts take a real link"
        )


class SlowLink:
    """One direction of a link.

    Args:
        config: delay and bandwidth.
    """

    def __init__(self, config: LinkConfig) -> None:
        self._delay = config.delay_ms / 1000
        self._bytes_per_second = config.mbit * 1e6 / 8 if config.mbit else float("inf")
        self._free = 0.0

    def arrival(self, nbytes: int) -> Tensor:
        """Returns the arrival time of a message sent now: float64 ``(1,)``, seconds of ``time.monotonic``."""
        self._free = max(time.monotonic(), self._free) + nbytes / self._bytes_per_second
        return torch.tensor([self._free + self._delay], dtype=torch.float64)


def wait_until(arrival: Tensor) -> None:
    """Sleeps until an arrival time returned by :meth:`SlowLink.arrival`."""
    moment = arrival.item()
    while (left := moment - time.monotonic()) > 0:
        time.sleep(left)


class SlowSender(Sender):
    """A :class:`~ds_al.transport.channel.Sender` that appends its arrival time to each message."""

    def __init__(self, group: Any, *, link: LinkConfig, **options: Any) -> None:
        super().__init__(group, **options)
        self._link = SlowLink(link)

    def send(self, message: tuple[Tensor, ...]) -> None:
        """Sends a message as the base class does; the link delays its arrival alone."""
        super().send((*message, self._link.arrival(sum(tensor.nbytes for tensor in message))))


class SlowReceiver(Receiver):
    """A :class:`~ds_al.transport.channel.Receiver` of messages that contain their arrival time."""

    def receive(self) -> tuple[Tensor, ...]:
        """Receives as the base class does, but not before the arrival time. The delay counts as waiting."""
        *message, arrival = super().receive()
        start = time.perf_counter()
        wait_until(arrival)
        seconds = time.perf_counter() - start
        self.waited += seconds
        self.latest = self.latest[0] + seconds, self.latest[1]
        return tuple(message)
