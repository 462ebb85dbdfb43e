"""Argument types shared by the measurement commands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ds_al.studies.bench.workloads import METHODS


def names(text: str, *, known: Sequence[str] = METHODS) -> tuple[str, ...]:
    """Parses comma-separated names of methods."""
    parts = tuple(part for part in text.split(",") if part)
    if not parts or any(part not in known for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}: expected names of {','.join(known)}")
    return parts


def numbers(text: str) -> tuple[int, ...]:
    """Parses comma-separated positive integers; ``4..64`` stands for 4, 8, 16, 32 and 64."""
    return tuple(number for part in text.split(",") if part for number in _doublings(part)) or (positive(text),)


def _doublings(text: str) -> list[int]:
    start, dots, stop = text.partition("..")
    found = [positive(start)]
    while dots and found[-1] * 2 <= positive(stop):
        found.append(found[-1] * 2)
    return found


def positive(text: str) -> int:
    """Parses a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}: expected a whole number from 1 on")
    return int(text)
