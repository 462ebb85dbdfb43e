"""Runs the cells of a suite, several at a time; what is done stays done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ds_al.compare.suite import Cell
from ds_al.launch import free_port

_TAIL = 2000  # characters of a failed run's output that are kept


def run_cells(
    cells: Sequence[Cell],
    *,
    results: Path,
    script: Path,
    data: Path | None,
    jobs: int,
    timeout: float,
    done: Callable[[Cell, dict[str, Any]], None],
) -> None:
    """Runs each cell that has no result yet, through DeepSpeed's launcher.

    A cell's result is ``<results>/<key>.json``: its summary and the metrics of its epochs, or how it failed. A
    failed cell is run again the next time.

    Args:
        results: folder of results; runs keep their files below it.
        script: ``run/train.py``.
        data: folder that relative data paths of the suite start from.
        jobs: cells at a time.
        timeout: seconds after which a cell is ended and counts as failed.
        done: called with each cell and its result, as they end.
    """
    results.mkdir(parents=True, exist_ok=True)
    lock = threading.Lock()

    def work(cell: Cell) -> tuple[Cell, dict[str, Any]]:
        with lock:
            port = free_port()
        return cell, _run(cell, results=results, script=script, data=data, port=port, timeout=timeout)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed([pool.submit(work, cell) for cell in cells if not is_done(cell, results)]):
                done(*future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def is_done(cell: Cell, results: Path) -> bool:
    """Whether a cell has a result that is no failure."""
    result = read_result(cell, results)
    return result is not None and "failure" not in result


def read_result(cell: Cell, results: Path) -> dict[str, Any] | None:
    """A cell's result, if there is one, under the cell's present names."""
    path = results / f"{cell.key}.json"
    return {**json.loads(path.read_text()), **_about(cell)} if path.exists() else None


def _run(cell: Cell, *, results: Path, script: Path, data: Path | None, port: int, timeout: float) -> dict[str, Any]:
    config = results / f"{cell.key}.config.json"
    summary = results / f"{cell.key}.summary.json"
    config.write_text(json.dumps(_in_group(cell, results.stem), indent=2))
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *("--num_accelerators", str(cell.stages), "--master_port", str(port)),
        *(str(script), "--deepspeed_config", str(config)),
        *("--output", str(results / "runs"), "--json", str(summary)),
    ]
    path = cell.config["experiment"]["data"].get("path")
    if path is not None and data is not None:
        command += ["--data-path", str(data / path)]  # an absolute path stays as it is
    failure = _call(command, timeout=timeout)
    if failure is None:
        folder = Path(json.loads(summary.read_text())["folder"])
        content = json.loads((folder / "summary.json").read_text())
        content["data"].pop("path", None)  # where this machine keeps things is no part of a result
        result = {key: value for key, value in content.items() if key not in ("folder", "command")}
        result |= {**_about(cell), "history": _history(folder)}
        summary.unlink()
        config.unlink()
    else:
        result = {**_about(cell), "failure": failure}
    path = results / f"{cell.key}.json"
    path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".part").rename(path)
    return result


def _in_group(cell: Cell, suite: str) -> dict[str, Any]:
    """The cell's config, whose W&B run, where there is one, is grouped with those it is compared with."""
    experiment = cell.config["experiment"]
    block = {"group": f"{suite}-{cell.group}", **experiment.get("wandb", {})}
    return {**cell.config, "experiment": {**experiment, "wandb": block}}


def _call(command: list[str], *, timeout: float) -> str | None:
    """Runs a command with all it starts, and returns how it failed, if it did."""
    environment = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", **os.environ}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"not done after {timeout:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the launcher and its ranks
            process.wait()
    return None if process.returncode == 0 else f"exit code {process.returncode}\n{output[-_TAIL:]}"


def _about(cell: Cell) -> dict[str, Any]:
    about = {"group": cell.group, "suite_method": cell.method, "K": cell.layers, "P": cell.stages, "seed": cell.seed}
    return about if cell.trial is None else {**about, "trial": cell.trial}


def _history(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "epoch"]
