"""Formats numbers as texts."""

from __future__ import annotations

import json
from typing import Any

from ds_al.figures.parts import NOT_RECORDED
from ds_al.report.cells import Statistic
from ds_al.report.read import number


def plain(value: Any) -> str:
    """Formats any fact."""
    if value is None or value == "":
        return NOT_RECORDED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return " / ".join(map(plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items()) or "none"
    return str(value)


def fixed(value: float | None, digits: int) -> str:
    """Formats a number with this many decimals."""
    return NOT_RECORDED if value is None else f"{value:,.{digits}f}"


def with_sd(one: Statistic, digits: int, *, scale: float = 1.0, unit: str = "") -> str:
    """Formats ``mean ± sd``, or a single value alone."""
    if one.mean is None:
        return NOT_RECORDED
    text = f"{one.mean * scale:,.{digits}f}"
    return (text if one.sd is None else f"{text} ± {one.sd * scale:,.{digits}f}") + unit


def size(count: float | None) -> str:
    """Formats bytes with a binary unit."""
    if count is None:
        return NOT_RECORDED
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def si(value: Any) -> str:
    """Formats a count with K, M, G, T; other values are unchanged."""
    known = number(value)
    if known is None:
        return plain(value)
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(known) >= scale:
            return f"{known / scale:.3g} {unit}"
    return f"{known:.4g}"


def setting(value: Any) -> str:
    """Formats a config value as in the config."""
    return value if isinstance(value, str) else json.dumps(value)
