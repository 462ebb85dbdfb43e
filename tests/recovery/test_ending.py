"""Ranks come to their end while they die: operations on the store happen one at a time, in a drawn order, and a process
may die before each of them."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest
from torch.distributed import HashStore

from ds_al.recovery import ending
from ds_al.recovery.ending import Ending, exit_code

WORLD = 3


class Killed(BaseException):
    """Ends a process of the model."""


class Process:
    """A thread whose operations on the store wait for their turn.

    Args:
        rank: of the process.
        store: of all.
        run: what it does.
        turns: where it tells that it waits, or has ended.
    """

    def __init__(self, rank: int, store: Any, run: Callable[[Ending], Any], turns: SimpleQueue[Process]) -> None:
        self.rank, self.is_dead, self.has_ended, self.result = rank, False, False, None
        self._store, self._run, self._turns, self._turn = store, run, turns, threading.Semaphore(0)
        threading.Thread(target=self._live, daemon=True).start()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def operation(*args: Any) -> Any:
            self._turns.put(self)
            self._turn.acquire()
            if self.is_dead:
                raise Killed
            return getattr(self._store, name)(*args)

        return operation

    def go_on(self) -> None:
        self._turn.release()

    def _live(self) -> None:
        with contextlib.suppress(Killed):
            self.result = self._run(Ending(self.rank, WORLD, store=self))
        self.has_ended = True
        self._turns.put(self)


def leave(own: Ending) -> str:
    own.leave(0, while_waiting=lambda: None)
    return "left"


@pytest.mark.parametrize("seed", range(60))
def test_either_all_ranks_leave_or_none(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "_POLL", 0.0)
    draw, store, turns, deaths = random.Random(seed), HashStore(), SimpleQueue[Process](), 0
    running = [Process(rank, store, leave, turns) for rank in range(WORLD)]
    done, left = set[int](), set[int]()
    waiting: list[Process] = []
    for _ in range(2000):
        while len(waiting) < len(running):
            waiting.append(turns.get())
        for process in [each for each in waiting if each.has_ended]:
            waiting.remove(process)
            running.remove(process)
            if process.result == "left":
                left.add(process.rank)
                done.add(process.rank)
            elif process.is_dead:  # its keeper notices
                running.append(Process(process.rank, store, Ending.is_over, turns))
            elif process.result:
                done.add(process.rank)
            else:  # it is replaced, and needs the others
                assert not left
                running.append(Process(process.rank, store, leave, turns))
        if len(waiting) < len(running):
            continue
        if not running:
            break
        process = waiting.pop(draw.randrange(len(waiting)))
        if deaths < 6 and process._run is leave and draw.random() < 0.1:
            process.is_dead, deaths = True, deaths + 1
        process.go_on()
    assert done == set(range(WORLD))


@pytest.mark.parametrize(("status", "code"), [((), 0), ((None,), 0), ((3,), 3), (("a reason",), 1)])
def test_the_code_of_exit_is_known_before_the_interpreter_ends(
    status: tuple[Any, ...], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "exit", sys.exit)
    told = exit_code()
    with pytest.raises(SystemExit) as raised:
        sys.exit(*status)
    assert told() == code and raised.value.code == (status[0] if status else None)


def test_a_keeper_knows_the_code_of_a_script_that_has_ended() -> None:
    store = HashStore()
    ends = [Ending(rank, 2, store=store) for rank in range(2)]
    assert not ends[0].is_over()
    wait = {"while_waiting": lambda: None}
    threads = [threading.Thread(target=end.leave, args=(3 * k,), kwargs=wait) for k, end in enumerate(ends)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends[0].is_over() and [end.code for end in ends] == [0, 3]
