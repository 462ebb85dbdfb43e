"""Launcher of ranks on this machine: own processes, a free port, a time-out, no orphans.

``run_ranks("package.module:function", 4, key=value)`` calls ``function(key=value)`` on every rank and returns all
results. The ranks compute on the CPU unless ``env`` sets another accelerator.
"""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_al.launch.warm import WarmProcess, start_server
from ds_al.parallel.buffers import remove_buffers

_GRACE = 30.0  # seconds from the first failure until the other ranks, which may wait for it, are killed
_POLL = 0.02
_LOST = "() lost another rank: "  # in the error of a rank that ends since another one has failed
_SHOWN = 3000  # characters of each rank's output in an error
_NEWS = "DS_AL_NEWS"
_IMPORTED = (
    *("ds_al.engine", "ds_al.module", "ds_al.entry", "ds_al.baseline.engine", "ds_al.experiment.job"),
    "torch._dynamo",  # imported by torch with the first optimizer: 2 s of CPU time, the largest cost of a rank
    "deepspeed.module_inject.auto_ep_layer",  # imported by DeepSpeed with the first engine
    "torch.utils.cpp_extension",  # and setuptools, for the all-reduce that DeepSpeed compiles
)  # modules that every rank imports eventually; missing ones are skipped
_LAST = "ds_al.launch.preloaded"
_forks = False
_ON_CPU = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


RankProcess = subprocess.Popen[Any] | WarmProcess


class RankFailure(RuntimeError):
    """Raised if a rank exits with a non-zero code or the ranks exceed the time-out.

    ``outputs`` and ``codes`` are by rank (a code is ``None`` if the rank was still running); ``seconds`` is the
    lifetime of the ranks.
    """

    def __init__(self, message: str, outputs: list[str], codes: list[int | None], seconds: float) -> None:
        super().__init__(message)
        self.outputs, self.codes, self.seconds = outputs, codes, seconds


def free_port() -> int:
    """Returns a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """Returns the variables that a launcher would set, and the import path of this process."""
    here = str(Path(__file__).resolve().parents[2])
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")},
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **_ON_CPU,
        "PYTHONPATH": os.pathsep.join([here, *(path or os.getcwd() for path in sys.path)]),
    }


def tell(line: str) -> None:
    """Sends one line from a rank to the ``news`` callback of the :func:`run_ranks` that started it, if any."""
    path = os.environ.get(_NEWS)
    if path:
        with open(path, "a") as file:
            file.write(line + "\n")


def start_quickly(*modules: str) -> None:
    """Makes :func:`run_ranks` fork ranks from a process that has already imported torch, DeepSpeed and ds_al.

    This saves seconds per launch, for tests that launch ranks hundreds of times. Measurements should use new processes.

    Args:
        *modules: what else to import, as for :func:`ds_al.launch.warm.start_server`.
    """
    global _forks
    start_server(*_IMPORTED, *modules, _LAST, env=_ON_CPU)
    _forks = True


def run_ranks(
    target: str,
    world: int,
    *,
    timeout: float = 240.0,
    env: Mapping[str, str] | None = None,
    news: Callable[[str], None] | None = None,
    within: Sequence[Sequence[str]] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Calls a function on ``world`` ranks and returns their results, in the order of ranks.

    Args:
        target: ``"module:function"``, importable from this process. Arguments and results are pickled.
        world: number of ranks.
        timeout: seconds after which all ranks are killed.
        env: variables in addition to :func:`rank_environment`.
        news: called in this process with every line that a rank sends by :func:`tell`.
        within: by rank, a command prefix of its process, such as ``("ip", "netns", "exec", "name")``.
        **kwargs: arguments of the function.

    Raises:
        RankFailure: a rank failed or the time-out expired; all ranks were killed. Its message shows the output of the
            rank that failed first before that of all others, and ranks that have only lost another one later.
    """
    port, start = free_port(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "kwargs.pkl").write_bytes(pickle.dumps(kwargs))
        (path / "news").touch()
        processes: list[RankProcess] = []
        try:
            for rank in range(world):
                own = {**rank_environment(rank, world, port), _NEWS: str(path / "news"), **(env or {})}
                processes.append(_start(target, path, rank, env=own, within=within[rank] if within else ()))
            codes, failed = _wait(processes, start + timeout, path, news)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            remove_buffers(port)  # of ranks that were killed before they joined
        if codes != [0] * world:
            outputs = [(path / f"log{rank}").read_text(errors="replace") for rank in range(world)]
            failed.sort(key=lambda rank: _LOST in outputs[rank])  # they may end before the one that they have lost
            order = failed + [rank for rank in range(world) if rank not in failed]
            shown = "\n".join(f"--- rank {r}, exit code {codes[r]}\n{outputs[r][-_SHOWN:]}" for r in order)
            raise RankFailure(f"ranks exited with {codes}\n{shown}", outputs, codes, time.monotonic() - start)
        return [pickle.loads(_result(path, rank).read_bytes()) for rank in range(world)]


def _start(target: str, folder: Path, rank: int, *, env: dict[str, str], within: Sequence[str]) -> RankProcess:
    log = folder / f"log{rank}"
    log.touch()
    # DeepSpeed chooses its accelerator at its import: a fork would compute on the CPU, whatever its variables say.
    if _forks and not within and env["DS_ACCELERATOR"] == _ON_CPU["DS_ACCELERATOR"]:
        return WarmProcess(main, target, str(folder), env=env, log=log)
    command = [*within, sys.executable, "-m", "ds_al.launch", target, str(folder)]
    with log.open("a") as file:
        return subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def _wait(
    processes: Sequence[RankProcess], deadline: float, folder: Path, news: Callable[[str], None] | None
) -> tuple[list[int | None], list[int]]:
    """Waits until every rank has a result or has exited, or until the deadline.

    Returns:
        The exit codes, 0 for ranks with a result, and the failed ranks in the order of their failures.
    """
    failed: list[int] = []
    with (folder / "news").open() as lines:
        while True:
            codes = [0 if _result(folder, r).exists() else p.poll() for r, p in enumerate(processes)]
            for line in lines.readlines():
                if news is not None:
                    news(line.rstrip("\n"))
            now = time.monotonic()
            fresh = [rank for rank, code in enumerate(codes) if code and rank not in failed]
            if fresh and not failed:
                deadline = min(deadline, now + _GRACE)
            failed += fresh
            if None not in codes or now > deadline:
                return codes, failed
            time.sleep(_POLL)


def _result(folder: Path, rank: int) -> Path:
    return folder / f"result{rank}.pkl"


def _end_with(parent: int) -> None:
    """Ends this rank if its parent process exits without having ended it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(target: str, folder: str) -> None:
    """Runs one rank. After it has written its result, it waits to be killed, since others may still receive its
    messages."""
    _end_with(os.getppid())
    import torch

    from ds_al.parallel import presence, store, worker

    torch.set_num_threads(1)
    module, function = target.split(":")
    kwargs = pickle.loads(Path(folder, "kwargs.pkl").read_bytes())
    with store.hosted_here():
        try:
            result = getattr(importlib.import_module(module), function)(**kwargs)
        except BaseException as error:
            if not isinstance(error, SystemExit) or error.code:
                presence.here().fail(error)
            raise
    if worker.IS_WORKER:  # other ranks may need messages of this one again until all have come here
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    path = _result(Path(folder), int(os.environ["RANK"]))
    path.with_suffix(".part").write_bytes(pickle.dumps(result))
    path.with_suffix(".part").rename(path)
    threading.Event().wait()
