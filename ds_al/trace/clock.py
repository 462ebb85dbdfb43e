"""Measurement of clock offsets between ranks, to merge their events on one time axis."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from deepspeed import comm as dist


@dataclass(frozen=True)
class ClockOffset:
    """Offset of one rank's clock from the first rank's, in seconds."""

    offset: float
    """Measured offset; positive if this rank's clock is ahead."""
    error: float
    """Bound of the measurement error: half of the shortest round trip."""

    @property
    def correction(self) -> float:
        """Seconds to subtract from this rank's times: 0 unless the offset exceeds the error.

        Processes of one host share a clock, for which a correction would only add noise.
        """
        return self.offset if abs(self.offset) > self.error else 0.0


def align(ranks: list[int], *, device: torch.device, exchanges: int = 10) -> ClockOffset:
    """Measures this rank's clock offset from ``ranks[0]``. All of ``ranks`` must call it, with no messages in flight.

    The first rank requests the time of each other rank several times. The exchange with the shortest round trip
    counts; its time is assigned to the middle of the round trip, as in the network time protocol.

    Args:
        ranks: global ranks; the first one is the reference.
        device: device of the backend's messages.
        exchanges: number of requests per rank.
    """
    me, message = dist.get_rank(), torch.zeros(2, dtype=torch.float64, device=device)
    for rank in ranks[1:]:
        best = (float("inf"), 0.0)
        for _ in range(exchanges):
            if me == ranks[0]:
                asked = time.perf_counter()
                dist.send(message, rank)
                dist.recv(message, rank)
                answered = time.perf_counter()
                best = min(best, (answered - asked, message[0].item() - (asked + answered) / 2))
            elif me == rank:
                dist.recv(message, ranks[0])
                message[0] = time.perf_counter()
                dist.send(message, ranks[0])
        if me == ranks[0]:
            dist.send(torch.tensor([best[1], best[0] / 2], dtype=torch.float64, device=device), rank)
        elif me == rank:
            dist.recv(message, ranks[0])
            offset, error = message.tolist()
            return ClockOffset(offset, error)
    return ClockOffset(0.0, 0.0)
