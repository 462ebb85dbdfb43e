"""A signal stops a run on all ranks after one batch, with a checkpoint from which it goes on bit for bit."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_al.errors import ALConfigError, ALLayerError
from ds_al.experiment import process
from ds_al.experiment.budget import Budget
from ds_al.experiment.forms import KEEP
from ds_al.experiment.run_folder import check_probe, probed_folder
from ds_al.experiment.stopping import Stopped
from tests.experiment.test_limits import CONFIG
from tests.optim.test_non_finite import spike
from tests.support.engines import State, different, engine_state, merge
from tests.support.ranks import run_ranks

BATCHES = 60
"""Of 45 in an epoch."""
BATCH = CONFIG["train_micro_batch_size_per_gpu"] * CONFIG["gradient_accumulation_steps"]


def job(method: str, folder: str, name: str, *, al: Mapping[str, Any] | None = None, **options: Any) -> Any:
    from ds_al.experiment.job import Job

    experiment = {**CONFIG["experiment"], "name": name, "max_batches": BATCHES, "output": folder, "test": False}
    return Job({**CONFIG, "associated_learning": {"method": method, **(al or {})}, "experiment": experiment}, **options)


def interrupted(*, method: str, folder: str) -> tuple[State, list[Any]]:
    """Worker: the state of a whole run, and the end of one that rank 1 is asked to stop in its fifth batch."""
    whole = job(method, folder, "whole")
    whole.run()
    stopped = job(method, folder, "stopped")
    batches, train_batch = 0, stopped.engine.train_batch

    def counted(*args: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == 5 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        if batches > 5:
            time.sleep(0.05)  # the run lasts longer than it takes to tell the other ranks
        return train_batch(*args)

    stopped.engine.train_batch = counted
    with pytest.raises(Stopped) as caught:
        stopped.run()
    return state(whole, method), [caught.value.code, str(caught.value), batches]


def resumed(*, method: str, folder: str, checkpoints: str) -> tuple[State, list[dict[str, Any]]]:
    """Worker: the state of a run that goes on from a checkpoint, and its rows; its batches take a second each."""
    from ds_al.experiment import job as module

    after = job(method, folder, "resumed", resume=checkpoints)
    clock = SimpleNamespace(perf_counter=lambda: after.engine.global_samples / after.sizes.samples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "time", clock)
        after.run()
    rows = (after.info.folder / "metrics.jsonl").read_text().splitlines()
    return state(after, method), [json.loads(row) for row in rows]


def diverged(folder: str) -> tuple[str, int, list[dict[str, Any]]]:
    """Worker: the error of a run in which a number is infinite, the batch, and the rows of the run that goes on."""
    al = {"non_finite": "save_and_stop"}
    first = job("streaming", folder, "run", al=al)
    spike(first.engine.layers[0][1].f, "output", (23,))
    with pytest.raises(ALLayerError) as error:
        first.run()
    batch = first.engine.global_samples // first.sizes.samples
    second = job("streaming", folder, "run", al=al, resume="auto")
    second.run()
    rows = (second.info.folder / "metrics.jsonl").read_text().splitlines()
    return str(error.value), batch, [json.loads(row) for row in rows]


@pytest.mark.distributed
def test_a_number_that_is_not_finite_stops_a_run_which_goes_on_in_its_folder(tmp_path: Path) -> None:
    (told, batch, rows), (other, *_) = run_ranks(f"{__name__}:diverged", 2, folder=str(tmp_path))
    assert told == other and f"all ranks stop after batch {batch}," in told
    (checkpoints,) = tmp_path.glob("run/*/checkpoints")
    assert f"{str(checkpoints / f'batch_{batch}')!r}" in told
    assert [row["batch"] for row in rows if row["kind"] == "batch"] == list(range(1, BATCHES + 1))
    # What an interrupted epoch took before was once left out, so max_seconds ended such a run later.
    first, *_ = (row for row in rows if row["kind"] == "epoch")
    afterwards = (45 - batch) * BATCH / first["samples_per_second"]
    assert first["seconds"] - afterwards > 1e-3


def state(job: Any, method: str) -> State:
    if method == "streaming":
        return engine_state(job.engine)
    return {f"{job.layout.stage}.{name}": value for name, value in job.engine.module.state_dict().items()}


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["streaming", pytest.param("bp_1f1b", marks=pytest.mark.slow)])
def test_a_signal_on_one_rank_stops_all_after_the_same_batch_and_the_run_goes_on_from_there(
    method: str, tmp_path: Path
) -> None:
    whole, ends = zip(*run_ranks(f"{__name__}:interrupted", 2, method=method, folder=str(tmp_path)), strict=True)
    assert ends[0] == ends[1]
    code, text, batches = ends[0]
    (checkpoints,) = tmp_path.glob("stopped/*/checkpoints")
    assert code == 143
    assert text == f"stopped by SIGTERM after batch {batches}: continue with --resume {checkpoints}"
    assert 5 < batches < BATCHES and (checkpoints / "latest").read_text() == f"batch_{batches}"
    assert len(list(checkpoints.glob("[be]*_*"))) <= KEEP
    options = {"method": method, "folder": str(tmp_path), "checkpoints": str(checkpoints)}
    after, rows = zip(*run_ranks(f"{__name__}:resumed", 2, **options), strict=True)
    assert different(merge(list(whole)), merge(list(after))) == []
    # The first row counted the batches since the last one, of which the stopped run had trained some.
    assert {row["samples_per_second"] for row in rows[0] if row["kind"] == "log"} == {BATCH}
    if method == "streaming":
        assert [row["batch"] for row in rows[0] if row["kind"] == "batch"] == list(range(1, BATCHES + 1))


def test_a_resumed_run_knows_where_it_is_in_its_epoch() -> None:
    budget = Budget(45, 3, max_batches=100)
    assert [budget.position(n) for n in (0, 44, 45, 60, 90, 99, 100)] == [
        (0, 0), (0, 44), (1, 0), (1, 15), (2, 0), (2, 9), (3, 0)
    ]  # fmt: skip
    assert Budget(45, 3).position(135) == (3, 0)


def test_a_rank_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    folder, text = probed_folder(tmp_path / "runs/name")
    check_probe(folder, text)
    for where, content in ((tmp_path / "other", text), (folder, "of another host's folder of the same name")):
        with pytest.raises(ALConfigError, match=r"this host does not see .* a folder that all hosts share"):
            check_probe(where, content, seconds=0.1)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ALConfigError, match=r"cannot write to .*Not a directory.*--output"):
        probed_folder(tmp_path / "file" / "name")


def test_mpi_is_ended_where_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """``mpirun`` reports a process that leaves without it as failed."""
    calls: list[str] = []

    class MPI:
        Is_initialized = staticmethod(lambda: True)
        Is_finalized = staticmethod(lambda: bool(calls))
        Finalize = staticmethod(lambda: calls.append("finalized"))

    monkeypatch.setitem(sys.modules, "mpi4py.MPI", MPI)
    process._finalize_mpi()
    process._finalize_mpi()
    assert calls == ["finalized"]
