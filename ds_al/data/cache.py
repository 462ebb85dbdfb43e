"""Where what was made of a data set is kept, and under what name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import datasets


def folder(cache: str | None) -> Path:
    """The folder for decoded images, tokens and vocabularies; ``cache`` as the config gives it."""
    return (Path(cache).expanduser() if cache is not None else Path(datasets.config.HF_DATASETS_CACHE)) / "ds_al"


def key_of(made: str, table: datasets.Dataset, *options: Any) -> str:
    """A file name without suffix that differs where the contents would: by table and options."""
    digest = hashlib.blake2b(repr((table._fingerprint, *options)).encode(), digest_size=16).hexdigest()
    return f"{made}-{digest}"
