"""A run that goes on in its folder, `--resume auto`, and in which a process dies before or after newer checkpoints."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from ds_al.parallel import worker
from tests.experiment.test_limits import CONFIG
from tests.recovery.test_recovery import await_end
from tests.support.engines import State, different, engine_state, merge
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed
FIRST, ALL, EVERY = 45, 75, 16  # batches of the first run, an epoch, and of both; micro-batches between two saves


def trained(folder: str, *, batches: int, recovery: dict[str, Any] | None, dies: int | None) -> State:
    """Worker: trains until this batch in the latest run of the folder; the first process of rank 1 dies before one."""
    from ds_al.experiment.job import Job

    experiment = {**CONFIG["experiment"], "name": "run", "output": folder, "test": False}
    experiment |= {"max_batches": batches, "checkpoint_batches": 5}
    al = {"method": "streaming", **({"recovery": recovery} if recovery else {})}
    job = Job({**CONFIG, "associated_learning": al, "experiment": experiment}, resume="auto")
    if worker.IS_WORKER:
        with Path(folder, f"processes_{os.environ['RANK']}").open("a") as file:
            file.write(f"{os.getpid()}\n")
    dead = Path(folder, "dead")
    train_batch = job.engine.train_batch

    def until(*args: Any) -> Any:
        batch = job.engine.global_samples // job.sizes.samples + 1
        if batch == dies and os.environ["RANK"] == "1" and not dead.exists():
            dead.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return train_batch(*args)

    job.engine.train_batch = until
    job.run()
    return engine_state(job.engine)


def run(folder: Path, *, recovery: dict[str, Any] | None = None, dies: int | None = None) -> State:
    """Trains the first batches, and then the others in the same folder; returns the state of all ranks."""
    folder.mkdir()
    shared: dict[str, Any] = {"folder": str(folder), "timeout": 200}
    run_ranks(f"{__name__}:trained", 2, **shared, batches=FIRST, recovery=None, dies=None)
    return merge(
        run_ranks(f"{__name__}:trained", 2, **shared, within=[("env",)] * 2, batches=ALL, recovery=recovery, dies=dies)
    )


@pytest.mark.slow
@pytest.mark.parametrize("dies", [FIRST + 2, ALL - 2])
def test_nothing_differs_though_there_are_newer_checkpoints(dies: int, tmp_path: Path) -> None:
    """The new process loads what the run has gone on from, and not what it would find now."""
    expected = run(tmp_path / "expected")
    recovery = {"folder": str(tmp_path / "recovery"), "every": EVERY}
    folder = tmp_path / "died"
    assert not different(run(folder, recovery=recovery, dies=dies), expected)
    assert (folder / "dead").exists()
    kept = {path.name for path in folder.glob("run/*/checkpoints/*")}
    assert {"epoch_1", "epoch_2"} < kept and "batch_50" not in kept  # more than two were written since
    (metrics,) = folder.glob("run/*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["batch"] for row in rows if row["kind"] == "batch"] == list(range(1, ALL + 1))
    counted = [(folder / f"processes_{rank}").read_text().split() for rank in range(2)]
    assert [len(each) for each in counted] == [1, 2]
    await_end([int(process) for each in counted for process in each])
