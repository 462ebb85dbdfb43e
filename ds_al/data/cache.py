"""Location and keys of the on-disk cache for decoded images and tokenized text."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import datasets


def folder(cache: str | None) -> Path:
    """Returns the folder for decoded images, tokens and vocabularies; ``cache`` is the config's value."""
    return (Path(cache).expanduser() if cache is not None else Path(datasets.config.HF_DATASETS_CACHE)) / "ds_al"


def key_of(made: str, table: datasets.Dataset, *options: Any) -> str:
    """Returns a file name without suffix that identifies contents by their table and options."""
    digest = hashlib.blake2b(repr((table._fingerprint, *options)).encode(), digest_size=16).hexdigest()
    return f"{made}-{digest}"
