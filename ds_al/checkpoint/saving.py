"""Saving and loading of a stage's state, in DeepSpeed's folder structure, on any number of stages."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ds_al.checkpoint import optimizers, snapshot
from ds_al.checkpoint.check import Wanted, check, client_of, source_of
from ds_al.checkpoint.folder import Record, find, read_client_state, read_index, read_tensors
from ds_al.checkpoint.form import REMEDY
from ds_al.checkpoint.own import INDEX
from ds_al.checkpoint.parts import held
from ds_al.checkpoint.snapshot import DECODER, check_finite
from ds_al.checkpoint.state import StageState
from ds_al.checkpoint.writer import Destination, Writer
from ds_al.errors import ALCheckpointError
from ds_al.optim.masters import master_here
from ds_al.parallel import meetings
from ds_al.parallel.topology import StageTopology
from ds_al.system.plain import Tensors, unpack

Value = TypeVar("Value")


class Checkpoints:
    """Saves and loads the checkpoints of one stage. Every rank of the job must create one.

    Args:
        topology: place of this rank; the first replica writes.

    Attributes:
        best: folder of a checkpoint that saves keep, however many come after it; ``None`` for none.
    """

    def __init__(self, topology: StageTopology) -> None:
        session = meetings.broadcast(uuid.uuid4().hex[:12], source=0)
        self._stage = topology.stage
        self._loaded: Path | None = None
        self.best: Path | None = None
        self._writer = Writer(
            stage=topology.stage, ranks=topology.pipeline, session=session, writes=topology.replica == 0
        )

    def flush(self) -> None:
        """Waits until the current asynchronous save is complete.

        Raises:
            ALCheckpointError: the save failed.
        """
        self._writer.flush()

    def save(
        self,
        state: StageState,
        destination: Destination,
        *,
        client_state: Mapping[str, Any],
        leave_out_frozen: bool = False,
        asynchronous: bool = False,
        settle: Callable[[], None],
    ) -> None:
        """Saves a stage's state, see ``engine.save_checkpoint``.

        Args:
            destination: folder and tag.
            leave_out_frozen: whether to omit the weights that are not trained.
            asynchronous: whether to return once the state is copied to the host; a thread writes it.
            settle: waits until the numbers of all trained micro-batches are checked; raises if one is not finite.

        Raises:
            ALCheckpointError: on every rank, see there.
        """

        loaded = self._loaded if meetings.room() is not None else None  # a new process loads it again
        destination = replace(destination, needed=tuple(path for path in (loaded, self.best) if path is not None))

        def take() -> snapshot.Snapshot:
            settle()
            return snapshot.take(state, client_state, leave_out_frozen=leave_out_frozen)

        if asynchronous:
            self._writer.start(lambda: take().on_host(), destination)
        elif meetings.are_over():
            self._on_all(lambda: self._writer.skip(destination))
        else:
            self._on_all(lambda: self._writer.write(take, destination))

    def skip(self) -> None:
        """Counts a save that a process before this one has made."""
        self._writer.skip()

    def load(self, state: StageState, load_dir: str, tag: str | None, wanted: Wanted) -> tuple[str, dict[str, Any]]:
        """Restores a stage's state from a checkpoint, see ``engine.load_checkpoint``.

        Returns:
            The path of the checkpoint's index, and the client state.

        Raises:
            ALCheckpointError: on every rank, before any state is changed.
        """
        # The first stage writes `latest` after the others have finished, so they wait for it.
        self._on_all(self.flush)

        def validated() -> tuple[Path, Contents]:
            folder = find(load_dir, tag)
            index = read_index(folder)
            check(state, folder, index, wanted)
            try:
                return folder, read(state, folder, index, wanted)
            except ALCheckpointError:
                raise
            except Exception as error:  # with right hashes, and yet not what a save writes
                raise ALCheckpointError(
                    f"{str(folder)!r} holds what no save has written ({type(error).__name__}: {error}). {REMEDY}"
                ) from error

        folder, contents = self._on_all(validated)
        self._loaded = folder
        apply(state, contents, wanted)
        return str(folder / INDEX), contents.client_state

    def _on_all(self, step: Callable[[], Value]) -> Value:
        """Runs a step on every rank; an error on one of them is raised on all, so that none waits forever."""
        value: list[Value] = []
        problem = None
        try:
            value.append(step())
        except ALCheckpointError as error:
            problem = f"stage {self._stage}: {error}"
        except Exception as error:
            problem = f"stage {self._stage}: {type(error).__name__}: {error}"
        for text in meetings.gather(problem):
            if text is not None:
                raise ALCheckpointError(text)
        return value[0]


@dataclass
class Contents:
    """What a stage restores, read and checked, before any of its state changes."""

    index: Record
    weights: dict[int, Tensors] = field(default_factory=dict)
    losses: dict[int, Tensors] = field(default_factory=dict)
    optimizers: dict[str, dict[str, Any]] | None = None
    schedule: dict[str, Any] | None = None
    decoders: list[Tensors] = field(default_factory=list)
    random: dict[str, Any] = field(default_factory=dict)
    client_state: dict[str, Any] = field(default_factory=dict)


def read(state: StageState, folder: Path, index: Record, wanted: Wanted) -> Contents:
    """Reads all that this stage restores from a checkpoint that has passed :func:`check`.

    Raises:
        ALCheckpointError: a weight is NaN, or infinite where it is trained, or the client state runs code.
    """
    layers = {number: held(index["layers"][number], layer) for number, layer in state.layers}
    contents = Contents(index)
    for number, layer in state.layers:
        record = layers[number]
        saved = read_tensors(folder, index["layers"][number]["files"]["model_states"])
        weights: Tensors = {name: saved[name] for name in record["files"]["model_states"]["tensors"]}
        weights |= {name: unpack(value, saved) for name, value in record["extra"].items()}
        check_finite(number, layer, weights)
        contents.weights[number] = weights
    if not wanted.training:
        return contents
    tensors: dict[optimizers.Place, Tensors] = {}
    for number, record in layers.items():
        tensors[number, optimizers.TRAINING] = read_tensors(folder, record["files"]["training_states"])
        for role in record["optimizers"] if wanted.optimizer or wanted.schedule else ():
            tensors[number, role] = read_tensors(folder, record["files"][f"{role}_optim_states"])
        contents.losses[number] = {name: tensors[number, optimizers.TRAINING][name] for name in _LOSSES}
    if wanted.optimizer:
        contents.optimizers = optimizers.states_of(state, layers, tensors)
    if wanted.schedule:
        contents.schedule = optimizers.schedule_of(state, layers, tensors)
    for number in range(len(state.decoder_copies or ())):
        record = index["layers"][number]["files"]["training_states"]
        copies = tensors.get((number, optimizers.TRAINING)) or read_tensors(folder, record)
        contents.decoders.append(
            {name.removeprefix(DECODER): value for name, value in copies.items() if name.startswith(DECODER)}
        )
    source = index["stages"][source_of(state, index)]
    states = read_tensors(folder, source["files"]["random_states"])
    contents.random = snapshot.checked_random_states(source["random"], states)
    client = index["stages"][client_of(state, index)]["files"].get("client_state")
    contents.client_state = read_client_state(folder / client["file"]) if client else {}
    return contents


_LOSSES = ("losses/latest", "losses/history")


@torch.no_grad()
def apply(state: StageState, contents: Contents, wanted: Wanted) -> None:
    """Restores this stage from what :func:`read` returned."""
    index = contents.index
    for number, layer in state.layers:
        record, weights = index["layers"][number], contents.weights[number]
        layer.load_state_dict(weights, strict=wanted.strict and not record["left_out"])
        for name, parameter in layer.named_parameters():
            if name in weights and (master := master_here(parameter)) is not None:
                master.copy_(weights[name])
        scale = state.scales.get(number)
        if scale is not None and record["loss_scale"] and wanted.optimizer:
            scale.restore(record["loss_scale"])
    if not wanted.training:
        return
    if contents.optimizers is not None:
        optimizers.restore(state, contents.optimizers)
    if contents.schedule is not None:
        state.lr_scheduler.load_state_dict(contents.schedule)
    restore_losses(state, contents.losses)
    if state.decoder_copies is not None:
        for number, copies in enumerate(contents.decoders):
            state.decoder_copies.restore(number, copies)
    _counters(state, index)
    snapshot.set_random_states(contents.random)


def restore_losses(state: StageState, tensors: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Restores the losses of a stage's layers: the latest, and those since they were gathered.

    Args:
        tensors: of each layer, as :func:`~ds_al.checkpoint.snapshot.training_state` returned them.
    """
    for number, saved in tensors.items():
        state.report.losses[number] = saved["losses/latest"].to(state.report.losses.device)
    rows = [tensors[number]["losses/history"] for number, layer in state.layers if layer.ends]
    batches = len(next(iter(tensors.values()))["losses/history"])
    history = torch.stack(rows, dim=1) if rows else torch.zeros(batches, 0, 2)
    state.report.history = list(history.to(state.device))


def _counters(state: StageState, index: Record) -> None:
    state.counters = {name: index["counters"][name] for name in state.counters}
    state.loaded_stages = index["num_stages"]
    position = index["stages"][0]["data_position"]
    if state.loader is not None and position is not None:
        state.loader.seek(position)
