"""What a checkpoint holds beside DeepSpeed's own, so that training goes on bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ds_al.errors import ALCheckpointError

if TYPE_CHECKING:
    from ds_al.engine import ALPipelineEngine

KEY = "ds_al"
FORMAT = 1


def state(engine: ALPipelineEngine) -> dict[str, Any]:
    """This stage's part of a checkpoint: counters, data position and the host's random state."""
    return {
        "format": FORMAT,
        "num_stages": engine.num_stages,
        "num_layers": engine.module.num_layers,
        "base_seed": engine.module.base_seed,
        "micro_batch_size": engine.micro_batch_size,
        "trained_micro_batches": engine.trained_micro_batches,
        "micro_steps": engine.micro_steps,
        "data_position": engine.loader.position if engine.loader is not None else None,
        "torch_rng": torch.get_rng_state(),
    }


def find(load_dir: str, tag: str | None, *, stages: int) -> str:
    """Returns the tag to load, the latest by default.

    Raises:
        ALCheckpointError: there is none, or it was saved by another number of stages.
    """
    folder = Path(load_dir)
    latest = folder / "latest"
    if tag is None:
        if not latest.is_file():
            raise ALCheckpointError(f"no checkpoint in {load_dir!r}: expected a file 'latest', or give a tag")
        tag = latest.read_text().strip()
    saved = len(list((folder / tag).glob("mp_rank_*_model_states.pt")))
    if saved == 0:
        raise ALCheckpointError(f"no checkpoint in {str(folder / tag)!r}: expected files mp_rank_*_model_states.pt")
    if saved != stages:
        raise ALCheckpointError(
            f"checkpoint {str(folder / tag)!r} was saved by {saved} stages, this job has {stages}: start {saved} "
            "processes. Loading on another number of stages is not supported yet"
        )
    return tag


def restore(engine: ALPipelineEngine, saved: dict[str, Any] | None, *, module_only: bool) -> None:
    """Sets counters, data position and random state from a checkpoint.

    Raises:
        ALCheckpointError: it was not saved by this engine, or by another network or micro-batch size.
    """
    if saved is None:
        raise ALCheckpointError("the checkpoint was not saved by ds_al: load its weights with load_module_only=True")
    if saved["num_layers"] != engine.module.num_layers:
        raise ALCheckpointError(
            f"the checkpoint has {saved['num_layers']} AL layers, this network {engine.module.num_layers}"
        )
    if module_only:
        return
    for key, value in {"base_seed": engine.module.base_seed, "micro_batch_size": engine.micro_batch_size}.items():
        if saved[key] != value:
            raise ALCheckpointError(
                f"the checkpoint has {key}={saved[key]}, this job {value}: its data order and random numbers would "
                "differ. Use the same, or load the weights alone with load_module_only=True"
            )
    engine.trained_micro_batches = saved["trained_micro_batches"]
    engine.micro_steps = saved["micro_steps"]
    if engine.loader is not None and saved["data_position"] is not None:
        engine.loader.seek(saved["data_position"])
    torch.set_rng_state(saved["torch_rng"])
