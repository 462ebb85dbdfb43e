"""The long and large runs, short and small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ds_al.launch.ranks import RankFailure
from ds_al.studies.reliability import soak
from ds_al.studies.reliability.soak import CHECKS, Check, Watch

pytestmark = pytest.mark.distributed

SHORT = [
    Check("switches", "switch", 2, 1, (3,)),
    Check("batches", "batches", 2, 1, (1, 7)),
    Check("sleeps", "sleeps", 2, 1, (60,)),
    Check("a message", "message", 2, 1, (1 << 10,)),
]
LARGE = [check for check in CHECKS if check.worker in ("stages", "message")]


@pytest.mark.parametrize("check", SHORT, ids=[check.name for check in SHORT])
def test_a_short_form_of_every_check_ends_on_the_bits_of_the_loop(check: Check) -> None:
    row = soak.measured(check, seconds=60)
    assert (row["outcome"], row["failure"]) == ("ok", "")
    assert row["inputs"] == {"switch": 3, "batches": 8, "sleeps": 60, "message": 2}[check.worker]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "check", [each for each in CHECKS if each.worker in ("stages", "message")], ids=lambda c: c.name
)
def test_many_stages_and_a_large_message(check: Check) -> None:
    row = soak.measured(check, seconds=600)
    assert (row["outcome"], row["failure"]) == ("ok", "")


def test_other_bits_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = soak.in_sequence
    monkeypatch.setattr(soak, "in_sequence", lambda layers, count: loop(layers, count + 1))
    row = soak.measured(SHORT[3], seconds=60)
    assert row["outcome"] == "wrong" and "has other bits than in the loop" in row["failure"]


def test_descriptors_that_are_added_are_counted_and_named(tmp_path: Path) -> None:
    """A long run told of one, and not what it was."""
    watch = Watch()
    for _ in range(soak._SETTLED + 1):
        watch.look()
    assert (watch.use.descriptors, watch.use.added) == (0, "")
    with (tmp_path / "one").open("w"):
        watch.look()
        with (tmp_path / "two").open("w"):
            watch.look()
    watch.look()
    assert watch.use.descriptors == 2 and "/one" in watch.use.added and "/two" in watch.use.added


def test_a_descriptor_that_a_thread_has_open_for_a_moment_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of 200,000 micro-batches failed by /proc/<pid>/stat, by which a thread sees whether a process lives."""
    watch = Watch()
    for _ in range(soak._SETTLED + 1):
        watch.look()
    file = open("/proc/self/stat")  # noqa: SIM115
    monkeypatch.setattr(soak.time, "sleep", lambda seconds: file.close())
    watch.look()
    assert file.closed and (watch.use.descriptors, watch.use.added) == (0, "")


def test_a_failure_is_told_from_the_rank_that_failed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row of a run that failed once held the end of what the last rank printed, and not the cause."""

    def fails(*args: Any, **options: Any) -> None:
        raise RankFailure(
            "ranks exited with [1, 1]\n--- rank 1, exit code 1\nthe cause\n" + "x" * 9999, [], [1, 1], 2.0
        )

    monkeypatch.setattr(soak, "run_ranks", fails)
    row = soak.measured(SHORT[3], seconds=60)
    assert row["outcome"] == "wrong" and "the cause" in row["failure"] and len(row["failure"]) < 9999


def test_what_is_not_looked_at_is_not_told_as_zero() -> None:
    """A page of results gave 0 descriptors for checks that never look at their processes."""
    assert "descriptors" not in soak.measured(SHORT[3], seconds=60)
