"""Waiting for other ranks at the start: bounded, and never in silence."""

from __future__ import annotations

import os
import socket
import sys
import time

LATER = "Where hosts start at different times, set DS_AL_START_SECONDS on all of them to more seconds than that"
"""What a user does whose ranks have not waited long enough, for errors."""

_REMIND = 15.0  # seconds between two lines on what a rank waits for


class Waiting:
    """A time-out; says on standard error what this rank waits for, after some seconds and then again and again.

    Args:
        rank: of this process.
        seconds: time-out.
    """

    def __init__(self, rank: int, *, seconds: float) -> None:
        self.seconds = seconds
        self._who = f"rank {rank} ({socket.gethostname()})"
        self._start = self._said = time.monotonic()

    @property
    def waited(self) -> float:
        """Seconds since the begin."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds until the time-out; 0 once it is over."""
        return max(self.seconds - self.waited, 0.0)

    def say(self, what: str) -> None:
        """Says what is waited for, on the first rank of each host, unless it was said a moment ago."""
        now = time.monotonic()
        if now - self._said < _REMIND or os.environ.get("LOCAL_RANK", "0") != "0":
            return
        self._said = now
        print(
            f"ds_al: {self._who} has waited {self.waited:.0f} s for {what}. It ends after {self.seconds:.0f} s "
            "(DS_AL_START_SECONDS)",
            file=sys.stderr,
            flush=True,
        )
