"""Packages that the parts need, and those of them that this Python lacks.

A machine with a GPU often has no network: what is missing is brought as wheels. This module imports none of the
packages that it looks for.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

UNUSED = ("wandb",)
"""Dependencies of the package that no part imports."""
TESTS = ("pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100")
"""What the parts need in addition."""
BROUGHT = {
    "deepspeed": ("hjson", "msgpack", "ninja", "psutil", "py-cpuinfo", "einops"),
    "datasets": ("dill", "multiprocess", "pandas", "pyarrow", "xxhash"),
    "pydantic": ("annotated-types", "pydantic-core", "typing-inspection"),
}
"""What these packages need themselves, beyond what torch and transformers do: unknown as long as they are missing."""


def needed(root: Path) -> list[str]:
    """Returns the requirements of the parts, from ``pyproject.toml`` in the repository's root."""
    dependencies = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    return [each for each in dependencies if _name(each) not in UNUSED] + list(TESTS)


def missing(requirements: Sequence[str]) -> list[str]:
    """Returns the names of packages that are not installed, with what those need that is not installed either.

    The requirements of installed packages are followed; versions are not compared.
    """
    found: dict[str, bool] = {}
    todo = [_name(each) for each in requirements]
    while todo:
        name = todo.pop()
        if name not in found:
            own = _requirements(name)
            found[name] = own is not None
            todo += BROUGHT.get(name, ()) if own is None else own
    return sorted(name for name, there in found.items() if not there)


def remedy(names: Sequence[str], root: Path) -> str:
    """Returns the message for a user whose Python lacks these packages: the names, and how wheels of them are made."""
    pins = dict(_pins(root))
    wanted = " ".join(f"{name}=={pins[name]}" if name in pins else name for name in names)
    return (
        f"{len(names)} packages are missing: {', '.join(names)}.\n"
        "Where there is a network, for the Python of this machine:\n"
        f"    python -m pip wheel --no-deps -w wheels {wanted}\n"
        "then here, with the folder:\n"
        "    python -m pip install --no-index --no-deps --target packages wheels/*.whl\n"
        "    export PYTHONPATH=$PWD/packages"
    )


def _requirements(name: str) -> list[str] | None:
    """Returns what an installed package needs, without extras and other platforms; ``None`` if it is not installed."""
    try:
        requires = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return None
    return [_name(each) for each in requires if ";" not in each]


def _name(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def _pins(root: Path) -> Iterator[tuple[str, str]]:
    """Yields the tested version of each package, of ``constraints.txt``."""
    for line in (root / "constraints.txt").read_text().splitlines():
        if match := re.match(r"([\w.-]+)==([^\s;]+)", line):
            yield _name(match.group(1)), match.group(2)
