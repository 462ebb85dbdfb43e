"""Runs scripts of ``run/`` without a new interpreter, which would import torch and DeepSpeed first.

:func:`launch` stands in for DeepSpeed's launcher, :func:`call` for ``python SCRIPT``. Tests of the start itself use
the real ones.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from ds_al.launch.warm import WarmProcess
from ds_al.parallel.world import remove_buffers
from tests.support.ranks import ROOT, free_port, rank_environment


def launch(
    script: str, arguments: Sequence[str], *, ranks: int, folder: Path, env: Mapping[str, str], timeout: float = 280.0
) -> subprocess.CompletedProcess[str]:
    """Runs a script on every rank, each a fork in a process of its own, as DeepSpeed's launcher does.

    The first rank that fails ends the others.

    Args:
        script: relative to the repository.
        folder: where the ranks run.
        env: variables on top of those of :func:`rank_environment`.

    Raises:
        subprocess.TimeoutExpired: the ranks ran out of time; they have been ended.
    """
    port, deadline = free_port(), time.monotonic() + timeout
    processes: list[WarmProcess] = []
    with tempfile.TemporaryDirectory() as logs:
        out, err = Path(logs, "out"), Path(logs, "err")
        out.touch()
        err.touch()
        try:
            for rank in range(ranks):
                own = {**rank_environment(rank, ranks, port), **env}
                arguments = [str(argument) for argument in arguments]
                processes.append(
                    WarmProcess(_rank, str(ROOT / script), arguments, str(folder), env=own, log=out, errors=err)
                )
            code = _wait(processes, deadline)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            remove_buffers(port)
        texts = out.read_text(errors="replace"), err.read_text(errors="replace")
    if code is None:
        raise subprocess.TimeoutExpired([script, *arguments], timeout, *texts)
    return subprocess.CompletedProcess([script, *arguments], code, *texts)


def _wait(processes: Sequence[WarmProcess], deadline: float) -> int | None:
    """Returns the first exit code other than 0, or 0 when all ranks have ended; ``None`` when it is too late."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            return failed[0] if failed else 0
        time.sleep(0.02)
    return None


def _rank(script: str, arguments: list[str], folder: str) -> None:
    """One rank of :func:`launch`."""
    os.chdir(folder)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    _run(script, arguments)


def _run(script: str, arguments: Sequence[str]) -> None:
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def call(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in this process, from the repository's folder; ranks that it starts are forks.

    Args:
        script: relative to the repository.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    with _kept(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        os.chdir(ROOT)
        try:
            _run(str(ROOT / script), arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except Exception:
            code = 1
            traceback.print_exc()
    return subprocess.CompletedProcess([script, *arguments], code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """Restores what a script changes in the process that calls it."""
    folder, variables = os.getcwd(), dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv)
        patch.setattr(sys, "path", list(sys.path))
        try:
            yield
        finally:
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(variables)
