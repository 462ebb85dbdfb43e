"""Provenance of a result: command, machine, versions, and commit."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from ds_al.system import VERSION
from ds_al.system.secrets import hide


def command() -> str:
    """Returns the command line of this process, ready for a shell, without secrets and arguments of the launcher."""
    return hide(shlex.join(["python", *(word for word in sys.argv if not word.startswith("--local_rank="))]))


def version(package: str) -> str:
    """Returns the installed version of a package, or ``"not installed"``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a source tree that is not installed
        return VERSION if package == "ds_al" else "not installed"


def cpu() -> str:
    """Returns the model name of the processor, as far as it is known."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


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
