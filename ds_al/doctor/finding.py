"""One finding of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "limited", "no"]


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Attributes:
        group: section of the table.
        item: what was checked.
        value: what was found.
        status: ``ok``, ``limited`` (works, with the restriction in the remark) or ``no``.
        remark: consequence and remedy.
        essential: whether ``no`` prevents all training here.
    """

    group: str
    item: str
    value: str
    status: Status = "ok"
    remark: str = ""
    essential: bool = False


def one_line(error: Exception) -> str:
    """Returns type and message of an exception on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
