"""Atomic writer of checkpoints, synchronous or in a background thread.

Every stage writes its files into one folder, ``.<session>-<number>.part``, and then a marker. Once the markers of all
stages exist, the first stage writes the index, renames the folder to ``<tag>`` and updates ``latest``; the other stages
wait until the folder is renamed. Stages coordinate through files alone: an asynchronous save needs no collective, for
which a stage would have to wait. A failure is reported by a marker, too, and raised on all stages.
"""

from __future__ import annotations

import atexit
import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ds_al.checkpoint import own
from ds_al.checkpoint.folder import (
    Record,
    sync,
    write_client_state,
    write_index,
    write_tensors,
    write_text,
)
from ds_al.checkpoint.form import CLIENT, stage_file
from ds_al.checkpoint.parts import join
from ds_al.checkpoint.snapshot import Snapshot
from ds_al.errors import ALCheckpointError
from ds_al.parallel import meetings, presence

_POLL = 0.02
_PATIENCE = 300.0
"""Timeout in seconds without any progress in the folder."""
_LATE = 5.0
"""Seconds after which every host sees a renamed folder, and in which stages write on where a rank has failed."""

_WRITERS: weakref.WeakSet[Writer] = weakref.WeakSet()


@atexit.register
def _flush_all() -> None:
    """Completes the checkpoints that are still being written when the script ends."""
    for writer in list(_WRITERS):
        writer.flush()


@dataclass(frozen=True)
class Destination:
    """Folder and tag of a checkpoint to write."""

    root: Path
    tag: str
    latest: bool = True
    """Whether to update ``latest``."""
    keep: int | None = None
    """Number of complete checkpoints to keep in the folder, including this one; ``None`` keeps all."""
    needed: tuple[Path, ...] = ()
    """Folders of checkpoints that are kept beside those."""

    @property
    def folder(self) -> Path:
        """The folder of the checkpoint."""
        return self.root / self.tag


class Writer:
    """Writes one stage's part of checkpoints, one after another.

    Args:
        stage: index of this stage.
        ranks: the ranks that write, by stage.
        session: identifier of the job, equal on all stages.
        writes: whether this rank writes files; only the first replica does.
    """

    def __init__(self, *, stage: int, ranks: Sequence[int], session: str, writes: bool = True) -> None:
        self.stage, self.ranks, self.session, self.writes = stage, ranks, session, writes
        self.stages = len(ranks)
        self._number = 0
        self._thread: threading.Thread | None = None
        self._failure: tuple[Destination, BaseException] | None = None
        _WRITERS.add(self)

    def write(self, take: Callable[[], Snapshot], destination: Destination) -> None:
        """Writes the snapshot returned by ``take``; returns once the checkpoint is complete.

        Raises:
            ALCheckpointError: on all stages, if one of them could not write, or the stages are at different batches.
        """
        self._begin(take, destination)()

    def start(self, take: Callable[[], Snapshot], destination: Destination) -> None:
        """Writes the host snapshot returned by ``take`` in a thread. Waits first until the previous save is complete.

        Raises:
            ALCheckpointError: the previous save failed, or ``take`` failed.
        """
        write = self._begin(take, destination)

        def work() -> None:
            try:
                write()
            except BaseException as error:
                self._failure = destination, error

        self._thread = threading.Thread(target=work, name="ds_al checkpoint", daemon=True)
        self._thread.start()

    def flush(self) -> None:
        """Waits until the current save is complete.

        Raises:
            ALCheckpointError: the save failed.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            destination, error = failure
            raise ALCheckpointError(
                f"the checkpoint {str(destination.folder)!r}, saved while training went on, failed: "
                f"{_named(error)}. The one before it is untouched"
            ) from error

    def skip(self, destination: Destination | None = None) -> None:
        """Counts a save that a process before this one has written.

        Args:
            destination: of a save that is complete, except perhaps for ``latest``; by default nothing is left to do.
        """
        self._number += 1
        if destination is not None and destination.latest and self.stage == 0:
            write_text(destination.root / own.LATEST, destination.tag)

    # ---- one checkpoint ----------------------------------------------------------------------------

    def _begin(self, take: Callable[[], Snapshot], destination: Destination) -> Callable[[], None]:
        self._number += 1  # before anything can fail: it must stay equal on all stages
        self.flush()
        own.check_tag(destination.tag, where="save_checkpoint")
        part = destination.root / f".{self.session}-{self._number}.part"
        with self._reporting(part):
            if self.writes:
                part.mkdir(parents=True, exist_ok=True)
            own.check_free(destination.folder)
            shot = take()
        return lambda: self._write(shot, part, destination)

    def _write(self, shot: Snapshot, part: Path, destination: Destination) -> None:
        if not self.writes:
            return
        with self._reporting(part):
            for record, what, name, tensors in shot.files:
                record.setdefault("files", {})[what] = write_tensors(part / name, tensors)
            if shot.client_state:
                path = part / stage_file(self.stage, CLIENT)
                shot.stage["files"]["client_state"] = write_client_state(path, shot.client_state)
            saved = {"common": {**shot.common, "tag": destination.tag}, "stage": shot.stage, "layers": shot.layers}
            write_text(part / f"stage_{self.stage:02d}.done", json.dumps(saved))
        self._await(part, destination)
        if self.stage == 0:
            with self._reporting(part):
                _publish(part, destination)

    @contextmanager
    def _reporting(self, part: Path) -> Iterator[None]:
        """Reports an exception inside to the other stages, by a marker."""
        try:
            yield
        except BaseException as error:
            text = _named(error)
            with suppress(OSError):
                write_text(part / f"stage_{self.stage:02d}.failed", f"stage {self.stage}: {text}")
            if not isinstance(error, Exception):  # sys.exit() or Ctrl-C
                raise
            raise ALCheckpointError(f"{text} (writing to {str(part)!r})") from error

    def _await(self, part: Path, destination: Destination) -> None:
        """Waits until all stages have written; on other stages than the first, until that one has published."""
        seen, changed = -1, time.monotonic()
        while True:
            absent = presence.here().absent()  # before the look: what a process writes, it has written by then
            names = _names(part)
            if names is None and self.stage != 0:  # the first stage has renamed the folder
                return _check_published(part, destination)
            if self.stage == 0 and "stage_00.done" not in (names or ()):
                raise _removed(part)
            markers = sorted(names or ())
            for failed in (name for name in markers if name.endswith(".failed")):
                raise ALCheckpointError((part / failed).read_text())
            done = {int(name.removesuffix(".done").split("_")[1]) for name in markers if name.endswith(".done")}
            if self.stage == 0 and len(done) == self.stages:
                return
            written = _bytes(part)
            if written != seen:
                seen, changed = written, time.monotonic()
            missing = sorted(set(range(self.stages)) - done) or [0]
            ended = [stage for stage in missing if self.ranks[stage] in absent]
            if ended or (presence.here().fails() and time.monotonic() - changed > _LATE):
                raise ALCheckpointError(
                    f"stages {ended or missing} {'have ended' if ended else 'are late'} before they had written to "
                    f"{str(part)!r}: {presence.here().cause()}"
                )
            if time.monotonic() - changed > _PATIENCE:
                raise ALCheckpointError(
                    f"stages {missing} have written nothing for {_PATIENCE:.0f} s: all stages have to call "
                    f"save_checkpoint, and all have to see the folder {str(destination.root)!r}"
                )
            meetings.attend()
            time.sleep(_POLL)


def _named(error: BaseException) -> str:
    return str(error) if isinstance(error, ALCheckpointError) else f"{type(error).__name__}: {error}"


def _check_published(part: Path, destination: Destination) -> None:
    """Checks that a folder which is no longer there has become the checkpoint; other hosts may see that late."""
    end = time.monotonic() + _LATE
    while not own.is_checkpoint(destination.folder):
        if time.monotonic() > end:
            raise _removed(part)
        time.sleep(_POLL)


def _removed(part: Path) -> ALCheckpointError:
    return ALCheckpointError(f"the folder {str(part)!r} was removed while it was written")


def _publish(part: Path, destination: Destination) -> None:
    """Writes the index into a complete folder, and renames it to its tag."""
    done = sorted(part.glob("*.done"))
    write_index(part, _assemble(part, [json.loads(path.read_text()) for path in done]))
    for path in done:
        path.unlink()
    sync(part)
    folder = destination.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    own.check_free(folder)
    if folder.exists():
        folder.rename(folder.with_name(f".{folder.name}{part.name.removesuffix('.part')}.old"))
    part.rename(folder)
    sync(folder.parent)
    if destination.latest:
        write_text(destination.root / own.LATEST, destination.tag)
    _tidy(part, folder, destination)


def _tidy(part: Path, folder: Path, destination: Destination) -> None:
    """Removes replaced checkpoints, incomplete ones, and the oldest beyond the number to keep."""
    for left in list(own.left_over(destination.root, folder)):
        if left.suffix == ".old" or not _is_after(left, part):
            own.remove(left)
    if destination.keep is not None:
        folders = (path.parent for path in destination.root.glob(f"[!.]*/{own.INDEX}") if path.parent != folder)
        needed = {path.resolve() for path in destination.needed}
        complete = [other for other in folders if own.is_checkpoint(other) and other.resolve() not in needed]
        complete.sort(key=lambda other: (other / own.INDEX).stat().st_mtime_ns)
        for other in complete[: max(len(complete) - destination.keep + 1, 0)]:
            own.remove(other)


def _is_after(other: Path, part: Path) -> bool:
    """Whether a folder is of a later save of the same job, which a faster stage has begun already."""
    (session, number), (other_session, other_number) = part.stem.rsplit("-", 1), other.stem.rsplit("-", 1)
    return other_session == session and int(other_number) > int(number)


def _assemble(part: Path, stages: list[Record]) -> Record:
    """Builds the index from the records of all stages, and joins the files of layers that span several stages.

    Raises:
        ALCheckpointError: the stages are at different batches.
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
        "layers": join(part, [layer for stage in stages for layer in stage["layers"]]),
    }


def _names(folder: Path) -> list[str] | None:
    """Returns the names in a folder in one look, which a rename cannot cut in two; ``None`` if there is no folder."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return None


def _bytes(folder: Path) -> int:
    """Returns the bytes written to a folder, or 0 once it is renamed."""
    try:
        return sum(path.stat().st_size for path in folder.glob("*"))
    except OSError:
        return 0
