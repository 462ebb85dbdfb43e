"""Writes a checkpoint so that it is there as a whole or not at all, in this thread or in one of its own.

Every stage writes its files into one folder, ``.<session>-<number>.part``, and then a marker. The first stage, when it
sees the markers of all, writes the index, renames the folder to ``<tag>`` and then lets ``latest`` name it; the others
see the folder go. Stages so agree through files alone: no collective, for which a
stage would wait, is part of an asynchronous save. A failure is a marker, too, and is raised on all stages.
"""

from __future__ import annotations

import atexit
import json
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from ds_al.checkpoint.folder import (
    INDEX,
    LATEST,
    Record,
    sync,
    write_client_state,
    write_index,
    write_tensors,
    write_text,
)
from ds_al.checkpoint.snapshot import Snapshot
from ds_al.errors import ALCheckpointError

_POLL = 0.02
_PATIENCE = 300.0
"""Seconds in which no stage writes anything until the others give up on it."""

_WRITERS: weakref.WeakSet[Writer] = weakref.WeakSet()


@atexit.register
def _flush_all() -> None:
    """A script may end while its last checkpoint is being written."""
    for writer in list(_WRITERS):
        writer.flush()


@dataclass(frozen=True)
class Target:
    """Where a checkpoint goes."""

    root: Path
    tag: str
    latest: bool = True
    """Whether ``latest`` shall name it."""
    keep: int | None = None
    """How many complete checkpoints to keep in the folder, this one included."""


class Writer:
    """Writes one stage's part of checkpoints, one after another.

    Args:
        stage, stages: number of this stage, and of all.
        session: the same on all stages, and another one in every job.
        writes: whether this rank has files to write; a data parallel copy has none.
    """

    def __init__(self, *, stage: int, stages: int, session: str, writes: bool = True) -> None:
        self.stage, self.stages, self.session, self.writes = stage, stages, session, writes
        self._number = 0
        self._thread: threading.Thread | None = None
        self._failure: tuple[Target, BaseException] | None = None
        _WRITERS.add(self)

    def write(self, take: Callable[[], Snapshot], target: Target) -> None:
        """Writes what ``take`` gives; returns when the checkpoint is complete.

        Raises:
            ALCheckpointError: on all stages, if one of them could not write, or the stages are not at one batch.
        """
        self._begin(take, target)()

    def start(self, take: Callable[[], Snapshot], target: Target) -> None:
        """Writes what ``take`` gives, on the host, in a thread. Waits for the former one, if that is under way.

        Raises:
            ALCheckpointError: the former one failed, or ``take`` did.
        """
        write = self._begin(take, target)

        def work() -> None:
            try:
                write()
            except BaseException as error:
                self._failure = target, error

        self._thread = threading.Thread(target=work, name="ds_al checkpoint", daemon=True)
        self._thread.start()

    def flush(self) -> None:
        """Waits until the checkpoint that is being written is complete.

        Raises:
            ALCheckpointError: it failed.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            target, error = failure
            raise ALCheckpointError(
                f"the checkpoint {str(target.root / target.tag)!r}, saved while training went on, failed: "
                f"{error}. The one before it is untouched"
            ) from error

    # ---- one checkpoint ----------------------------------------------------------------------------

    def _begin(self, take: Callable[[], Snapshot], target: Target) -> Callable[[], None]:
        self._number += 1  # first: it has to stay the same on all stages
        self.flush()
        part = target.root / f".{self.session}-{self._number}.part"
        with self._telling(part):
            if self.writes:
                part.mkdir(parents=True, exist_ok=True)
            shot = take()
        return lambda: self._write(shot, part, target)

    def _write(self, shot: Snapshot, part: Path, target: Target) -> None:
        if not self.writes:
            return
        with self._telling(part):
            for record, what, name, tensors in shot.files:
                record.setdefault("files", {})[what] = write_tensors(part / name, tensors)
            if shot.client_state:
                path = part / f"stage_{self.stage:02d}-client_state.pt"
                shot.stage["files"]["client_state"] = write_client_state(path, shot.client_state)
            saved = {"common": {**shot.common, "tag": target.tag}, "stage": shot.stage, "layers": shot.layers}
            write_text(part / f"stage_{self.stage:02d}.done", json.dumps(saved))
        self._await(part, target)
        if self.stage == 0:
            with self._telling(part):
                _publish(part, target)

    @contextmanager
    def _telling(self, part: Path) -> Iterator[None]:
        """Lets the other stages know of what goes wrong inside."""
        try:
            yield
        except Exception as error:
            text = str(error) if isinstance(error, ALCheckpointError) else f"{type(error).__name__}: {error}"
            with suppress(OSError):
                write_text(part / f"stage_{self.stage:02d}.failed", f"stage {self.stage}: {text}")
            raise ALCheckpointError(f"{text} (writing to {str(part)!r})") from error

    def _await(self, part: Path, target: Target) -> None:
        """Waits until all stages have written; the others than the first until it has published."""
        seen, changed = -1, time.monotonic()
        while True:
            for failed in sorted(part.glob("*.failed")):
                raise ALCheckpointError(failed.read_text())
            done = {int(path.stem.split("_")[1]) for path in part.glob("*.done")}
            if len(done) == self.stages if self.stage == 0 else not part.exists():
                return
            written = _bytes(part)
            if written != seen:
                seen, changed = written, time.monotonic()
            elif time.monotonic() - changed > _PATIENCE:
                missing = sorted(set(range(self.stages)) - done) or [0]
                raise ALCheckpointError(
                    f"stages {missing} have written nothing for {_PATIENCE:.0f} s: all stages have to call "
                    f"save_checkpoint, and all have to see the folder {str(target.root)!r}"
                )
            time.sleep(_POLL)


def _publish(part: Path, target: Target) -> None:
    """Makes a complete folder the checkpoint of its tag."""
    done = sorted(part.glob("*.done"))
    write_index(part, _assemble([json.loads(path.read_text()) for path in done]))
    for path in done:
        path.unlink()
    sync(part)
    folder = target.root / target.tag
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        folder.rename(folder.with_name(f".{folder.name}{part.name.removesuffix('.part')}.old"))
    part.rename(folder)
    sync(folder.parent)
    if target.latest:
        write_text(target.root / LATEST, target.tag)
    _tidy(part, folder, target)


def _tidy(part: Path, folder: Path, target: Target) -> None:
    """Removes what was replaced, what has failed or was ended before, and checkpoints beyond the number to keep."""
    for left in (*folder.parent.glob(f".{escape(folder.name)}.*.old"), *target.root.glob(".*-*.part")):
        if left.suffix == ".old" or not _is_after(left, part):
            _remove(left)
    if target.keep is not None:
        complete = [path.parent for path in target.root.glob(f"[!.]*/{INDEX}") if path.parent != folder]
        complete.sort(key=lambda other: (other / INDEX).stat().st_mtime_ns)
        for other in complete[: max(len(complete) - target.keep + 1, 0)]:
            _remove(other)


def _is_after(other: Path, part: Path) -> bool:
    """Whether a stage has begun this folder of the same job already, being through with ``part``."""
    (session, number), (other_session, other_number) = part.stem.rsplit("-", 1), other.stem.rsplit("-", 1)
    return other_session == session and int(other_number) > int(number)


def _assemble(stages: list[Record]) -> Record:
    """The index, from what all stages say.

    Raises:
        ALCheckpointError: they are not of one batch.
    """
    first = stages[0]["common"]
    for number, stage in enumerate(stages):
        for key, value in stage["common"].items():
            if value != first[key]:
                raise ALCheckpointError(
                    f"stage {number} has {key} {value}, stage 0 has {first[key]}: call save_checkpoint after the same "
                    "batch on all stages"
                )
    return {
        **first,
        "stages": [stage["stage"] for stage in stages],
        "layers": [layer for stage in stages for layer in stage["layers"]],
    }


def _bytes(folder: Path) -> int:
    """What has been written to a folder, which may go meanwhile."""
    try:
        return sum(path.stat().st_size for path in folder.glob("*"))
    except OSError:
        return 0


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
