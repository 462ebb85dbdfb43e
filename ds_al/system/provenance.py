"""Where a result comes from: the command, the machine, the versions, and the commit."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from ds_al.system import VERSION


def command() -> str:
    """How this process was started, to be pasted into a shell; without what the launcher adds for itself."""
    return shlex.join(["python", *(word for word in sys.argv if not word.startswith("--local_rank="))])


def version(package: str) -> str:
    """Installed version of a package, or ``"not installed"``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a source tree
        return VERSION if package == "ds_al" else "not installed"


def cpu() -> str:
    """Model name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git_commit(folder: str | Path = ".") -> str | None:
    """Full hash of the commit that is checked out in a folder, ``-dirty`` after it where tracked files differ.

    ``None`` where git is missing, or the folder is no checkout or has no commit. Never raises.
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
