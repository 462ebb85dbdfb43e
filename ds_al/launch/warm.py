"""Processes that need not import anything first: forks of one server, which imported it once.

A rank spends seconds on importing torch and DeepSpeed, more than a test spends on what it is about.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def start_server(*modules: str, env: Mapping[str, str]) -> None:
    """Starts the server, which imports the modules in the background. It ends with this process.

    Args:
        *modules: must neither start threads nor open devices when imported: a fork inherits them broken.
        env: variables that hold while the modules are imported.
    """
    before = dict(os.environ)
    os.environ.update(env)
    try:
        multiprocessing.get_context("forkserver").set_forkserver_preload(list(modules))
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


class WarmProcess:
    """One fork, as :class:`subprocess.Popen` shows a process. It leads a session of its own.

    Args:
        function: importable; ends the process when it returns, with code 0, or raises, with code 1.
        *args: its arguments, pickled.
        env: all variables of the process; what is read while modules are imported comes too late.
        log: gets all that the process prints. It exists.
        errors: gets what the process prints to stderr, instead.
    """

    def __init__(
        self, function: Callable[..., None], *args: Any, env: Mapping[str, str], log: Path, errors: Path | None = None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        logs = (str(log), str(errors or log))
        self._process = context.Process(target=_run, args=(function, args, dict(env), logs, os.getcwd()))
        self._process.start()

    @property
    def pid(self) -> int:
        """Also its session's."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code, negative for a signal, or ``None`` while it runs."""
        return self._process.exitcode

    def wait(self) -> int | None:
        """Waits for its end; returns the exit code."""
        self._process.join()
        return self._process.exitcode


def _run(
    function: Callable[..., None], args: tuple[Any, ...], env: dict[str, str], logs: tuple[str, str], folder: str
) -> None:
    os.setsid()
    for stream, log in enumerate(logs, start=1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    code = 1
    try:
        function(*args)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # those of a fork are not run otherwise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_with_parent() -> None:
    """Ends this process when the one that made it is gone; the server lives as long as any fork does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
