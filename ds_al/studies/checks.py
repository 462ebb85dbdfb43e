"""Runs tests with pytest in the process of a part, and tells one row per test."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from ds_al.studies.parts import ROOT, tell_row
from ds_al.studies.results import StudyError

_TAIL = 1500  # characters kept of a failure
_ERROR = re.compile(r"^\S*(?:Error|Exception|Failure): .*", re.MULTILINE)
_NCCL = re.compile(r"^Last error:\s*(.+)", re.MULTILINE)


def marked(mark: str = "cuda") -> list[str]:
    """Returns the test files that use a mark, relative to the root; only these have to be imported."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [file.relative_to(ROOT).as_posix() for file in files if f"mark.{mark}" in file.read_text()]


def run(*, seconds: float, arguments: Sequence[str], workers: int) -> None:
    """Runs pytest, and tells rows ``test, outcome, seconds, reason``.

    Args:
        seconds: time limit; each test has it, too.
        arguments: of pytest; paths are relative to the root.
        workers: number of processes that run tests side by side.

    Raises:
        StudyError: pytest found no test, or broke off.
    """
    import pytest  # a tool, which the package itself does not need

    os.chdir(ROOT)  # this process is the part's own
    options = ["-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", f"--timeout={seconds:.0f}"]
    options += ["-n", str(workers)] if workers > 1 else []
    code = pytest.main([*options, *arguments], plugins=[_Rows()])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise StudyError(f"pytest {' '.join(arguments)}: ended with {code!r}")


class _Rows:
    """Plugin of pytest that tells a row for each test."""

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Receives the reports of a test's set-up, call and tear-down; set-up and tear-down count if they fail."""
        if report.when != "call" and report.passed:
            return
        tell_row(
            {
                "test": report.nodeid.removeprefix("tests/"),
                "outcome": report.outcome,
                "seconds": report.duration,
                "reason": _reason(report),
            }
        )


def _reason(report: Any) -> str:
    """Returns why a test was skipped or has failed, else an empty text."""
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):  # file, line and reason of a skip
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr if crash is None else crash.message)
    return f"{cause(text)}\n{text[-_TAIL:]}"


def cause(text: str) -> str:
    """Returns the line that names the error of a test; of ranks the first error of the rank that failed first.

    Where NCCL has said more, as that it found two ranks on one GPU, this is part of the line.
    """
    lines = text.partition("--- rank")[2] or text
    found, more = _ERROR.search(lines), _NCCL.search(lines)
    line = text.splitlines()[0] if found is None else found.group()
    return line if more is None else f"{line}: {more.group(1)}"
