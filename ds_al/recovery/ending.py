"""The end of a job with recovery: all ranks come to their end together, or a death takes all of them back from it.

::

    worker    posts its exit code in the present round; all have posted: round 3 ---> over, and leaves
    keeper    its worker has died:  round 3 ---> 4, and replaces it; over: nobody needs it any more, so it is done

A rank that left alone could not send its messages again to a new process. Both changes compare the round first, so that
either all ranks leave, or all of them wait for the new process.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from torch.distributed import Store

_POLL = 0.01  # seconds between two looks at the store
_ROUND, _OVER = "ending", "over"


def exit_code() -> Callable[[], int]:
    """Returns what tells the code of a later ``sys.exit()``, which Python does not tell to ``atexit`` functions."""
    code, leave = 0, sys.exit

    def leave_with(status: Any = None) -> NoReturn:
        nonlocal code
        code = status if isinstance(status, int) else int(status is not None)
        leave(status)

    sys.exit = leave_with
    return lambda: code


class Ending:
    """What one rank, or its keeper, does at the end.

    Args:
        rank, world: this rank, and number of ranks.
        store: connection to the store of the keepers.
    """

    def __init__(self, rank: int, world: int, *, store: Store) -> None:
        self._rank, self._world, self._store = rank, world, store

    def leave(self, code: int, *, while_waiting: Callable[[], None]) -> None:
        """Waits until all ranks have come to their end; the worker calls it.

        Args:
            code: exit code of the script.
            while_waiting: called several times a second: a new process may need this one.
        """
        self._store.set(f"{_ROUND}/code/{self._rank}", str(code))
        while (round_ := self._round()) != _OVER:
            self._store.set(f"{_ROUND}/{round_}/{self._rank}", "")
            posts = [f"{_ROUND}/{round_}/{rank}" for rank in range(self._world)]
            while not self._store.check(posts) and self._round() == round_:
                while_waiting()
                time.sleep(_POLL)
            if self._store.check(posts):
                self._change(round_, _OVER)

    def is_over(self) -> bool:
        """Whether all ranks have come to their end, after the worker's death; if not, they come there again."""
        while (round_ := self._round()) != _OVER:
            if self._change(round_, str(int(round_) + 1)):
                return False
        return True

    @property
    def code(self) -> int:
        """Exit code of the script of this rank, which has come to its end."""
        return int(self._store.get(f"{_ROUND}/code/{self._rank}"))

    def _round(self) -> str:
        return self._store.compare_set(_ROUND, "", "0").decode()

    def _change(self, round_: str, new: str) -> bool:
        """Changes the round, unless it has changed; returns whether it is the new one."""
        return self._store.compare_set(_ROUND, round_, new).decode() == new
