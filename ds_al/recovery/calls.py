"""Joint calls with recovery: their results are written down, and a call in which a process dies is made again.

::

    made before by a process of this rank    its result, and what the call changes beside
    evaluate, eval_batch, predict            all ranks begin again if a process dies before the first one has the result
    others                                   a new process continues, from the meetings that are written down
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

from ds_al.checkpoint import snapshot
from ds_al.errors import ALTransportError
from ds_al.parallel.journal import Entry
from ds_al.parallel.meetings import Interrupted, Room

_EVALUATIONS = frozenset(("evaluate", "eval_batch", "predict", "scores", "predict_early"))
"""Calls that send tensors from stage to stage, and change nothing that is trained."""
_PATIENCE = 60.0  # seconds within which a keeper tells of the death that a neighbour has noticed
_DONE, _OVER = "done", "over"


class _Again:
    """An iterator that can begin again at its first item."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items = items
        self._taken: list[Any] = []
        self._next = 0

    def __iter__(self) -> _Again:
        return self

    def __next__(self) -> Any:
        if self._next == len(self._taken):
            self._taken.append(next(self._items))
        self._next += 1
        return self._taken[self._next - 1]

    @property
    def count(self) -> int:
        """Items that have been taken from the iterator."""
        return len(self._taken)

    def rewind(self) -> None:
        """Begins again."""
        self._next = 0


class JointCalls:
    """Makes the joint calls of one engine.

    Args:
        engine: the engine.
        room: where the ranks meet.
    """

    def __init__(self, engine: Any, room: Room) -> None:
        self._engine, self._room, self._journal = engine, room, room.journal

    def call(self, method: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Returns the result of a joint call, the one written down if there is one."""
        name = method.__name__
        inner = self._journal.skip_inner()
        entry = self._journal.take("call", name)
        if entry is not None:
            result = self._repeat(method, args, options, entry.value, inner)
        elif name in _EVALUATIONS:
            result = self._evaluate(method, args, options)
        else:
            with self._room.call(recorded=inner):
                result = method(*args, **options)
            self._write(name, result)
        self._room.leave()
        return result

    def _write(self, name: str, result: Any, **more: Any) -> None:
        self._journal.add("call", name, {"result": result, **more})
        self._journal.flush()

    def _repeat(
        self,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        options: dict[str, Any],
        written: dict[str, Any],
        inner: list[Entry],
    ) -> Any:
        """Does what a call changes beside its result."""
        engine, name = self._engine, method.__name__
        if name in _EVALUATIONS:
            engine.inference.passes = written["passes"]
            if written["taken"] and engine.is_first_stage():
                data = args[1] if len(args) > 1 else options["data_iter"]
                for _ in itertools.islice(data, written["taken"]):
                    pass
            if written["random"] is not None:
                snapshot.set_random_states(snapshot.checked_random_states(written["random"], {}))
        elif name == "load_checkpoint":
            with self._room.call(recorded=inner):
                return method(*args, **options)
        elif name == "save_checkpoint":
            engine.checkpoints.skip()
        elif name == "gather_losses":
            engine.forget_losses()
        return written["result"]

    def _evaluate(self, method: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        engine, room, data = self._engine, self._room, None
        passes, random = engine.inference.passes, snapshot.random_states()
        if method.__name__ == "eval_batch" and engine.is_first_stage():
            given = args[1] if len(args) > 1 else options["data_iter"]
            data = _Again(given)
            args, options = (args[0], data, *args[2:]), {k: v for k, v in options.items() if k != "data_iter"}
        while True:
            attempt = room.deaths()
            try:
                engine.links.renew(attempt)
                with room.call(attempt=attempt):
                    result = method(*args, **options)
                room.post(f"result/{attempt}", result)
                if room.post(f"decision/{attempt}", _DONE) == _DONE:
                    break
            except (Interrupted, ALTransportError) as error:
                if isinstance(error, ALTransportError) and not error.lost:
                    raise
                self._await_death(attempt, error)
                if room.post(f"decision/{attempt}", _OVER) == _DONE:
                    result = room.post(f"result/{attempt}", None)
                    break
            engine.inference.passes = passes
            if data is not None:
                data.rewind()
            else:
                snapshot.set_random_states(snapshot.checked_random_states(random, {}))
        after = snapshot.random_states() if engine.is_first_stage() else None
        self._write(
            method.__name__, result, passes=engine.inference.passes, taken=data.count if data else 0, random=after
        )
        return result

    def _await_death(self, attempt: int, error: Exception) -> None:
        limit = time.monotonic() + _PATIENCE
        while self._room.deaths() <= attempt:
            if time.monotonic() > limit:
                raise error
            time.sleep(0.02)
