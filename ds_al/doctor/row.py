"""One line of what the doctor finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "limited", "no"]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        group: the part of the table it belongs to.
        item: what was looked at.
        value: what was found.
        status: ``ok``, ``limited`` (works, within what the remark says) or ``no``.
        remark: what follows from it, and the remedy.
        essential: whether ``no`` means that nothing can be trained here.
    """

    group: str
    item: str
    value: str
    status: Status = "ok"
    remark: str = ""
    essential: bool = False


def one_line(error: Exception) -> str:
    """What an exception says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
