"""Forked processes end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_al.launch.ranks import run_ranks
from tests.support.ranks import ROOT

pytestmark = pytest.mark.distributed

STARTER = """
import os, pathlib, sys, time
from ds_al.launch.warm import WarmProcess, start_server

def sleeper(path):
    pathlib.Path(path).write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    start_server(env={})
    log = pathlib.Path(sys.argv[1], "log")
    log.touch()
    WarmProcess(sleeper, str(pathlib.Path(sys.argv[1], "pid")), env=dict(os.environ), log=log)
    time.sleep(600)
"""


def test_a_fork_ends_when_its_starter_is_killed(tmp_path: Path) -> None:
    """It once trained on: the server of forks lives as long as any of them, so none ever saw its parent go."""
    (tmp_path / "starter.py").write_text(STARTER)
    pid = tmp_path / "pid"
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "starter.py"), str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as starter:
        try:
            _wait(lambda: pid.exists() and pid.read_text() != "")
        finally:
            starter.send_signal(signal.SIGKILL)
    _wait(lambda: not Path(f"/proc/{pid.read_text()}").exists())


def start_method_and_lock() -> tuple[str | None, str | None]:
    """Worker: the start method, and the name in the system of a new lock, such as tqdm makes."""
    return multiprocessing.get_start_method(allow_none=True), multiprocessing.RLock()._semlock.name  # type: ignore[attr-defined]


def test_processes_that_a_rank_starts_start_as_in_one_of_its_own() -> None:
    """They once started by the method of the server; locks then had names, and were reported as leaked."""
    assert run_ranks(f"{__name__}:start_method_and_lock", 1) == [(None, None)]


def _wait(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not after {seconds} s"
        time.sleep(0.05)
