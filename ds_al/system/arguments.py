"""Types of command line arguments, which name a wrong value before anything runs."""

from __future__ import annotations

import argparse
import math
from pathlib import Path


def output_file(text: str) -> Path:
    """Parses the path of a file to write.

    Raises:
        argparse.ArgumentTypeError: it is empty, is a folder, or leads through a file.
    """
    path = Path(text).expanduser()
    above = next((parent for parent in path.parents if parent.exists()), Path())
    if not text or "\0" in text or path.is_dir() or not above.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}: expected the path of a file to write, in a folder")
    return path


def amount(text: str) -> float:
    """Parses a number that is finite and 0 or more.

    Raises:
        argparse.ArgumentTypeError: the text is no such number.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}: expected a number of 0 or more")
    return value


def fraction(text: str) -> float:
    """Parses a number from 0 to below 1, such as a dropout.

    Raises:
        argparse.ArgumentTypeError: the text is no such number.
    """
    value = amount(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}: expected a number from 0 to below 1")
    return value


def more_than_zero(text: str) -> float:
    """Parses a number that is finite and above 0.

    Raises:
        argparse.ArgumentTypeError: the text is no such number.
    """
    value = amount(text)
    if not value:
        raise argparse.ArgumentTypeError(f"got {text!r}: expected a number above 0")
    return value
