"""Stop of a run by a signal: all ranks stop after the same batch, save a checkpoint, and leave.

``SIGINT`` (Ctrl-C), ``SIGTERM`` and ``SIGHUP`` on any rank stop all of them, and so does the end of the launcher. Rank
0 chooses the batch, since stages may be at different ones::

    any rank   signal ---> every rank knows that the run has to stop
    rank 0     once all know:  writes b + 1, then trains batch b + 1, and stops
    rank r     after every batch from then on:  reads b + 1, and stops after it

A stage cannot end batch b + 1 without rank 0, so it reads what rank 0 has written before it begins another one.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from ds_al.parallel import presence, store

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that stop a run."""


class Stopped(BaseException):
    """A signal has ended the run, after a checkpoint; no error of the run.

    Args:
        name: of the signal.
        batch: last batch that was trained.
        folder: folder of the run's checkpoints.

    Attributes:
        code: exit code, 128 and the signal's number.
    """

    def __init__(self, name: str, *, batch: int, folder: Path) -> None:
        super().__init__(f"stopped by {name} after batch {batch}: continue with --resume {folder}")
        self.code = 128 + signal.Signals[name]


class Stop:
    """Asks whether a run has to stop. Every rank makes one."""

    def __init__(self) -> None:
        self._here = presence.here()
        self._store = store.connect("stop") if self._here.world > 1 else None

    @contextlib.contextmanager
    def by_signals(self) -> Iterator[None]:
        """Lets signals stop the run inside; a second ``SIGINT`` interrupts at once."""

        interrupts = 0

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal interrupts
            interrupts += number == signal.SIGINT
            if interrupts > 1:
                raise KeyboardInterrupt
            self._here.stop(signal.Signals(number).name)

        ignored = {number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN}  # as of nohup
        before = {number: signal.signal(number, stop) for number in SIGNALS if number not in ignored}
        self._here.on_launcher_gone = lambda: self._here.stop("SIGHUP")
        try:
            yield
        finally:
            self._here.on_launcher_gone = None
            for number, handler in before.items():
                signal.signal(number, handler)

    def after(self, batch: int) -> bool:
        """Whether the run stops after this batch, counted from 1; called after every batch."""
        if not self._here.stopping:
            return False
        if self._store is None:
            return True
        if self._here.rank == 0 and self._here.all_stop and not self._store.check(["at"]):
            self._store.set("at", str(batch + 1))
        return self._store.check(["at"]) and batch >= int(self._store.get("at"))

    def stopped(self, batch: int, *, folder: Path) -> Stopped:
        """Returns the exception that ends the run, once its checkpoint is saved."""
        return Stopped(self._here.stopping, batch=batch, folder=folder)
