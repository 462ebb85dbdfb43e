"""Facts of the ranks that have to be equal, such as releases and code: which of them differ, and where."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ds_al.system import VERSION
from ds_al.system.versions import release

Facts = Mapping[str, Any]
"""What has to be equal on all ranks, by name; values are compared by their text."""

_SHOWN = 200  # characters of a value in an error


def environment() -> dict[str, str]:
    """Returns the facts of the software of this rank: releases, and the code of this package."""
    releases = {name: str(release(name)) for name in ("torch", "deepspeed")}
    python = ".".join(platform.python_version_tuple()[:2])
    return {"ds_al": VERSION, **releases, "python": python, "code of ds_al": _code(), "byte order": sys.byteorder}


def differences(ranks: Sequence[tuple[str, Facts]]) -> list[str]:
    """Names each fact that differs, with its values and the ranks that have them.

    Args:
        ranks: name and facts of each rank; one without facts takes no part.
    """
    ranks = [(name, facts) for name, facts in ranks if facts]
    found = []
    for fact in dict.fromkeys(fact for _, facts in ranks for fact in facts):
        names: dict[str, list[str]] = {}
        for name, facts in ranks:
            names.setdefault(str(facts.get(fact, "missing")), []).append(name)
        if len(names) > 1:
            values = (f"{value[:_SHOWN]} on rank {', '.join(those)}" for value, those in names.items())
            found.append(f"{fact} is {', '.join(values)}")
    return found


@cache
def _code() -> str:
    """Hash of the files of this package."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
