"""Snapshot of one stage for a checkpoint: records and tensors of each layer, and of the stage itself."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from ds_al.checkpoint import optimizers
from ds_al.checkpoint.folder import FORMAT, Record
from ds_al.checkpoint.form import RANDOM, stage_file
from ds_al.checkpoint.parts import part_file
from ds_al.checkpoint.state import StageState
from ds_al.errors import ALCheckpointError
from ds_al.layer import ALLayer
from ds_al.optim.finite import not_finite
from ds_al.optim.masters import full_state
from ds_al.partition.part import LayerPart
from ds_al.system.plain import Tensors, check_dense, pack, unpack
from ds_al.system.versions import release

DECODER = "decoder/"
"""Begins the names of the weights of a copy of a decoder."""


@dataclass
class Snapshot:
    """One stage's part of a checkpoint. After :meth:`on_host` it can be written while training continues."""

    common: Record
    """Entries that must be equal on all stages."""
    stage: Record
    layers: list[Record]
    files: list[tuple[Record, str, str, Tensors]] = field(default_factory=list)
    """``(record of the layer or stage, kind of file, file name, tensors)``"""
    client_state: Mapping[str, Any] = field(default_factory=dict)

    def on_host(self) -> Snapshot:
        """Copies all tensors to the host, and returns the snapshot itself."""
        for *_, tensors in self.files:
            for name, value in tensors.items():
                tensors[name] = value.detach().to("cpu", copy=True)
        self.client_state = _copied(self.client_state)
        return self


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def take(state: StageState, client_state: Mapping[str, Any], *, leave_out_frozen: bool = False) -> Snapshot:
    """Takes a snapshot of this stage between two batches. Its tensors are those of the engine, not copies.

    Args:
        leave_out_frozen: whether to omit the weights that are not trained.

    Raises:
        ALCheckpointError: a value cannot be saved, or a weight is NaN or infinite.
    """
    shot = Snapshot(_common(state), _stage(state), [], client_state=client_state)
    shot.files.append((shot.stage, "random_states", stage_file(state.stage, RANDOM), {}))
    shot.stage["random"] = pack(random_states(), shot.files[-1][3], at="random")
    # A collective: replicas of a stage that shard its optimizer state gather it here.
    states, masters = (None, None) if state.optimizer is None else state.optimizer.gather()
    optimizer_states = optimizers.collect(state, states)
    history = kept_losses(state)
    for row, (index, layer) in enumerate(state.layers):
        record: Record = {"layer": index, "stage": state.stage, "modules": modules(layer), "optimizers": {}}
        shot.layers.append(record)
        weights: Tensors = {}
        frozen = {name for name, p in layer.named_parameters() if not p.requires_grad} if leave_out_frozen else set()
        values = {name: value for name, value in full_state(layer, masters).items() if name not in frozen}
        check_finite(index, layer, values)
        record["left_out"] = sorted(frozen)
        record["extra"] = {n: pack(v, weights, at=n) for n, v in values.items() if not isinstance(v, Tensor)}
        weights |= {name: value for name, value in values.items() if isinstance(value, Tensor)}
        for name, value in weights.items():
            check_dense(value, at=f"AL layer {index}, {name}")
        shot.files.append((record, "model_states", part_file(layer, index, "model_states"), weights))
        for role, (saved, tensors) in optimizer_states[index].items():
            record["optimizers"][role] = saved
            name = part_file(layer, index, f"{role}_optim_states")
            shot.files.append((record, f"{role}_optim_states", name, tensors))
        if not layer.ends:  # losses and copies of decoders are on the last stage of a group
            continue
        entries, training = training_state(state, index, history[:, row])
        record |= entries
        shot.files.append((record, "training_states", part_file(layer, index, "training_states"), training))
    return shot


def kept_losses(state: StageState) -> Tensor:
    """Returns the losses ``(batches, layers, 2)`` since they were gathered."""
    return torch.stack(state.report.history) if state.report.history else torch.zeros(0, len(state.layers), 2)


def training_state(state: StageState, index: int, history: Tensor) -> tuple[Record, Tensors]:
    """Returns what belongs to a layer beside its weights and its optimizers: entries of its record, and tensors.

    Args:
        history: losses ``(batches, 2)`` of the layer.
    """
    tensors: Tensors = {"losses/latest": state.report.losses[index], "losses/history": history}
    if state.decoder_copies is not None and index < len(state.decoder_copies):
        tensors |= {f"{DECODER}{name}": value for name, value in state.decoder_copies.state(index).items()}
    scale = state.scales.get(index)
    record = {
        "loss_scale": None if scale is None else scale.state(),
        "schedule": optimizers.collect_schedule(state, tensors),
    }
    return record, tensors


def check_finite(index: int, layer: ALLayer, values: Mapping[str, Any]) -> None:
    """Checks the weights of a layer, to be saved or loaded; a frozen one may be infinite, as a mask is.

    Raises:
        ALCheckpointError: a weight is NaN or infinite.
    """
    for name, parameter in layer.named_parameters():
        if name in values and (bad := not_finite(values[name], masks=not parameter.requires_grad)) is not None:
            raise ALCheckpointError(
                f"AL layer {index}, weight {name} holds {bad}, which a checkpoint must not: go on from an earlier one, "
                "with a lower learning rate"
            )


def _common(state: StageState) -> Record:
    return {
        "format": FORMAT,
        "versions": {"ds_al": release("ds_al"), "deepspeed": release("deepspeed"), "torch": torch.__version__},
        "num_layers": state.module.num_layers,
        "num_classes": state.module.num_classes,
        # None if the network was not built from a transformers model, and so cannot be exported from the folder.
        "network": state.module.source.description if state.module.source is not None else None,
        "num_stages": state.topology.stages,
        "partition": [int(bound) for bound in state.module.parts],
        "base_seed": state.module.base_seed,
        "micro_batch_size": state.micro_batch_size,
        "step_after": state.step_after,
        "counters": dict(state.counters),
    }


def _stage(state: StageState) -> Record:
    return {"stage": state.stage, "data_position": state.loader.position if state.loader is not None else None}


def modules(layer: ALLayer) -> dict[str, str]:
    """Returns the class of every module of a layer by name, to distinguish layers with equal shapes."""
    found = {name: type(module).__name__ for name, module in layer.named_modules()}
    return found | ({"": ALLayer.__name__} if isinstance(layer, LayerPart) else {})


def given_weights(layer: nn.Module) -> Tensors:
    """Returns all tensors of a layer's state, in full precision."""
    return {name: value for name, value in full_state(layer).items() if isinstance(value, Tensor)}


# ---- the host's random numbers ---------------------------------------------------------------------


def random_states() -> dict[str, Any]:
    """Returns the states of torch's, numpy's and Python's generators. Layers reseed, so they do not depend on these."""
    accelerator = get_accelerator()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "device": accelerator.get_rng_state() if accelerator.device_name() != "cpu" else None,
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "python": random.getstate(),
    }


def checked_random_states(record: Any, tensors: Tensors) -> dict[str, Any]:
    """Returns the states that :func:`random_states` returned, after generators of their kinds have taken them.

    Raises:
        ValueError, KeyError, TypeError, RuntimeError: they are no such states.
    """
    states = unpack(record, tensors)
    torch.Generator().set_state(states["torch"])
    kind, keys, *rest = states["numpy"]
    states["numpy"] = (kind, keys.numpy().astype(np.uint32), *rest)
    np.random.RandomState().set_state(states["numpy"])
    random.Random().setstate(states["python"])
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        states["device"] = None
    elif states["device"] is not None:
        torch.Generator(accelerator.current_device_name()).set_state(states["device"])
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restores the result of :func:`checked_random_states`."""
    torch.set_rng_state(states["torch"])
    if states["device"] is not None:
        get_accelerator().set_rng_state(states["device"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
