"""Saves of one stage's own state, every n micro-batches, into its own folder, and the point to restart from.

::

    stage i      saves   20  30  40          restart point: its newest save that the restart point of stage i + 1 has
    stage i + 1  saves   20  30              reached, 20 or 30 here; the last stage's is its newest save

Whatever a later stage may ask for again is thus trained again from there on, or still in the log of this stage. The
stages of a group (an AL layer on several stages) have one restart point: the newest save that all of them have and the
restart point of the next group has reached. A thread writes a save, posts the restart point, and removes the saves
before it. A save outlives the process, not the machine: it is not flushed to the disk itself.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ds_al.checkpoint import optimizers, saving, snapshot
from ds_al.checkpoint.check import Wanted
from ds_al.checkpoint.folder import Record
from ds_al.checkpoint.saving import Contents
from ds_al.checkpoint.state import StageState
from ds_al.errors import ALRecoveryError
from ds_al.parallel import worker
from ds_al.system.plain import Tensors, pack, unpack

_LOOK = 0.2  # seconds between two looks at the restart point of the next stage
_RECORDS, _TENSORS = "state.json", "state.safetensors"


@dataclass
class _Save:
    """A save on its way to the disk."""

    position: int
    records: Record
    tensors: Tensors


class Saves:
    """Writes and reads the saves of one stage.

    Args:
        folder: of this stage.
        stage, stages: index of the stage, and number of stages.
        group: the stages whose processes are replaced together with that of this one, itself included.
    """

    def __init__(self, folder: Path, *, stage: int, stages: int, group: range) -> None:
        self._folder, self._stage, self._group, self._is_last = folder, stage, group, group.stop == stages
        folder.mkdir(parents=True, exist_ok=True)
        self._store = worker.open_store()
        self.restart_point = self._posted("restart", group.start)
        """Micro-batches after which a new process of this stage begins, and of all stages of its group."""
        self._reached = self.restart_point  # by this process: it still needs the messages after that
        self._post("reached", stage, self._reached)
        self.next_restart_point = 0
        """The same of the next group, as far as it is known."""
        for left in folder.glob("*.part"):
            shutil.rmtree(left)
        self._work: _Save | None = None
        self._wake, self._idle = threading.Event(), threading.Event()
        self._idle.set()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ds_al saves", daemon=True)
        self._thread.start()

    # ---- this stage's state ------------------------------------------------------------------------

    def has(self, position: int) -> bool:
        """Whether there is a save of this position."""
        return (self._folder / str(position)).is_dir()

    def decoders(self, position: int) -> int:
        """Returns how often the copies of decoders had been refreshed before a position."""
        path = self._folder / str(position) / _RECORDS
        return json.loads(path.read_text())["decoders"] if path.exists() else 0

    def save(self, state: StageState, position: int, *, decoders: int, more: Mapping[str, Any]) -> None:
        """Copies the state of the stage; a thread writes it. Waits until the save before is written.

        Args:
            position: micro-batches that are trained.
            decoders: how often copies of decoders were refreshed in this run.
            more: what else the stage keeps, in a plain form.

        Raises:
            ALRecoveryError: a save could not be written.
        """
        self._idle.wait()
        if self._failure is not None:
            raise ALRecoveryError(f"recovery: a save in {str(self._folder)!r} failed: {self._failure}")
        if self.has(position):  # of a process before this one, and equal
            self._reached = position
            return
        shot = snapshot.take(state, {}).on_host()
        tensors: Tensors = {}
        records: Record = {"stage": shot.stage, "counters": shot.common["counters"], "layers": shot.layers}
        self._add_training_states(state, shot)
        records["decoders"] = decoders
        for record, what, name, own in shot.files:
            record.setdefault("files", {})[what] = {"file": name, "tensors": list(own)}
            tensors |= {f"{name}/{key}": value.contiguous() for key, value in own.items()}
        copies = state.decoder_copies
        records["copies"] = [list(copies.state(number)) for number in range(len(copies))] if copies else []
        for number, names in enumerate(records["copies"]):
            assert copies is not None
            own = copies.state(number)
            tensors |= {f"copy {number}/{name}": own[name].to("cpu", copy=True).contiguous() for name in names}
        extra: Tensors = {}
        records["more"] = pack(dict(more), extra, at="more")
        tensors |= {name: value.to("cpu", copy=True).contiguous() for name, value in extra.items()}
        self._work = _Save(position, records, tensors)
        self._idle.clear()
        self._wake.set()

    @staticmethod
    def _add_training_states(state: StageState, shot: snapshot.Snapshot) -> None:
        """Adds what a checkpoint takes from the last stage of a group alone: LR schedule, loss scale, losses."""
        for (index, layer), record in zip(state.layers, shot.layers, strict=True):
            if not layer.ends:
                entries, own = snapshot.training_state(state, index, torch.zeros(len(state.report.history), 2))
                record |= entries
                shot.files.append((record, "training_states", f"layer_{index}_training_states", own))

    def load(self, state: StageState, position: int) -> dict[str, Any]:
        """Restores the stage, and returns what else was saved. Counters are set in the state alone."""
        folder = self._folder / str(position)
        records: Record = json.loads((folder / _RECORDS).read_text())
        saved = {name: value.clone() for name, value in load_file(folder / _TENSORS).items()}
        layers = {record["layer"]: record for record in records["layers"]}
        index = {**records, "layers": layers, "num_stages": state.topology.stages, "stages": {0: records["stage"]}}
        saving.apply(state, _contents(state, index, saved), Wanted())
        return unpack(records["more"], saved)

    # ---- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                self._wake.wait(_LOOK)
                self._wake.clear()
                if self._work is not None:
                    self._write(self._work)
                    self._work = None
                    self._idle.set()
                self._advance()
        except BaseException as error:
            self._failure = error
            self._idle.set()

    def _write(self, save: _Save) -> None:
        part = self._folder / f"{save.position}.part"
        part.mkdir()
        save_file(save.tensors, part / _TENSORS)
        (part / _RECORDS).write_text(json.dumps(save.records))
        part.rename(self._folder / str(save.position))
        self._reached = save.position

    def _advance(self) -> None:
        """Posts the restart point, where it has moved, and removes the saves before it.

        All stages save at the same micro-batches, and only the first one of a group moves its restart point: a process
        that begins at a point finds it unchanged until all processes of the group have begun there.
        """
        self._post("reached", self._stage, self._reached)
        reached = [self._posted("reached", stage) for stage in self._group]
        if not self._is_last:
            self.next_restart_point = self._posted("restart", self._group.stop)
            reached.append(self.next_restart_point)
        if self._stage == self._group.start and min(reached) > self.restart_point:
            self._post("restart", self._stage, min(reached))
        self.restart_point = self._posted("restart", self._group.start)
        for path in self._folder.iterdir():
            if path.name.isdigit() and int(path.name) < self.restart_point:
                shutil.rmtree(path)

    def _post(self, what: str, stage: int, position: int) -> None:
        self._store.set(f"{what}/{stage}", str(position))

    def _posted(self, what: str, stage: int) -> int:
        key = f"{what}/{stage}"
        return int(self._store.get(key)) if self._store.check([key]) else 0


def _contents(state: StageState, index: Record, saved: Mapping[str, Tensor]) -> Contents:
    """The parts of a save, in the form in which a checkpoint is restored."""

    def tensors(record: Record, what: str) -> Tensors:
        file = record["files"][what]
        return {name: saved[f"{file['file']}/{name}"] for name in file["tensors"]}

    contents = Contents(index)
    by_place: dict[optimizers.Place, Tensors] = {}
    layers = index["layers"]
    for number, record in layers.items():
        weights = tensors(record, "model_states")
        contents.weights[number] = weights | {name: unpack(v, weights) for name, v in record["extra"].items()}
        by_place[number, optimizers.TRAINING] = tensors(record, "training_states")
        for role in record["optimizers"]:
            by_place[number, role] = tensors(record, f"{role}_optim_states")
        contents.losses[number] = {
            name: by_place[number, optimizers.TRAINING][name] for name in ("losses/latest", "losses/history")
        }
    contents.optimizers = optimizers.states_of(state, layers, by_place)
    contents.schedule = optimizers.schedule_of(state, layers, by_place)
    contents.decoders = [
        {name: saved[f"copy {number}/{name}"] for name in names} for number, names in enumerate(index["copies"])
    ]
    contents.random = snapshot.checked_random_states(index["stage"]["random"], tensors(index["stage"], "random_states"))
    return contents
