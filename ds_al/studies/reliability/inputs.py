"""Runs the tables of ``tests/robustness``, and tells a row for each of them."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from typing import Any

from ds_al.studies.checks import cause
from ds_al.studies.parts import ROOT, tell_row
from ds_al.studies.results import StudyError


def run(*, seconds: float, workers: int) -> None:
    """Part of the study: tells rows ``table, inputs, skipped, outcome, failure``.

    Args:
        seconds: time limit.
        workers: number of processes that run tests side by side.

    Raises:
        StudyError: pytest found no test, or broke off.
    """
    import pytest  # a tool, which the package itself does not need

    os.chdir(ROOT)  # this process is the part's own
    counts = _Counts()
    options = ["-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", f"--timeout={seconds:.0f}", "-q"]
    options += ["-n", str(workers), "--dist", "loadfile"] if workers > 1 else []
    code = pytest.main([*options, "tests/robustness"], plugins=[counts])
    for table, outcomes in counts.tables.items():
        failures = counts.failures[table]
        tell_row(
            {
                "table": table,
                "inputs": outcomes["passed"] + outcomes["failed"],
                "skipped": outcomes["skipped"],
                "outcome": "wrong" if failures else "ok",
                "failure": "\n".join(failures),
            }
        )
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise StudyError(f"pytest tests/robustness: ended with {code!r}")


class _Counts:
    """Plugin of pytest that counts the outcomes of each file."""

    def __init__(self) -> None:
        self.tables: dict[str, Counter[str]] = defaultdict(Counter)
        self.failures: dict[str, list[str]] = defaultdict(list)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Receives the reports of a test's set-up, call and tear-down; set-up and tear-down count if they fail."""
        if report.when != "call" and report.passed:
            return
        table = report.nodeid.partition("::")[0].rpartition("/")[2].removesuffix(".py")
        self.tables[table][report.outcome] += 1
        if report.failed:
            self.failures[table].append(f"{report.nodeid.partition('::')[2]}: {cause(str(report.longrepr))}")
