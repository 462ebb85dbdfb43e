"""On-disk cache of decoded images, tokens and vocabularies.

Every file contains a digest of its name and its arrays, and is made anew where that does not match: files that are cut,
changed, or copied from another entry are never used. Nothing in a file is executed.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ds_al.errors import ALConfigError

Arrays = dict[str, np.ndarray]
_DIGEST = "digest"


def folder(cache: str | None) -> Path:
    """Returns the folder for decoded images, tokens and vocabularies, and makes it; ``cache`` is the config's value.

    Raises:
        ALConfigError: the folder cannot be made.
    """
    parent = Path(cache).expanduser() if cache is not None else Path(datasets.config.HF_DATASETS_CACHE)
    try:
        (parent / "ds_al").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(parent, error) from error
    return parent / "ds_al"


def key_of(made: str, table: datasets.Dataset, *options: Any) -> str:
    """Returns a file name without suffix that identifies contents by their table and options."""
    digest = hashlib.blake2b(repr((table._fingerprint, *options)).encode(), digest_size=16).hexdigest()
    return f"{made}-{digest}"


def kept(folder: Path, key: str, make: Callable[[], Arrays]) -> Arrays:
    """Returns the arrays of an entry: from its file, or else made and written.

    Raises:
        ALConfigError: the folder cannot be written to.
    """
    path = folder / f"{key}.npz"
    arrays = _read(path) if path.is_file() else None
    if arrays is None:
        arrays = make()
        _write(path, arrays)
    return arrays


def _read(path: Path) -> Arrays | None:
    """Reads a file of the cache; ``None``, with a note on stderr, if it is not what was written under this name."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if str(arrays.pop(_DIGEST)) == _digest(path.stem, arrays):
            return arrays
        reason = "its content was changed"
    except Exception as error:  # zipfile, zlib and numpy raise a dozen types for a file that is cut or none of theirs
        reason = f"{type(error).__name__}: {error}"
    print(f"ds_al: {path} is made anew: {reason}", file=sys.stderr)
    return None


def _write(path: Path, arrays: Arrays) -> None:
    """Writes the file atomically, since another rank may read it at the same time."""
    name = ""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **{_DIGEST: np.array(_digest(path.stem, arrays))}, **arrays)  # type: ignore[arg-type]
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True) if name else None
        if isinstance(error, OSError):
            raise _refused(path.parent, error) from error
        raise


def _digest(key: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(key.encode(), digest_size=16)
    for name, array in sorted(arrays.items()):
        digest.update(repr((name, array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _refused(folder: Path, error: OSError) -> ALConfigError:
    return ALConfigError(
        f"data cannot be cached in {str(folder)!r} ({error.strerror}): set experiment.data.cache to a folder that can "
        "be written to"
    )
