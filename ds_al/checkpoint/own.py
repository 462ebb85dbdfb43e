"""What in a folder of checkpoints belongs to ds_al: tags, folders and files that a save may replace or remove.

Nothing else is ever removed: a folder of checkpoints may hold folders and files of the user.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ds_al.errors import ALCheckpointError

INDEX = "index.json"
LATEST = "latest"

_LONGEST = 200  # bytes; a checkpoint that is replaced gets a longer name for a moment
_FILE = re.compile(
    r"index\.json|layer_\d+-\w+\.safetensors|stage_\d+-(random_states\.safetensors|client_state\.pt)"
    r"|stage_\d+\.(done|failed)|\.(index\.json|stage_\d+\.(done|failed))\.part"
    r"|\.tmp\w{6}"  # what safetensors writes to, until the file is complete
)
_PART = re.compile(r"\.[0-9a-f]{12}-\d+\.part")
_OLD = re.compile(r"\..+\.[0-9a-f]+-\d+\.old")


def check_tag(tag: str, *, where: str) -> str:
    """Checks that a tag names a folder below the folder of checkpoints, and returns it.

    Args:
        where: what holds the tag, for errors.

    Raises:
        ALCheckpointError: it is empty, leads elsewhere, or is a name that ds_al itself uses.
    """
    parts = PurePosixPath(tag).parts
    if (
        not parts
        or tag.startswith("/")
        or any(part.startswith(".") for part in parts)
        or tag != tag.strip()
        or not tag.isprintable()
        or len(tag.encode()) > _LONGEST
        or tag in (LATEST, INDEX)
    ):
        raise ALCheckpointError(
            f"{where}: got the tag {tag[:_LONGEST]!r}: expected the name of a folder inside the folder of checkpoints, "
            f"such as 'epoch_1': at most {_LONGEST} bytes, without a dot at its start, '..', or {LATEST!r}"
        )
    return tag


def read_latest(root: Path) -> str:
    """Returns the tag of the last complete checkpoint.

    Raises:
        ALCheckpointError: there is no such file, or it holds no tag.
    """
    path = root / LATEST
    if not path.is_file():
        raise ALCheckpointError(f"no checkpoint in {str(root)!r}: expected a file {LATEST!r}, or give a tag")
    return check_tag(path.read_bytes().decode(errors="surrogateescape").strip(), where=str(path))


def check_free(folder: Path) -> None:
    """Checks that a save may write a folder: there is none, or a checkpoint of ds_al that it replaces.

    Raises:
        ALCheckpointError: the folder holds something else.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if not is_checkpoint(folder):
        raise ALCheckpointError(f"{str(folder)!r} is there, and no checkpoint of ds_al: choose another tag, or move it")
    if others := sorted(path.name for path in _others(folder)):
        raise ALCheckpointError(
            f"{str(folder)!r} is a checkpoint that also holds {', '.join(map(repr, others[:3]))}, which a save of the "
            "same tag would remove: choose another tag, or move the files"
        )


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a complete checkpoint of ds_al."""
    try:
        index = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(index, dict) and {"format", "blake2b", "layers", "stages"} <= index.keys()


def left_over(root: Path, folder: Path) -> Iterator[Path]:
    """Yields the hidden folders of saves into ``root``, and those of checkpoints that ``folder`` has replaced."""
    yield from (path for path in root.iterdir() if _PART.fullmatch(path.name))
    start = f".{folder.name}."
    yield from (path for path in folder.parent.iterdir() if path.name.startswith(start) and _OLD.fullmatch(path.name))


def remove(folder: Path) -> None:
    """Removes the files of a checkpoint, and the folder itself unless it holds others."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink(missing_ok=True)
        return
    if not any(_others(folder)):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in list(folder.iterdir()):
        if _FILE.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _others(folder: Path) -> Iterator[Path]:
    """Yields what is in a folder and no file of a checkpoint."""
    return (path for path in folder.iterdir() if not _FILE.fullmatch(path.name) or path.is_dir())
