"""Calls of an engine: where each rank stands among them, and what other ranks tell where one of them fails.

All ranks make the same calls in the same order, batches and joint calls such as ``evaluate``. Stages need not be at the
same place of it: while no rank has left the order, a stage may be batches behind.

::

    rank 0    batch  batch  evaluate                waits for rank 1
    rank 1    batch  batch  batch                   waits for rank 0: it has begun a third batch without evaluate
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, ParamSpec, TypeVar

from ds_al.errors import ALError, ALLayerError, ALTransportError
from ds_al.parallel import presence
from ds_al.parallel.lost import is_loss

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Position(NamedTuple):
    """Place of a rank in the order of calls.

    Attributes:
        batches: number of batches that it has begun.
        joint: number of joint calls that it has begun.
        at: number of batches that it had begun at the latest of these.
        name: name of the latest one.
    """

    batches: int = 0
    joint: int = 0
    at: int = 0
    name: str = ""


def out_of_order(positions: Mapping[int, Position]) -> str:
    """Describes how ranks have left the common order of calls; empty while they have not.

    Args:
        positions: by rank.
    """
    for one, p in positions.items():
        for other, q in positions.items():
            if p.joint > q.joint and q.batches > p.at:
                return (
                    f"rank {one} called {p.name}() after {p.at} batches, and rank {other} has begun batch {q.batches} "
                    f"without it: every rank has to call {p.name}(), after the same batch"
                )
            if p.joint == q.joint and (p.name, p.at) != (q.name, q.at):
                return (
                    f"rank {one} called {p.name}() after {p.at} batches, and rank {other} called {q.name}() after "
                    f"{q.at}: every rank has to make the same calls, in the same order"
                )
    return ""


class Calls:
    """Counts the calls of one engine, and tells the other ranks of those that fail.

    Attributes:
        position: place of this rank; replaced as a whole, since another thread reads it.
        current: name of the call that runs; ``None`` outside of all.
    """

    def __init__(self) -> None:
        self.position = Position()
        self.current: str | None = None
        self.joint: Callable[..., Any] | None = None
        """Makes the joint calls ``(method, args, options)``, where a process may take another one's place."""

    @contextmanager
    def counted(self, name: str, *, joint: bool) -> Iterator[None]:
        """Counts what runs inside as a call, unless it is a part of another one.

        Raises:
            ALTransportError: another rank is gone; the message has what it told of its failure.
            ALLayerError: ``sys.exit()`` was called inside, which would end this rank as if it were done.
        """
        if self.current is not None:
            yield
            return
        self.current, p = name, self.position
        self.position = (
            Position(p.batches, p.joint + 1, p.batches, name) if joint else p._replace(batches=p.batches + 1)
        )
        here = presence.here()
        try:
            yield
        except SystemExit as error:
            wrong = ALLayerError(f"rank {here.rank}: sys.exit({error.code!r}) was called inside {name}()")
            here.fail(wrong)
            raise wrong from error
        except (ALError, RuntimeError) as error:
            if here.world > 1 and is_loss(error):
                lost = ALTransportError(f"{name}() lost another rank: {here.cause()} ({error})")
                here.fail(lost, lost=True)
                raise lost from error
            here.fail(error)
            raise
        except BaseException as error:
            here.fail(error)
            raise
        finally:
            self.current = None
        here.recover()


def _calls(joint: bool) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    def decorate(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(method)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            engine: Any = args[0]
            calls: Calls = engine.calls
            through = calls.joint if joint and calls.current is None else None
            with calls.counted(method.__name__, joint=joint):
                return method(*args, **kwargs) if through is None else through(method, args, kwargs)

        return call

    return decorate


joint_call = _calls(joint=True)
"""Decorates a method of an object with ``calls``: every rank has to call it, after the same batch."""
batch_call = _calls(joint=False)
"""Decorates the method that trains a batch."""
