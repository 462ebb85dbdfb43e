"""Agreement of all ranks before training: whatever is wrong on one of them is raised on all, with rank and host.

::

    rank r    step() ---> its facts, or its error ---> store ---> those of all ranks ---> the same error, or none
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import distributed
from torch.distributed import Store

from ds_al.errors import ALConfigError, ALError
from ds_al.parallel import meetings, presence, store
from ds_al.parallel.facts import Facts, differences
from ds_al.parallel.world import start_seconds

Value = TypeVar("Value")

_SLICE = 1.0  # seconds between two looks at what other ranks tell of their failures
_rounds = 0


class ALDisagreement(ALConfigError):
    """Not all ranks have the same error, or the same facts; raised on all of them."""


def agreed(
    topic: str,
    step: Callable[[], Value],
    *,
    facts: Callable[[Value], Facts] = lambda value: {},
    bounded: bool = True,
) -> Value:
    """Runs a step on every rank, and returns its value once it has succeeded on all of them. Every rank must call it.

    Args:
        topic: what the step is, for errors, such as ``"the config"``.
        step: runs on this rank alone, without messages to others.
        facts: what of its value has to be equal on all ranks; a rank without any takes no part.
        bounded: whether a rank waits :func:`~ds_al.parallel.world.start_seconds` for the others, and not as long as
            they live.

    Raises:
        ALDisagreement: on all ranks: the step failed on some, or a fact differs.
        Exception: what the step raised, where it raised the same on all ranks.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return step()
    try:
        value = step()
        own = _Outcome(facts={name: _json(fact) for name, fact in facts(value).items()})
    except Exception as error:
        text = str(error) if isinstance(error, ALError) else f"{type(error).__name__}: {error}"
        outcomes = _exchange(topic, _Outcome(error=text), bounded=bounded)
        if all(other.error == text for other in outcomes):
            raise
        raise ALDisagreement(_errors(topic, outcomes)) from error
    outcomes = _exchange(topic, own, bounded=bounded)
    if any(outcome.error for outcome in outcomes):
        raise ALDisagreement(_errors(topic, outcomes))
    if found := differences([(outcome.who, outcome.facts) for outcome in outcomes]):
        raise ALDisagreement(f"{topic} is not the same on all ranks: {'; '.join(found)}")
    return value


def flat(config: Any, name: str = "") -> dict[str, Any]:
    """Returns the values of a config by their path, such as ``optimizer.params.lr``."""
    if not isinstance(config, Mapping) or not config:
        return {name: config}
    return {
        path: value
        for key, inner in config.items()
        for path, value in flat(inner, f"{name}.{key}" if name else str(key)).items()
    }


class _Outcome:
    """What a rank contributes: its facts or its error, and which it is."""

    def __init__(self, *, facts: Facts | None = None, error: str = "", who: str | None = None) -> None:
        self.facts, self.error = facts or {}, error
        self.who = who or f"{distributed.get_rank()} ({socket.gethostname()})"


def _exchange(topic: str, own: _Outcome, *, bounded: bool) -> list[_Outcome]:
    """Returns the outcomes of all ranks, in their order.

    Raises:
        ALConfigError: a rank has not come.
    """
    global _rounds
    _rounds += 1
    rank, world = distributed.get_rank(), distributed.get_world_size()
    room = store.connect_group(f"agree/{_rounds}", seconds=start_seconds())
    if room is None:
        return [_Outcome(**outcome) for outcome in meetings.gather(vars(own))]
    room.set(str(rank), json.dumps(vars(own)))
    keys = [str(other) for other in range(world)]
    _await(topic, room, keys, seconds=start_seconds() if bounded else None)
    return [_Outcome(**json.loads(text)) for text in room.multi_get(keys)]


def _await(topic: str, room: Store, keys: list[str], *, seconds: float | None) -> None:
    """Waits until all ranks have contributed."""
    here, start = presence.here(), time.monotonic()
    while not _come(room, keys):
        missing = [int(key) for key in keys if not _has(room, key)]
        names = ", ".join(here.name(rank) for rank in missing)
        told = [here.records[rank] for rank in missing if rank in here.records]
        if any(record.failed or record.ended for record in told):
            raise ALDisagreement(f"{topic}: {here.cause()}")
        if seconds is not None and time.monotonic() - start > seconds:
            raise ALDisagreement(
                f"{topic}: {names} has not come within {seconds:.0f} s, "
                f"{', '.join(here.name(int(key)) for key in keys if int(key) not in missing)} came: run the same "
                "script on all ranks, or wait longer (DS_AL_START_SECONDS)"
            )


def _come(room: Store, keys: list[str]) -> bool:
    """Whether all keys come within a moment."""
    try:
        return store.await_keys(room, keys, seconds=_SLICE)
    except RuntimeError:  # rank 0 has ended
        time.sleep(_SLICE)
        return False


def _has(room: Store, key: str) -> bool:
    try:
        return room.check([key])
    except RuntimeError:  # rank 0 has ended
        return False


def _errors(topic: str, outcomes: list[_Outcome]) -> str:
    """One text of the errors of all ranks, each with the ranks that have it."""
    ranks: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.error:
            ranks.setdefault(outcome.error, []).append(outcome.who)
    return "; ".join(f"{topic}, rank {', '.join(names)}: {error}" for error, names in ranks.items())


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def is_first_here() -> bool:
    """Whether this is the first rank of its host, which prints what concerns all ranks alike."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"
