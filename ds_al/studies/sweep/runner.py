"""Executes the runs of a sweep, several at a time, and saves each result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ds_al.experiment.config import override
from ds_al.launch.ranks import RankFailure, free_port, run_ranks
from ds_al.studies.runs import Result, RunFile
from ds_al.studies.sweep.spec import Run

_TAIL = 2000  # number of characters saved of a failed run's output


class _Failure(Exception):
    """Raised when a run fails; the message describes the failure."""


def execute(
    runs: Sequence[Run],
    *,
    file: RunFile,
    script: Path | None,
    data: Path | None,
    jobs: int,
    timeout: float,
    done: Callable[[Run, dict[str, Any]], None],
    starts: Callable[[Run], bool] = lambda run: True,
) -> None:
    """Executes each run that has no result yet.

    The result of a run is its summary and the metrics of its epochs, or its failure. Failed runs are repeated the next
    time.

    Args:
        runs: runs to execute.
        file: file of results; runs write their own files to its scratch folder.
        script: ``run/train.py``, which DeepSpeed's launcher starts for each run; ``None`` trains in forks of one
            process on the CPU (:func:`ds_al.launch.ranks.start_quickly`), which avoids the start-up of each run.
        data: root folder of the sweep's relative data paths.
        jobs: number of concurrent runs.
        timeout: seconds before a run is terminated and counts as failed.
        done: called with each run and its result when it ends.
        starts: called with each run when its turn has come; where it returns false, the run is left for another time.
    """
    file.scratch.mkdir(parents=True, exist_ok=True)
    lock = threading.Lock()
    found = file.read()

    def work(run: Run) -> tuple[Run, dict[str, Any]] | None:
        if not starts(run):
            return None
        with lock:
            port = free_port()
        result = _run(run, file=file, script=script, data=data, port=port, timeout=timeout)
        file.keep(run.key, result)
        return run, result

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed([pool.submit(work, run) for run in runs if not is_done(run, found)]):
                if (ended := future.result()) is not None:
                    done(*ended)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def is_done(run: Run, found: Mapping[str, Result]) -> bool:
    """Returns whether a run has a successful result among those of :meth:`RunFile.read`."""
    return "failure" not in found.get(run.key, {"failure": "not run"})


def result_of(run: Run, found: Mapping[str, Result]) -> Result | None:
    """Returns a run's result with the run's current names, or ``None``."""
    return {**found[run.key], **_about(run)} if run.key in found else None


def train_on_rank(config: dict[str, Any]) -> str:
    """Trains one rank of a run in a fork, and returns the run's folder."""
    from ds_al.experiment.job import Job

    job = Job(config)
    folder: str = job.run()["folder"]
    job.close()
    return folder


def _run(
    run: Run, *, file: RunFile, script: Path | None, data: Path | None, port: int, timeout: float
) -> dict[str, Any]:
    assignments = {"experiment.checkpoint_every": 0, "experiment.output": str(file.scratch / "runs")}
    path = run.config["experiment"]["data"].get("path")
    if path is not None and data is not None:
        assignments["experiment.data.path"] = str(data / path)  # an absolute path is unchanged
    config = override(_in_group(run, file.name), [f"{k}={json.dumps(v)}" for k, v in assignments.items()])
    try:
        if script is None:
            folder = _fork(config, stages=run.stages, timeout=timeout)
        else:
            scratch = file.scratch / run.key
            folder = _launch(config, scratch, script=script, stages=run.stages, port=port, timeout=timeout)
        content = json.loads((folder / "summary.json").read_text())
        content["data"].pop("path", None)  # paths of this machine are not part of a result
        result = {key: value for key, value in content.items() if key not in ("folder", "command")}
        return {**result, **_about(run), "history": history_of(folder)}
    except _Failure as failure:
        return {**_about(run), "failure": str(failure)}


def _fork(config: dict[str, Any], *, stages: int, timeout: float) -> Path:
    """Trains in forks, and returns the run's folder."""
    env = {"WANDB_MODE": os.environ.get("WANDB_MODE", "disabled")}
    try:
        return Path(run_ranks(f"{__name__}:train_on_rank", stages, timeout=timeout, env=env, config=config)[0])
    except RankFailure as error:
        raise _Failure(_late(timeout) if error.seconds >= timeout else str(error)[-_TAIL:]) from error


def _launch(config: dict[str, Any], file: Path, *, script: Path, stages: int, port: int, timeout: float) -> Path:
    """Trains with DeepSpeed's launcher, and returns the run's folder."""
    written, summary = file.with_suffix(".config.json"), file.with_suffix(".summary.json")
    written.write_text(json.dumps(config, indent=2))
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *("--num_accelerators", str(stages), "--master_port", str(port)),
        *(str(script), "--deepspeed_config", str(written), "--json", str(summary)),
    ]
    _call(command, timeout=timeout)
    folder = Path(json.loads(summary.read_text())["folder"])
    summary.unlink()
    written.unlink()
    return folder


def _in_group(run: Run, sweep: str) -> dict[str, Any]:
    """Returns the run's config, in which W&B, if enabled, groups the run with those it is compared with."""
    experiment = run.config["experiment"]
    block = {"group": f"{sweep}-{run.group}", **experiment.get("wandb", {})}
    return {**run.config, "experiment": {**experiment, "wandb": block}}


def _call(command: list[str], *, timeout: float) -> None:
    """Runs a command, and terminates its whole process group on a timeout."""
    environment = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", **os.environ}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise _Failure(_late(timeout)) from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the launcher and its ranks
            process.wait()
    if process.returncode:
        raise _Failure(f"exit code {process.returncode}\n{output[-_TAIL:]}")


def _late(timeout: float) -> str:
    return f"not done after {timeout:.0f} s"


def _about(run: Run) -> dict[str, Any]:
    about = {"group": run.group, "suite_method": run.method, "K": run.layers, "P": run.stages, "seed": run.seed}
    return about if run.trial is None else {**about, "trial": run.trial}


def history_of(folder: Path) -> list[dict[str, Any]]:
    """Returns the metrics of each epoch, from the folder of a run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "epoch"]
