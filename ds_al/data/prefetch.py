"""Prefetching of micro-batches in a thread, concurrently with the training step.

A micro-batch is a function of its position, so the thread changes only the time.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class Prefetcher:
    """Returns ``make(position)`` for consecutive positions, computed ahead of time.

    The thread starts at the first :meth:`get`, and ends with :meth:`close`, when this object is freed, or with the
    program.

    Args:
        make: computes the value of a position. It must not reference this object, or neither would ever be freed.
        depth: maximum number of values computed ahead; 1 or more.
    """

    def __init__(self, make: Callable[[int], Any], *, depth: int) -> None:
        self._make, self._depth = make, depth
        self._work: _Work | None = None
        self._finalizer: weakref.finalize | None = None

    def get(self, position: int) -> Any:
        """Returns the value of a position once it is ready. Any position other than the next one restarts the thread
        there.

        Raises:
            Exception: the exception of ``make`` for this position; the next call tries again.
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
        """Ends the thread and discards prepared values. A later :meth:`get` restarts it."""
        if self._finalizer is not None:
            self._finalizer()
        self._work = self._finalizer = None

    def _start(self, position: int) -> None:
        self._work = work = _Work(self._make, position, self._depth)
        thread = threading.Thread(target=work.run, name="ds_al-prefetch", daemon=True)
        # Runs at exit, too: threads must not use torch during the teardown of the interpreter.
        self._finalizer = weakref.finalize(self, _end, work, thread)
        thread.start()


@dataclass
class _Work:
    """State shared by the thread and its owner."""

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
    if thread is not threading.current_thread():  # the thread itself may release the last reference
        thread.join()
