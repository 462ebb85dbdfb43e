"""``recovery.jsonl``: what happened when processes died, one JSON object per line, written by keepers and workers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "recovery.jsonl"
ENDS = ("death", "ended")
"""Events with which a process is gone: it has died, or its keeper has ended it since another one of its group has."""


def tell(folder: Path, event: str, **facts: Any) -> None:
    """Adds a line; whole lines of several processes do not mix."""
    line = json.dumps({"event": event, "moment": time.time(), **facts}) + "\n"
    file = os.open(folder / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def read(folder: Path) -> list[Mapping[str, Any]]:
    """Returns all events of a folder, in their order; none where nothing has happened."""
    path = folder / FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
