"""One line of the doctor's table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "limited", "no"]


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        group: its part of the table.
        item: what was examined.
        value: what was found.
        status: ``ok``, ``limited`` (works, within what the remark says) or ``no``.
        remark: consequence and remedy.
        essential: whether nothing can be trained where the status is ``no``.
    """

    group: str
    item: str
    value: str
    status: Status = "ok"
    remark: str = ""
    essential: bool = False


def one_line(error: Exception) -> str:
    """Formats an exception on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
