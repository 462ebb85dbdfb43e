"""Processes die at chosen places of a run, and nothing differs from a run in which none does."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_al.parallel.launchers import parent_of
from ds_al.recovery import events
from tests.recovery.script import Death, Result, run
from tests.support.engines import different, merge
from tests.support.ranks import RankFailure, run_ranks

pytestmark = pytest.mark.distributed
EVERY = 8  # micro-batches, 2 batches


def ranks(world: int, folder: Path, deaths: list[Death], **options: Any) -> list[Result]:
    """Runs the script with recovery; the keepers' commands can be started again, unlike those of a fork."""
    recovery = {"folder": str(folder / "recovery"), "every": EVERY, "max_restarts": 8, **options.pop("recovery", {})}
    return run_ranks(
        f"{run.__module__}:run",
        world,
        timeout=280,
        within=[("env",)] * world,
        folder=str(folder),
        deaths=deaths,
        recovery=recovery,
        **options,
    )


def undisturbed(world: int, folder: Path, **options: Any) -> list[Result]:
    return run_ranks(f"{run.__module__}:run", world, folder=str(folder), deaths=[], **options)


def check(results: list[Result], expected: list[Result], folder: Path, deaths: list[Death]) -> None:
    """Compares everything with the undisturbed run, and looks for what is left behind."""
    assert not different(merge([each.state for each in results]), merge([each.state for each in expected]))
    for own, other in zip(results, expected, strict=True):
        assert own.losses == other.losses
        assert torch.equal(own.all_losses, other.all_losses)
        assert own.evaluated == other.evaluated
        assert own.drawn == other.drawn
    for rank in range(len(results)):
        processes = (folder / f"processes_{rank}").read_text().split()
        assert len(processes) == 1 + sum(death.rank == rank for death in deaths)  # those of neighbours go on
        await_end([int(process) for process in processes])
    told = [event for event in events.read(folder / "recovery") if event["event"] == "death"]
    assert len(told) == len(deaths)


def await_end(processes: Iterable[int]) -> None:
    """Waits until these processes have ended, as they do with their keepers."""
    limit = time.monotonic() + 10
    while left := [process for process in processes if parent_of(process) is not None]:
        assert time.monotonic() < limit, f"left behind: {left}"
        time.sleep(0.1)


MANY = [
    Death(0, 0, "evaluate", 2),  # the first stage, and the last one, which waits for it
    Death(2, 0, "evaluate", 2),
    Death(1, 0, "forward", 21),  # in the middle
    Death(1, 1, "forward", 20),  # while it trains again
    Death(2, 1, "end", 0),  # after its last batch
]


@pytest.mark.parametrize(
    "deaths", [MANY[2:4], pytest.param(MANY, marks=pytest.mark.slow)], ids=["two deaths", "five deaths"]
)
def test_nothing_differs_where_processes_die(deaths: list[Death], tmp_path: Path) -> None:
    """Standbys take their places, and new processes where a standby is not there yet."""
    expected = undisturbed(3, tmp_path / "undisturbed")
    check(ranks(3, tmp_path, deaths, recovery={"standby": True}), expected, tmp_path, deaths)


CASES: dict[str, list[Death]] = {
    "none": [],
    "in a save": [Death(1, 0, "save", 4), Death(0, 0, "between", 6)],
    "the first rank in a save": [Death(0, 0, "save", 4)],
    "in evaluation, everywhere": [Death(0, 0, "evaluate", 2), Death(1, 0, "evaluate", 2), Death(2, 0, "evaluate", 6)],
    "twice in one evaluation": [Death(1, 0, "evaluate", 2), Death(1, 1, "evaluate", 2)],
    "two at once, not adjacent": [Death(0, 0, "forward", 18), Death(2, 0, "forward", 18)],
    "between batches": [Death(rank, 0, "between", 3 + rank) for rank in range(3)],
    "at the end": [Death(0, 0, "end", 1), Death(1, 0, "end", 1), Death(2, 0, "end", 1)],
    "segmentation fault": [Death(1, 0, "forward", 9, "SIGSEGV"), Death(2, 0, "forward", 9, "SIGABRT")],
}


@pytest.mark.slow
@pytest.mark.parametrize("deaths", CASES.values(), ids=CASES.keys())
def test_nothing_differs(deaths: list[Death], tmp_path: Path) -> None:
    expected = undisturbed(3, tmp_path / "undisturbed")
    check(ranks(3, tmp_path, deaths), expected, tmp_path, deaths)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_stages(world: int, tmp_path: Path) -> None:
    deaths = [Death(rank, 0, "forward", 9 + 7 * rank) for rank in range(world)]
    expected = undisturbed(world, tmp_path / "undisturbed")
    check(ranks(world, tmp_path, deaths), expected, tmp_path, deaths)


@pytest.mark.slow
def test_more_deaths_than_allowed_end_the_job(tmp_path: Path) -> None:
    deaths = [Death(1, 0, "forward", 2), Death(1, 1, "forward", 5)]
    with pytest.raises(RankFailure, match=r"ended by SIGKILL, and 1 have been replaced already") as failure:
        ranks(2, tmp_path, deaths, recovery={"max_restarts": 1})
    assert failure.value.seconds < 120
    assert all(code for code in failure.value.codes)


@pytest.mark.slow
def test_an_exception_ends_the_job_with_its_cause(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="this layer fails") as failure:
        ranks(2, tmp_path, [Death(1, 0, "forward", 5, "raise")])
    assert all(code for code in failure.value.codes)
    assert len((tmp_path / "processes_1").read_text().split()) == 1


@pytest.mark.slow
def test_a_keeper_that_dies_ends_the_job(tmp_path: Path) -> None:
    """Its worker ends with it, and the others learn why, though no launcher tells them."""
    with pytest.raises(RankFailure, match=r"the keeper of rank 1 \(.*\) has gone") as failure:
        ranks(2, tmp_path, [Death(1, 0, "forward", 5, "keeper")])
    assert failure.value.seconds < 120
    assert all(code for code in failure.value.codes)
    for rank in range(2):
        await_end([int(process) for process in (tmp_path / f"processes_{rank}").read_text().split()])


@pytest.mark.slow
def test_a_stopped_process_is_replaced(tmp_path: Path) -> None:
    deaths = [Death(1, 0, "forward", 5, "SIGSTOP")]
    expected = undisturbed(2, tmp_path / "undisturbed")
    check(ranks(2, tmp_path, deaths), expected, tmp_path, deaths)
