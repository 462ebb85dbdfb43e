"""Which releases of DeepSpeed ds_al works with: ``make test-matrix`` runs tests on the first and the last of them."""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version

from ds_al.errors import ALVersionError

OLDEST, BELOW = "0.19.0", "0.20"
"""As in ``pyproject.toml``. With 0.18.0 data parallel training of the twin (``bp_dp``) ends, without an error, on other
weights than one process does."""


def check_deepspeed() -> None:
    """Looks at the release of DeepSpeed that is installed, without importing it.

    Raises:
        ALVersionError: there is none, or it is older than :data:`OLDEST`. A later one may work.
    """
    try:
        found = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        raise ALVersionError(
            f"deepspeed is not installed, expected >={OLDEST},<{BELOW}: pip install 'deepspeed>={OLDEST},<{BELOW}'"
        ) from None
    if Version(found) < Version(OLDEST):
        raise ALVersionError(
            f"got deepspeed {found}, expected >={OLDEST},<{BELOW}: pip install 'deepspeed>={OLDEST},<{BELOW}'"
        )
