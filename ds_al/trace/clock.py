"""Measurement of clock offsets between ranks, to merge their events on one time axis."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist

from ds_al.parallel.pairs import pair

_HOST = torch.device("cpu")  # the clocks are those of hosts, so messages stay there


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


def align(ranks: list[int], *, exchanges: int = 10) -> ClockOffset:
    """Measures this rank's clock offset from ``ranks[0]``. All of ``ranks`` must call it.

    The first rank requests the time of each other rank several times. The exchange with the shortest round trip
    counts; its time is assigned to the middle of the round trip, as in the network time protocol.

    Args:
        ranks: global ranks; the first one is the reference.
        exchanges: number of requests per rank.
    """
    me = dist.get_rank()
    if me != ranks[0]:
        return _answer(pair("clock", ranks[0], device=_HOST), exchanges)
    for rank in ranks[1:]:
        _ask(pair("clock", rank, device=_HOST), exchanges)
    return ClockOffset(0.0, 0.0)


def _ask(group: Any, exchanges: int) -> None:
    """Measures the offset of the other rank, and sends it there."""
    message, best = torch.zeros(2, dtype=torch.float64), (float("inf"), 0.0)
    peer = 1 - group.rank()
    for _ in range(exchanges):
        asked = time.perf_counter()
        group.send([message], peer, 0).wait()
        group.recv([message], peer, 0).wait()
        answered = time.perf_counter()
        best = min(best, (answered - asked, message[0].item() - (asked + answered) / 2))
    group.send([torch.tensor([best[1], best[0] / 2], dtype=torch.float64)], peer, 0).wait()


def _answer(group: Any, exchanges: int) -> ClockOffset:
    """Sends this rank's time whenever it is asked for, and returns what the other rank made of it."""
    message, peer = torch.zeros(2, dtype=torch.float64), 1 - group.rank()
    for _ in range(exchanges):
        group.recv([message], peer, 0).wait()
        message[0] = time.perf_counter()
        group.send([message], peer, 0).wait()
    group.recv([message], peer, 0).wait()
    offset, error = message.tolist()
    return ClockOffset(offset, error)
