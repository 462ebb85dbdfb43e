"""Supported releases of DeepSpeed; ``make test-matrix`` tests the oldest and the newest."""

from __future__ import annotations

from functools import cache
from importlib import metadata

from packaging.version import Version

from ds_al.errors import ALVersionError

OLDEST, BELOW = "0.19.0", "0.20"
"""Range of releases, as in ``pyproject.toml``. With 0.18.0 data parallel training of the twin (``bp_dp``) yields,
without an error, other weights than one process does."""


@cache
def release(package: str) -> str | None:
    """Returns the installed release of a package, ``None`` if it is not installed; its metadata are read once."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_deepspeed() -> None:
    """Checks the installed release of DeepSpeed, without importing it.

    Raises:
        ALVersionError: DeepSpeed is not installed, or older than :data:`OLDEST`. A later release may work.
    """
    found = release("deepspeed")
    if found is None:
        raise ALVersionError(
            f"deepspeed is not installed, expected >={OLDEST},<{BELOW}: pip install 'deepspeed>={OLDEST},<{BELOW}'"
        )
    if Version(found) < Version(OLDEST):
        raise ALVersionError(
            f"got deepspeed {found}, expected >={OLDEST},<{BELOW}: pip install 'deepspeed>={OLDEST},<{BELOW}'"
        )
