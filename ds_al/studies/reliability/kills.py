"""Kills a run at any moment, in saves too, continues it on other numbers of stages, and compares it with a whole one.

The run is ``run/train.py --resume auto``. A series ends with the end of its run; series follow one another until enough
kills are counted, with asynchronous saves and others in turn.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ds_al.checkpoint.own import read_latest
from ds_al.launch.ranks import free_port, rank_environment, start_quickly
from ds_al.launch.warm import WarmProcess
from ds_al.parallel.buffers import remove_buffers
from ds_al.studies.parts import ROOT, tell_row
from ds_al.studies.results import Row, StudyError

STAGES = (1, 2, 3, 4)
"""Numbers of stages that are drawn from."""
_LIMIT = 120.0  # seconds for a run that nobody kills to make progress
_LONGEST = 1.2  # seconds of training before a kill
_POLL = 0.01
_NAME = "run"


def run(*, seconds: float, kills: int) -> None:
    """Part of the study: tells a row for each series.

    Args:
        seconds: time limit.
        kills: number of kills of all series together.

    Raises:
        StudyError: the time was not enough for so many.
    """
    end, counted, number = time.monotonic() + seconds, 0, 0
    start_quickly()
    while counted < kills:
        row = series(number, kills=min(kills - counted, -(-kills // 2)), until=end - _LIMIT / 2)
        counted, number = counted + row["kills"], number + 1
        tell_row(row)
        if counted < kills and time.monotonic() > end - _LIMIT / 2:
            raise StudyError(f"{counted} of {kills} kills in {seconds:.0f} s: run it again with more --minutes")


def series(number: int, *, kills: int, batches: int = 450, until: float | None = None) -> Row:
    """Trains one run with kills, and compares it with one that nobody killed.

    Args:
        number: of the series; seeds it, and chooses whether its saves are asynchronous.
        kills: kills at most, after which the run comes to its end.
        batches: batches of the run.
        until: time after which nobody is killed any more.
    """
    asynchronous = bool(number % 2)
    draws = random.Random(number)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.json")
        config.write_text(json.dumps(_config(batches, asynchronous=asynchronous)))
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        failure, done, in_saves, stages = "", 0, 0, list[int]()
        if (code := _attempt(config, whole, 1, after=None)[0]) != 0:
            failure = f"the run that nobody killed ended with {code}\n{_tail(whole)}"
        while not failure:
            stages.append(draws.choice(STAGES))
            more = done < kills and (until is None or time.monotonic() < until)
            after = draws.uniform(0.0, _LONGEST) if more else None
            aimed = done % 3 == 0
            code, saving = _attempt(
                config, killed, stages[-1], after=after, aimed=aimed, one=bool(done % 2), draws=draws
            )
            if code == 0:
                break
            if code is None:
                done, in_saves = done + 1, in_saves + saving
            else:
                failure = f"attempt {len(stages)} on {stages[-1]} stages ended with {code}\n{_tail(killed)}"
        failure = failure or "; ".join(_differences(whole, killed))
        return {
            "saves": "asynchronous" if asynchronous else "synchronous",
            "kills": done,
            "in_saves": in_saves,
            "stages": " ".join(map(str, stages)),
            "batches": batches,
            "rows": len(_rows(killed, "batch")) if not failure else 0,
            "wandb_runs": len(_wandb_runs(killed)),
            "outcome": "lost" if failure else "ok",
            "failure": failure,
        }


def _config(batches: int, *, asynchronous: bool) -> Mapping[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 25,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.002, "torch_adam": True}},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": "auto", "warmup_num_steps": 2, "cos_min_ratio": 0.0},
        },
        "steps_per_print": None,
        "associated_learning": {"checkpoint": {"asynchronous": asynchronous}},
        "experiment": {
            "name": _NAME,
            "model": {"name": "mlp", "options": {"widths": [32, 32, 32, 32], "dropout": 0.1}},
            "data": {"name": "fashion-mnist-small"},
            "epochs": 100,
            "max_batches": batches,
            "checkpoint_batches": 7,
            "log_every": 5,
            "test": False,
        },
    }


def _attempt(
    config: Path,
    output: Path,
    stages: int,
    *,
    after: float | None,
    aimed: bool = False,
    one: bool = False,
    draws: random.Random | None = None,
) -> tuple[int | None, bool]:
    """Starts the run once, and kills it some seconds after it trains.

    Args:
        after: seconds; ``None`` lets it come to its end.
        aimed: whether the kill waits for the next save, whose folder has another name until it is complete.
        one: whether one of the processes is killed, and the others have to end by themselves.

    Returns:
        The first exit code that is not 0, or 0; ``None`` where it was killed. And whether that was in a save.
    """
    port, started = free_port(), time.time()
    output.mkdir(exist_ok=True)
    log = output / "log"
    log.write_text("")
    before = set(_unfinished(output))  # saves in which an earlier process was killed
    arguments = ["--deepspeed_config", str(config), "--output", str(output), "--resume", "auto"]
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    processes = [
        WarmProcess(_rank, arguments, env={**rank_environment(rank, stages, port), **environment}, log=log)
        for rank in range(stages)
    ]
    kill_at, end = None, time.monotonic() + _LIMIT
    try:
        while True:
            codes = [process.poll() for process in processes]
            now = time.monotonic()
            if None not in codes or any(codes):
                return next((code for code in codes if code), 0), False
            if now > end:
                return -1, False
            if after is not None and kill_at is None and _trains(output, started):
                kill_at = now + after
            due = kill_at is not None and now > kill_at
            saving = due and not before.issuperset(_unfinished(output))
            if due and (saving or not aimed):
                hit = [draws.choice(processes)] if one and draws is not None else processes
                for process in hit:
                    os.kill(process.pid, signal.SIGKILL)
                for process in processes:
                    _ends(process)
                return None, saving
            time.sleep(_POLL / 10 if due else _POLL)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        remove_buffers(port)


def _unfinished(output: Path) -> Iterator[Path]:
    """Yields the folders of saves that are not complete."""
    return output.glob(f"{_NAME}/*/checkpoints/.*.part")


def _ends(process: WarmProcess) -> None:
    """Waits for a process that has been killed, or whose neighbour has."""
    end = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < end:
        time.sleep(_POLL)


def _trains(output: Path, since: float) -> bool:
    """Whether the run has opened its file of metrics since it was started."""
    return any(path.stat().st_mtime > since for path in output.glob(f"{_NAME}/*/metrics.jsonl"))


def _rank(arguments: list[str]) -> None:
    sys.argv = ["run/train.py", *arguments]
    runpy.run_path(str(ROOT / "run/train.py"), run_name="__main__")


# ---- comparison ------------------------------------------------------------------------------------


def _differences(whole: Path, killed: Path) -> Iterator[str]:
    """Yields what differs between two outputs: files of the last checkpoint, rows of metrics, W&B runs."""
    if len(folders := list(killed.glob(f"{_NAME}/*/config.json"))) != 1:
        yield f"{len(folders)} folders, expected one"
    one, two = _files(whole), _files(killed)
    if different := sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name)):
        yield f"files of the last checkpoint differ: {', '.join(different)}"
    for kind, keys in (("batch", ("batch", "epoch", "losses")), ("epoch", _OF_EPOCHS), ("log", ("batch", "epoch"))):
        rows, expected = ([[row[key] for key in keys] for row in _rows(each, kind)] for each in (killed, whole))
        if rows != expected:
            yield f"{len(rows)} rows of {kind}, expected {len(expected)}, or their values differ"
    if len(runs := _wandb_runs(killed)) != 1:
        yield f"{len(runs)} W&B runs, expected one"


_OF_EPOCHS = ("epoch", "learning_rate", "associated_loss", "autoencoder_loss", "validation_accuracy")


def _files(output: Path) -> dict[str, str]:
    """Returns the hashes of the files of layers of the last checkpoint."""
    (checkpoints,) = output.glob(f"{_NAME}/*/checkpoints")
    index = json.loads((checkpoints / read_latest(checkpoints) / "index.json").read_text())
    records = [record for layer in index["layers"] for record in layer["files"].values()]
    return {record["file"]: record["blake2b"] for record in records}


def _rows(output: Path, kind: str) -> list[Mapping[str, Any]]:
    lines = [line for path in output.glob(f"{_NAME}/*/metrics.jsonl") for line in path.read_text().splitlines()]
    return [row for line in lines if (row := json.loads(line))["kind"] == kind]


def _wandb_runs(output: Path) -> set[str]:
    """Returns the ids of the W&B runs that were begun."""
    return {path.name.rpartition("-")[2] for path in output.glob(f"{_NAME}/*/wandb/offline-run-*")}


def _tail(output: Path) -> str:
    return (output / "log").read_text(errors="replace")[-3000:]
