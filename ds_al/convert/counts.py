"""Checks of the numbers that ``from_layers`` and ``from_pretrained`` take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ds_al.errors import ALConfigError


def check_counts(*, num_al_layers: Any, groups: Sequence[Any] | None, code_width: Any, by_work: bool = False) -> None:
    """Checks that numbers are whole, and not below 1.

    Args:
        num_al_layers, groups, code_width: the numbers.
        by_work: whether ``groups`` may be ``"by-work"``.

    Raises:
        ALConfigError: one is not.
    """
    for name, value in (("num_al_layers", num_al_layers), ("code_width", code_width)):
        if not (value is None or _is_count(value)):
            raise ALConfigError(f"got {name}={value!r}: expected a whole number of 1 or more")
    if groups is None or (by_work and isinstance(groups, str) and groups == "by-work"):
        return
    if not (isinstance(groups, (list, tuple)) and groups and all(map(_is_count, groups))):
        other = ", or 'by-work'" if by_work else ""
        raise ALConfigError(
            f"got groups={groups!r}: expected a list of whole numbers, 1 or more in each AL layer{other}"
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
