"""How far the clocks of the ranks' hosts are apart, so that their events can be laid on one axis."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from deepspeed import comm as dist


@dataclass(frozen=True)
class ClockOffset:
    """How far one rank's clock is ahead of the first rank's, in seconds."""

    offset: float
    """What was measured."""
    error: float
    """Bound of the measurement's error: half of the shortest round trip."""

    @property
    def correction(self) -> float:
        """What to subtract from this rank's times: 0 unless the clocks differ by more than the error.

        Processes of one host share a clock, where a correction would only add noise.
        """
        return self.offset if abs(self.offset) > self.error else 0.0


def align(ranks: list[int], *, device: torch.device, exchanges: int = 10) -> ClockOffset:
    """Measures this rank's clock against that of ``ranks[0]``; all of ``ranks`` must call it, with nothing under way.

    The first rank asks each other one for its time, several times. The answer that came back fastest counts,
    taken as half-way between question and answer, as in the network time protocol.

    Args:
        ranks: global ranks; clocks are measured against the first one's.
        device: where the backend's messages lie.
        exchanges: questions per rank.
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
