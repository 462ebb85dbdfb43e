"""Validation of a checkpoint against a stage, before any state is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_al.checkpoint import optimizers
from ds_al.checkpoint.folder import Record, kinds, verify
from ds_al.checkpoint.parts import held
from ds_al.checkpoint.snapshot import given_weights, modules
from ds_al.checkpoint.state import StageState
from ds_al.config.base import BLOCK
from ds_al.errors import ALCheckpointError
from ds_al.layer import ALLayer


@dataclass(frozen=True)
class Wanted:
    """Selects the parts of a checkpoint to load."""

    training: bool = True
    """Whether to load the whole training state, not the weights alone."""
    optimizer: bool = True
    """Whether to load the optimizer states."""
    schedule: bool = True
    """Whether to load the LR schedule."""
    strict: bool = True
    """Whether the names of all weights must match."""


def check(state: StageState, folder: Path, index: Record, wanted: Wanted) -> None:
    """Compares a checkpoint with this stage, and the files to load with their hashes.

    Raises:
        ALCheckpointError: the checkpoint is of another network or job, or a file is missing, truncated or altered.
    """
    if index["num_layers"] != state.module.num_layers:
        raise ALCheckpointError(
            f"the checkpoint has {index['num_layers']} AL layers, this network {state.module.num_layers}"
        )
    if wanted.training:
        _same_job(state, index)
    layers = {number: held(index["layers"][number], layer) for number, layer in state.layers}
    for number, layer in state.layers:
        _same_layer(number, layer, layers[number], wanted)
        verify(folder, _files(layers[number], wanted), of=f"AL layer {number}")
    if not wanted.training:
        return
    if wanted.optimizer:
        optimizers.check(state, layers)
    if wanted.schedule:
        optimizers.check_schedule(state, layers)
    if state.decoder_copies is not None:
        for number in range(len(state.decoder_copies)):
            _has_copy(state, number, index["layers"][number])
            verify(folder, [index["layers"][number]["files"]["training_states"]], of=f"AL layer {number}")
    for stage in {source_of(state, index), client_of(state, index)}:
        verify(folder, index["stages"][stage]["files"].values(), of=f"stage {stage}")


def source_of(state: StageState, index: Record) -> int:
    """Returns the saved stage that held this stage's first layer: its random states are restored here."""
    return int(index["layers"][state.layers[0][0]]["stage"])


def client_of(state: StageState, index: Record) -> int:
    """Returns the saved stage whose ``client_state`` is restored: the same index, or 0 for other numbers of stages."""
    return state.stage if index["num_stages"] == state.topology.stages else 0


def _files(layer: Record, wanted: Wanted) -> list[Record]:
    files: Mapping[str, Record] = layer["files"]
    return [
        record
        for what, record in files.items()
        if what == "model_states"
        or (wanted.training and (wanted.optimizer or wanted.schedule or not what.endswith("_optim_states")))
    ]


def _same_job(state: StageState, index: Record) -> None:
    for key, value in {"base_seed": state.module.base_seed, "micro_batch_size": state.micro_batch_size}.items():
        if index[key] != value:
            raise ALCheckpointError(
                f"the checkpoint has {key}={index[key]}, this job {value}: its data order and random numbers would "
                "differ. Use the same, or load the weights alone with load_module_only=True"
            )
    steps = {index.get("step_after", "config"), state.step_after}  # no key in checkpoints of former releases
    if steps == {"batch", "micro_batch"}:
        raise ALCheckpointError(
            f"the checkpoint was trained with a step after every {index['step_after']}, this job steps after every "
            f'{state.step_after}: by default layers that span stages, K < P, step once per batch. Set "{BLOCK}.'
            'steps_per_batch", 1 or the number of micro-batches'
        )
    saved, own = index.get("network"), state.module.source
    if saved is not None and own is not None:
        there, here = saved.get("classifier_pooling"), own.description["classifier_pooling"]
        if there != here:
            raise ALCheckpointError(
                f"the checkpoint was trained with classifier_pooling={there!r}, this network has {here!r}: its scores "
                "would change. Use the same, or load the weights alone with load_module_only=True"
            )


def _same_layer(number: int, layer: ALLayer, saved: Record, wanted: Wanted) -> None:
    there: Mapping[str, Any] = saved["files"]["model_states"]["tensors"]
    here = kinds(given_weights(layer))
    left_out = set(saved["left_out"])
    for name in sorted(there.keys() | (here.keys() - left_out)):
        one, two = there.get(name), here.get(name)
        if one != two and (wanted.strict or (one is not None and two is not None)):
            raise ALCheckpointError(
                f"the checkpoint is of another network: AL layer {number}, {name} is {_named(one)} in "
                f"{saved['files']['model_states']['file']!r}, {_named(two)} here"
            )
    if not wanted.training or not wanted.strict:
        return
    classes, mine = saved["modules"], modules(layer)
    for name in sorted(classes.keys() | mine.keys()):
        if classes.get(name) != mine.get(name):
            raise ALCheckpointError(
                f"the checkpoint is of another network: AL layer {number}, {name or 'the layer'} is a "
                f"{classes.get(name, 'missing module')} there, a {mine.get(name, 'missing module')} here. The weights "
                "alone can be loaded with load_module_only=True"
            )


def _named(kind: list[Any] | None) -> str:
    return f"{kind[0]} of shape {kind[1]}" if kind else "missing"


def _has_copy(state: StageState, number: int, saved: Record) -> None:
    assert state.decoder_copies is not None
    there = saved["files"]["training_states"]["tensors"]
    for name, kind in kinds(state.decoder_copies.state(number)).items():
        if there.get(f"decoder/{name}") != kind:
            raise ALCheckpointError(
                f"the checkpoint has no fitting copy of the decoder of AL layer {number}: {name} is "
                f"{_named(there.get(f'decoder/{name}'))} there, {_named(kind)} here"
            )
