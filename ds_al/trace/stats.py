"""Training statistics of one stage: waiting times, bytes, messages and samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ds_al.system import plain


@plain.record
@dataclass(frozen=True)
class StageStats:
    """Statistics of one stage's ``train_batch()`` calls since the last reset, in seconds of the host.

    On a GPU the host runs ahead of the device, so only waits that block the host are included.
    """

    stage: int
    wall: float
    wait_input: float
    wait_queue: float
    wait_data: float
    bytes_sent: int
    messages_sent: int
    samples: int
    skipped: Mapping[int, int] = field(default_factory=dict)
    """Steps that were left out, by index of the layer; empty where no layer skips any."""

    @property
    def idle(self) -> float:
        """Share of wall time spent waiting for other stages: the bubble fraction."""
        return (self.wait_input + self.wait_queue) / self.wall if self.wall else 0.0


class Channel(Protocol):
    """Counters of one end of a channel, see :mod:`ds_al.transport.channel`."""

    waited: float

    @property
    def nbytes(self) -> int:
        """Bytes of the messages."""

    @property
    def messages(self) -> int:
        """Number of messages."""


class StageCounters:
    """Counters behind :class:`StageStats`, since the last :meth:`reset`.

    It is a separate class for the same reason as :class:`~ds_al.trace.recorder.Progress`.

    Args:
        stage: index of the stage.
        senders, receivers: training channels of the stage.
    """

    def __init__(self, stage: int, *, senders: Sequence[Channel], receivers: Sequence[Channel]) -> None:
        self._stage, self._senders, self._receivers = stage, senders, receivers
        self.skips: Callable[[], Mapping[int, int]] = dict
        """Returns the number of steps that were ever left out, by index of the layer."""
        self.reset()

    def reset(self) -> None:
        """Resets all counters to 0."""
        self._skips_before = self.skips()
        self.wall = self.wait_data = 0.0
        self.waited_for_data = 0.0
        """Seconds waited for the latest micro-batch."""
        self.samples = 0
        for channel in (*self._senders, *self._receivers):
            channel.waited = 0.0
        self._bytes_before = sum(sender.nbytes for sender in self._senders)
        self._messages_before = sum(sender.messages for sender in self._senders)

    def stats(self) -> StageStats:
        """Returns the statistics since the last reset."""
        return StageStats(
            stage=self._stage,
            wall=self.wall,
            wait_input=sum(receiver.waited for receiver in self._receivers),
            wait_queue=sum(sender.waited for sender in self._senders),
            wait_data=self.wait_data,
            bytes_sent=sum(sender.nbytes for sender in self._senders) - self._bytes_before,
            messages_sent=sum(sender.messages for sender in self._senders) - self._messages_before,
            samples=self.samples,
            skipped={layer: count - self._skips_before.get(layer, 0) for layer, count in self.skips().items()},
        )
