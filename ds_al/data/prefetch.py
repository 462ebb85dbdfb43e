"""Prepares the next micro-batches in a thread, while the training step runs.

What a position holds is a function of that position, so the thread can change nothing but the time.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class Prefetcher:
    """Hands out ``make(position)`` for rising positions, made ahead of time.

    The thread starts at the first :meth:`get`, and ends with :meth:`close`, when this object is no longer
    held, or with the program.

    Args:
        make: the value of a position. Must not hold this object, or neither would ever be freed.
        depth: values that are kept ready at most; 1 or more.
    """

    def __init__(self, make: Callable[[int], Any], *, depth: int) -> None:
        self._make, self._depth = make, depth
        self._work: _Work | None = None
        self._finalizer: weakref.finalize | None = None

    def get(self, position: int) -> Any:
        """The value of this position, waited for if it is not ready. A position out of turn starts anew from there.

        Raises:
            Exception: whatever ``make`` raised for this position; the next call tries again.
        """
        if self._work is None or self._work.next_out != position:
            self.close()
            self._start(position)
        assert self._work is not None
        value, error = self._work.take()
        if error is not None:
            self.close()
            raise error
        return value

    def close(self) -> None:
        """Ends the thread and drops what is ready. A later :meth:`get` starts it again."""
        if self._finalizer is not None:
            self._finalizer()
        self._work = self._finalizer = None

    def _start(self, position: int) -> None:
        self._work = work = _Work(self._make, position, self._depth)
        thread = threading.Thread(target=work.run, name="ds_al-prefetch", daemon=True)
        # Runs at exit, too: torch must not be at work in a thread while the interpreter is taken down.
        self._finalizer = weakref.finalize(self, _end, work, thread)
        thread.start()


@dataclass
class _Work:
    """What the thread shares with its owner."""

    make: Callable[[int], Any]
    next_out: int
    depth: int
    ready: deque[tuple[Any, BaseException | None]] = field(default_factory=deque)
    changed: threading.Condition = field(default_factory=threading.Condition)
    stopped: bool = False

    def run(self) -> None:
        position = self.next_out
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.stopped or len(self.ready) < self.depth)
                if self.stopped:
                    return
            try:
                result: tuple[Any, BaseException | None] = self.make(position), None
            except BaseException as error:
                result = None, error
            with self.changed:
                self.ready.append(result)
                self.changed.notify_all()
            if result[1] is not None:
                return
            position += 1

    def take(self) -> tuple[Any, BaseException | None]:
        with self.changed:
            self.changed.wait_for(lambda: bool(self.ready))
            self.next_out += 1
            self.changed.notify_all()
            return self.ready.popleft()


def _end(work: _Work, thread: threading.Thread) -> None:
    with work.changed:
        work.stopped = True
        work.changed.notify_all()
    if thread is not threading.current_thread():  # the last reference may go in the thread itself
        thread.join()
