"""Provenance of a result: command, machine, versions, and commit."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ds_al.system import VERSION
from ds_al.system.secrets import hide
from ds_al.system.versions import release

_LAUNCHER = re.compile(r"python|mpirun|mpiexec|orterun|prterun|srun")
"""Programs whose words are recorded: not those of a shell or of ``sudo``, which may hold secrets."""


def command() -> str:
    """Returns the whole command line of this job, with its launcher, ready for a shell, without secrets.

    It is that of the topmost ancestor of this process which ends with this process's own words, such as ``deepspeed
    --num_accelerators 2 run/train.py ...``. On a host that another one started the ranks of, where no ancestor has the
    user's words, a launcher of as many ranks on one host stands in.
    """
    own = [word for word in sys.argv if not word.startswith(("--local_rank=", "--local-rank="))]
    lines = [line for line in _ancestors() if line[-len(own) :] == own and _LAUNCHER.match(Path(line[0]).name)]
    lines = [line for line in lines if "deepspeed.launcher.launch" not in line]  # the user gave the runner's
    if lines:
        return hide(shlex.join(_shortened(lines[-1])))
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    return hide(shlex.join([*(["deepspeed", "--num_accelerators", str(ranks)] if ranks > 1 else ["python"]), *own]))


def _ancestors() -> Iterator[list[str]]:
    """Yields the command lines of this process's ancestors, nearest first, as far as the system tells them."""
    try:
        process = os.getppid()
        while process > 1:
            yield Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return


def _shortened(words: list[str]) -> list[str]:
    """Returns a command line as it is typed: without the interpreter of an installed command, and without its path."""
    if len(words) > 1 and Path(words[0]).name.startswith("python"):
        program = Path(words[1])
        return [program.name, *words[2:]] if program.parent.name == "bin" else ["python", *words[1:]]
    return [Path(words[0]).name, *words[1:]]


def version(package: str) -> str:
    """Returns the installed version of a package, or ``"not installed"``."""
    here = VERSION if package == "ds_al" else "not installed"  # a source tree that is not installed
    return release(package) or here


def cpu() -> str:
    """Returns the model name of the processor, as far as it is known."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def boot() -> str | None:
    """Returns an id of this machine since its start, a hash that does not tell which one it is; ``None`` if unknown.

    Times of two runs can be compared where it is the same.
    """
    try:
        since = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        return None
    return hashlib.sha256(since).hexdigest()[:12]


def git_commit(folder: str | Path = ".") -> str | None:
    """Returns the full hash of a folder's checked-out commit, with the suffix ``-dirty`` if tracked files differ.

    Returns ``None`` if git is missing, or the folder is no checkout or has no commit. Never raises.
    """
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
