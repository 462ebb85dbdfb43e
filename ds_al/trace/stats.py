"""What one stage did while it trained, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageStats:
    """What one stage did in its ``train_batch()`` calls since the last reset. Seconds of the host.

    On a GPU the host runs ahead of the device, so waits show here only as far as they block the host.
    """

    stage: int
    wall: float
    wait_input: float
    wait_queue: float
    wait_data: float
    bytes_sent: int
    messages_sent: int
    samples: int

    @property
    def idle(self) -> float:
        """Share of wall time spent waiting for other stages: the bubble fraction."""
        return (self.wait_input + self.wait_queue) / self.wall if self.wall else 0.0
