"""What a checkpoint holds beside DeepSpeed's own, so that training goes on bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine

from ds_al.errors import ALCheckpointError

if TYPE_CHECKING:
    from ds_al.engine import ALPipelineEngine

KEY = "ds_al"
FORMAT = 1


class Checkpoints(PipelineEngine):
    """The part of :class:`~ds_al.engine.ALPipelineEngine` that saves and loads, in DeepSpeed's folders."""

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Saves weights, optimizers, LR schedule, counters, random state and data position; every rank calls it.

        DeepSpeed's folder layout. Arguments as DeepSpeed's.
        """
        saved = {**(client_state or {}), KEY: state(_al(self))}
        return super().save_checkpoint(save_dir, tag, saved, save_latest, exclude_frozen_parameters)

    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str, dict[str, Any]]:
        """Loads what :meth:`save_checkpoint` saved by the same number of stages; training then goes on as if
        it had never stopped, bit for bit. Every rank calls it. Arguments and result as DeepSpeed's.

        Raises:
            ALCheckpointError: no checkpoint there, or one of another number of stages, network, optimizer, seed
                or micro-batch size; raised on every rank, before anything is loaded.
        """
        tag = find(_al(self), load_dir, tag, weights_only=load_module_only, with_optimizer=load_optimizer_states)
        path, client_state = super().load_checkpoint(
            load_dir,
            tag,
            load_module_strict,
            load_optimizer_states,
            load_lr_scheduler_states,
            load_module_only,
            custom_load_fn,
        )
        saved = client_state.pop(KEY, None)
        if not load_module_only:
            restore(_al(self), saved)
        return path, client_state


def _al(engine: Checkpoints) -> ALPipelineEngine:
    return cast("ALPipelineEngine", engine)


def state(engine: ALPipelineEngine) -> dict[str, Any]:
    """This stage's part of a checkpoint: what it belongs to, counters, data position, the host's random state."""
    return {
        "format": FORMAT,
        "num_stages": engine.num_stages,
        "num_layers": engine.module.num_layers,
        "shapes": _shapes(engine),
        "optimizer": _optimizer(engine),
        "base_seed": engine.module.base_seed,
        "micro_batch_size": engine.micro_batch_size,
        "trained_micro_batches": engine.stage.trained_micro_batches,
        "micro_steps": engine.micro_steps,
        "data_position": engine.loader.position if engine.loader is not None else None,
        "torch_rng": torch.get_rng_state(),
        "decoder_copies": engine.decoder_copies.state() if engine.decoder_copies is not None else None,
    }


def find(engine: ALPipelineEngine, load_dir: str, tag: str | None, *, weights_only: bool, with_optimizer: bool) -> str:
    """Finds a checkpoint, the latest by default, and checks that it fits, before anything is loaded.

    Every rank calls it; what one of them finds wrong is raised on all, so that none is left behind.

    Returns:
        The tag to load.

    Raises:
        ALCheckpointError: there is none, or it is one of another number of stages, network, optimizer, seed or
            micro-batch size.
    """
    problem = None
    try:
        tag = _find(load_dir, tag, stages=engine.num_stages)
        file = engine._get_ckpt_name(load_dir, tag)
        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=False).get(KEY)
        _check(engine, saved, weights_only=weights_only, with_optimizer=with_optimizer)
    except ALCheckpointError as error:
        problem = f"stage {engine.stage_id}: {error}"
    problems = [text for text in engine.gather(problem) if text is not None]
    if problems:
        raise ALCheckpointError(problems[0])
    assert tag is not None
    return tag


def restore(engine: ALPipelineEngine, saved: dict[str, Any]) -> None:
    """Sets counters, data position and random state from a checkpoint that fits."""
    engine.stage.trained_micro_batches = saved["trained_micro_batches"]
    engine.micro_steps = saved["micro_steps"]
    if engine.loader is not None and saved["data_position"] is not None:
        engine.loader.seek(saved["data_position"])
    if engine.decoder_copies is not None and saved.get("decoder_copies") is not None:
        engine.decoder_copies.restore(saved["decoder_copies"])
    torch.set_rng_state(saved["torch_rng"])


def _find(load_dir: str, tag: str | None, *, stages: int) -> str:
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


def _check(engine: ALPipelineEngine, saved: dict[str, Any] | None, *, weights_only: bool, with_optimizer: bool) -> None:
    if saved is None:
        if weights_only:
            return
        raise ALCheckpointError("the checkpoint was not saved by ds_al: load its weights with load_module_only=True")
    if saved["num_layers"] != engine.module.num_layers:
        raise ALCheckpointError(
            f"the checkpoint has {saved['num_layers']} AL layers, this network {engine.module.num_layers}"
        )
    there, here = saved["shapes"], _shapes(engine)
    for name in there.keys() | here.keys():
        if there.get(name) != here.get(name):
            raise ALCheckpointError(
                f"the checkpoint is of another network: {name} has shape {there.get(name)} there, {here.get(name)} here"
            )
    if weights_only:
        return
    for key, value in {"base_seed": engine.module.base_seed, "micro_batch_size": engine.micro_batch_size}.items():
        if saved[key] != value:
            raise ALCheckpointError(
                f"the checkpoint has {key}={saved[key]}, this job {value}: its data order and random numbers would "
                "differ. Use the same, or load the weights alone with load_module_only=True"
            )
    if with_optimizer and saved["optimizer"] != _optimizer(engine):
        raise ALCheckpointError(
            f"the checkpoint has the state of {saved['optimizer']}, this job trains with {_optimizer(engine)}: use the "
            "same, or start a new one by load_optimizer_states=False"
        )


def _shapes(engine: ALPipelineEngine) -> dict[str, list[int]]:
    return {
        f"AL layer {index}, {name}": list(value.shape)
        for index, layer in engine.layers
        for name, value in layer.state_dict().items()
    }


def _optimizer(engine: ALPipelineEngine) -> str:
    parts = getattr(engine.optimizer, "parts", {"": engine.optimizer})
    return " and ".join(type(part).__name__ for part in parts.values() if part is not None)
