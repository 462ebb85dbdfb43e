"""What one stage brings to a checkpoint: its layers, each by itself, and what belongs to no layer."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from ds_al.checkpoint import optimizers
from ds_al.checkpoint.folder import FORMAT, Record, layer_file
from ds_al.checkpoint.plain import Tensors, pack, unpack
from ds_al.layer import ALLayer
from ds_al.optim.local import LocalOptimizer
from ds_al.optim.masters import full_state

if TYPE_CHECKING:
    from ds_al.engine import ALPipelineEngine


@dataclass
class Snapshot:
    """One stage's part of a checkpoint, to be written while training goes on once it is :meth:`on_host`."""

    common: Record
    """What all stages have to agree on."""
    stage: Record
    layers: list[Record]
    files: list[tuple[Record, str, str, Tensors]] = field(default_factory=list)
    """``(layer's or stage's record, what, name of the file, tensors)``"""
    client_state: Mapping[str, Any] = field(default_factory=dict)

    def on_host(self) -> Snapshot:
        """Copies all tensors to the host, and returns itself."""
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


def take(engine: ALPipelineEngine, client_state: Mapping[str, Any], *, leave_out_frozen: bool = False) -> Snapshot:
    """This stage's part of a checkpoint, between two batches. Its tensors are those of the engine, not copies.

    Args:
        leave_out_frozen: leaves out the weights that nothing trains.

    Raises:
        ALCheckpointError: something that cannot be saved.
    """
    shot = Snapshot(_common(engine), _stage(engine), [], client_state=client_state)
    shot.files.append((shot.stage, "random_states", f"stage_{engine.stage_id:02d}-random_states.safetensors", {}))
    shot.stage["random"] = pack(random_states(), shot.files[-1][3], at="random")
    # Copies of a stage that share its optimizer state out bring it together, all of them, here.
    states, masters = engine.optimizer.gather() if isinstance(engine.optimizer, LocalOptimizer) else (None, None)
    optimizer_states = optimizers.take(engine, states)
    history = torch.stack(engine._loss_history) if engine._loss_history else torch.zeros(0, len(engine.layers), 2)
    for row, (index, layer) in enumerate(engine.layers):
        record: Record = {"layer": index, "stage": engine.stage_id, "modules": modules(layer), "optimizers": {}}
        shot.layers.append(record)
        weights: Tensors = {}
        frozen = {name for name, p in layer.named_parameters() if not p.requires_grad} if leave_out_frozen else set()
        state = {name: value for name, value in full_state(layer, masters).items() if name not in frozen}
        record["left_out"] = sorted(frozen)
        record["extra"] = {n: pack(v, weights, at=n) for n, v in state.items() if not isinstance(v, Tensor)}
        weights |= {name: value for name, value in state.items() if isinstance(value, Tensor)}
        shot.files.append((record, "model_states", layer_file(index, "model_states"), weights))
        for role, (saved, tensors) in optimizer_states[index].items():
            record["optimizers"][role] = saved
            shot.files.append((record, f"{role}_optim_states", layer_file(index, f"{role}_optim_states"), tensors))
        training: Tensors = {"losses/latest": engine.report[index], "losses/history": history[:, row]}
        if engine.decoder_copies is not None:
            training |= {f"decoder/{name}": value for name, value in engine.decoder_copies.state(index).items()}
        scale = getattr(engine.optimizer, "scales", {}).get(index)
        record["loss_scale"] = None if scale is None else scale.state()
        record["schedule"] = optimizers.take_schedule(engine, training)
        shot.files.append((record, "training_states", layer_file(index, "training_states"), training))
    return shot


def _common(engine: ALPipelineEngine) -> Record:
    return {
        "format": FORMAT,
        "versions": {"ds_al": _version("ds_al"), "deepspeed": _version("deepspeed"), "torch": torch.__version__},
        "num_layers": engine.module.num_layers,
        "num_classes": engine.module.num_classes,
        # None where the network was not made of a model of transformers, and so cannot be exported from the folder.
        "network": engine.module.source.recipe if engine.module.source is not None else None,
        "num_stages": engine.num_stages,
        "partition": [int(bound) for bound in engine.module.parts],
        "base_seed": engine.module.base_seed,
        "micro_batch_size": engine.micro_batch_size,
        "counters": {
            "global_steps": engine.global_steps,
            "global_samples": engine.global_samples,
            "skipped_steps": engine.skipped_steps,
            "micro_steps": engine.micro_steps,
            "trained_micro_batches": engine.stage.trained_micro_batches,
        },
    }


def _stage(engine: ALPipelineEngine) -> Record:
    return {"stage": engine.stage_id, "data_position": engine.loader.position if engine.loader is not None else None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # from a checkout that was not installed
        return None


def modules(layer: ALLayer) -> dict[str, str]:
    """The class of every module of a layer, by name: what tells a layer from another one of the same shapes."""
    return {name: type(module).__name__ for name, module in layer.named_modules()}


def given_weights(layer: nn.Module) -> Tensors:
    """All tensors of a layer's state, in full precision."""
    return {name: value for name, value in full_state(layer).items() if isinstance(value, Tensor)}


# ---- the host's random numbers ---------------------------------------------------------------------


def random_states() -> dict[str, Any]:
    """States of torch's, numpy's and Python's generators. No layer draws from them as they are between batches."""
    accelerator = get_accelerator()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "device": accelerator.get_rng_state() if accelerator.device_name() != "cpu" else None,
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "python": random.getstate(),
    }


def set_random_states(record: Any, tensors: Tensors) -> None:
    """Sets what :func:`random_states` gave and :func:`~ds_al.checkpoint.plain.pack` made of it."""
    states = unpack(record, tensors)
    torch.set_rng_state(states["torch"])
    accelerator = get_accelerator()
    if states["device"] is not None and accelerator.device_name() != "cpu":
        accelerator.set_rng_state(states["device"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate(states["python"])
