"""The rows of ``tests/robustness``: a :class:`Kind` of input and what happens with it, a :class:`Case` of a table, and
the check that every refusal passes: our own error, its words, in time, nothing changed on disk."""

from __future__ import annotations

import hashlib
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

import pytest

from ds_al.errors import ALError

Outcome = Literal["honoured", "refused", "left"]
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of input or fault.

    Attributes:
        section: section of docs/robustness.md, such as ``"Users' blocks"``.
        name: the kind, such as ``"a block that works in place"``.
        outcome: ``honoured``, ``refused`` (an error that names it), or ``left`` (neither yet).
        what: what happens, in one sentence.
        tests: ids of tests that would fail if it did not, ``tests/file.py::test_name``.
    """

    section: str
    name: str
    outcome: Outcome
    what: str
    tests: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input of a table.

    Attributes:
        name: what is passed, in words; the test's id.
        given: what the table's test passes on; its form is the table's own.
        message: regular expression that the error's text has to match, or ``None`` where the input is honoured.
    """

    name: str
    given: Any
    message: str | None

    @property
    def outcome(self) -> Outcome:
        return "honoured" if self.message is None else "refused"


def by_name(cases: list[Case]) -> pytest.MarkDecorator:
    """Parametrizes a test's argument ``case``."""
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def meet(case: Case, action: Callable[[], Result], *, folder: Path | None = None, seconds: float = 60) -> Result | None:
    """Runs what a case passes, and checks that what is promised happens.

    Args:
        folder: folder of the user's files, which a refusal leaves as they are.
        seconds: limit, after which the case counts as a hang.

    Returns:
        The result of ``action``, or ``None`` where the case is refused, as it has to be.
    """
    before = contents(folder) if folder else {}
    with within(seconds):
        if case.message is None:
            return action()
        with pytest.raises(ALError) as caught:
            action()
    assert re.search(case.message, str(caught.value)), f"{case.name}: got the message {caught.value}"
    if folder:
        assert contents(folder) == before, f"{case.name}: files changed"
    return None


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails the test where the block takes longer."""

    def late(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"took longer than {seconds} s")

    former = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def contents(folder: Path) -> dict[str, str]:
    """Hash of each file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
