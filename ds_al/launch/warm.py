"""Preloaded processes: forks of one server that has already imported the slow modules.

Importing torch and DeepSpeed takes a rank seconds, which is longer than the body of most tests.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn


def start_server(*modules: str, env: Mapping[str, str]) -> None:
    """Starts the server, which imports the modules in the background. It ends with this process.

    Args:
        *modules: modules to import; they must neither start threads nor open devices on import, since forks inherit
            those in a broken state.
        env: variables during the imports.
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
    """One forked process, with the interface of :class:`subprocess.Popen`. It is the leader of its own session.

    Args:
        function: importable; the process exits with code 0 when it returns, with code 1 when it raises.
        *args: its arguments, pickled.
        env: all variables of the process; they do not affect modules that read them on import.
        log: existing file that receives the output of the process.
        errors: file that receives stderr, instead of ``log``.
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
        """Process id, which is also the session id."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Returns the exit code, negative for a signal, or ``None`` if the process is running."""
        return self._process.exitcode

    def wait(self) -> int | None:
        """Waits for the process to exit; returns the exit code."""
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
    # That of the server would be left, under which locks have names in the system, which a killed process leaves there.
    multiprocessing.set_start_method(None, force=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    run_and_leave(function, *args)


def run_and_leave(function: Callable[..., None], *args: Any) -> NoReturn:
    """Calls a function, and ends the process: exit code 0, 1 after an exception, or that of ``SystemExit``.

    In an orderly exit, a thread of gloo that frees a tensor during the interpreter's teardown would abort the process.
    """
    code = 1
    try:
        function(*args)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]  # as an interpreter does, which other ranks learn of
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_with_parent() -> None:
    """Ends this process when its creator exits; the server lives as long as any fork does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
