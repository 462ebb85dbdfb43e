"""``save_checkpoint`` and ``load_checkpoint`` of an AL engine."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from deepspeed import comm as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from ds_al.checkpoint import optimizers, snapshot
from ds_al.checkpoint.check import Wanted, check, client_of, source_of
from ds_al.checkpoint.folder import INDEX, Record, find, read_client_state, read_index, read_tensors
from ds_al.checkpoint.plain import Tensors, unpack
from ds_al.checkpoint.writer import Target, Writer
from ds_al.errors import ALCheckpointError
from ds_al.optim.masters import master_here

if TYPE_CHECKING:
    from ds_al.engine import ALPipelineEngine

Value = TypeVar("Value")


class Checkpoints(PipelineEngine):
    """The part of :class:`~ds_al.engine.ALPipelineEngine` that saves and loads, in DeepSpeed's folders."""

    checkpoint_writer: Writer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        session = [uuid.uuid4().hex[:12]]
        dist.broadcast_object_list(session, src=0)
        writes = self.grid.get_data_parallel_id() == 0
        self.checkpoint_writer = Writer(stage=self.stage_id, stages=self.num_stages, session=session[0], writes=writes)

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        asynchronous: bool | None = None,
    ) -> bool:
        """Saves weights, optimizers, LR schedule, counters, random state and data position, by AL layer.

        Every rank calls it, after the same batch. The former checkpoint stays whole whatever happens on the way.

        Args:
            save_dir: folder of all checkpoints, which every rank sees. Further arguments as DeepSpeed's.
            client_state: of the caller, each rank's own: numbers, strings, tensors, lists and dicts of them.
            asynchronous: copies everything to the host, and returns; a thread writes it while training goes on.
                :meth:`flush` waits for it. A second save waits for the first. By default what the config says.

        Returns:
            True.

        Raises:
            ALCheckpointError: on every rank, if one cannot write, or what is to be saved has no safe form. Of an
                asynchronous save it is raised by the next save, by ``flush()`` or by ``destroy()``.
        """
        engine = _al(self)
        if not save_dir:
            raise ALCheckpointError(f"save_checkpoint: got save_dir={save_dir!r}, expected a folder")
        options = engine.al.checkpoint
        target = Target(
            Path(save_dir),
            str(tag) if tag is not None else f"global_step{self.global_steps}",
            latest=save_latest,
            keep=options.keep_last,
        )
        state, leave_out = client_state or {}, exclude_frozen_parameters
        if options.asynchronous if asynchronous is None else asynchronous:
            self.checkpoint_writer.start(
                lambda: snapshot.take(engine, state, leave_out_frozen=leave_out).on_host(), target
            )
        else:
            _on_all(
                engine,
                lambda: self.checkpoint_writer.write(
                    lambda: snapshot.take(engine, state, leave_out_frozen=leave_out), target
                ),
            )
        return True

    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: None = None,
    ) -> tuple[str, dict[str, Any]]:
        """Loads what :meth:`save_checkpoint` saved on any number of stages; training then goes on as if it had
        never stopped, bit for bit. Every rank calls it.

        Everything is checked on all ranks before anything is changed. Each rank reads the files of its own layers.

        Args:
            load_dir: folder of all checkpoints. Further arguments as DeepSpeed's.
            load_module_only: weights and buffers alone.

        Returns:
            The path of the checkpoint's index, and the ``client_state`` that this rank saved; on another number of
            stages than at the save that of the first one.

        Raises:
            ALCheckpointError: on every rank: no checkpoint there, a file that is missing, cut or altered, or a
                checkpoint of another network, optimizer, LR schedule, seed or micro-batch size.
        """
        engine = _al(self)
        if custom_load_fn is not None:
            raise ALCheckpointError("load_checkpoint: a pipeline takes no custom_load_fn: see ds_al.load_weights")
        wanted = Wanted(
            training=not load_module_only,
            optimizer=load_optimizer_states and not load_module_only,
            schedule=load_lr_scheduler_states and not load_module_only,
            strict=load_module_strict,
        )

        # The first stage writes `latest` when the others are through already, so they wait for it.
        _on_all(engine, self.checkpoint_writer.flush)

        def look() -> tuple[Path, Record]:
            folder = find(load_dir, tag)
            index = read_index(folder)
            check(engine, folder, index, wanted)
            return folder, index

        folder, index = _on_all(engine, look)
        return str(folder / INDEX), load(engine, folder, index, wanted)


def _al(engine: Checkpoints) -> ALPipelineEngine:
    return cast("ALPipelineEngine", engine)


def _on_all(engine: ALPipelineEngine, step: Callable[[], Value]) -> Value:
    """Does a step on every rank; what one of them finds wrong is raised on all, so that none is left behind."""
    value: list[Value] = []
    problem = None
    try:
        value.append(step())
    except ALCheckpointError as error:
        problem = f"stage {engine.stage_id}: {error}"
    except Exception as error:
        problem = f"stage {engine.stage_id}: {type(error).__name__}: {error}"
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for text in problems:
        if text is not None:
            raise ALCheckpointError(text)
    return value[0]


@torch.no_grad()
def load(engine: ALPipelineEngine, folder: Path, index: Record, wanted: Wanted) -> dict[str, Any]:
    """Changes this stage to what a checkpoint holds that fits; returns the client's state."""
    layers = {number: index["layers"][number] for number, _ in engine.layers}
    for number, layer in engine.layers:
        record = layers[number]
        weights: dict[str, Any] = dict(read_tensors(folder, record["files"]["model_states"]))
        weights |= {name: unpack(value, weights) for name, value in record["extra"].items()}
        layer.load_state_dict(weights, strict=wanted.strict and not record["left_out"])
        for name, parameter in layer.named_parameters():
            if name in weights and (master := master_here(parameter)) is not None:
                master.copy_(weights[name])
        scale = getattr(engine.optimizer, "scales", {}).get(number)
        if scale is not None and record.get("loss_scale") and wanted.optimizer:
            scale.restore(record["loss_scale"])
    if not wanted.training:
        return {}
    tensors: dict[optimizers.Place, Tensors] = {}
    for number, record in layers.items():
        tensors[number, optimizers.TRAINING] = read_tensors(folder, record["files"]["training_states"])
        for role in record["optimizers"] if wanted.optimizer or wanted.schedule else ():
            tensors[number, role] = read_tensors(folder, record["files"][f"{role}_optim_states"])
    if wanted.optimizer:
        optimizers.give(engine, layers, tensors)
    if wanted.schedule:
        optimizers.give_schedule(engine, layers, tensors)
    _losses(engine, {number: tensors[number, optimizers.TRAINING] for number in layers})
    if engine.decoder_copies is not None:
        for number in range(len(engine.decoder_copies)):
            record = index["layers"][number]["files"]["training_states"]
            copies = tensors.get((number, optimizers.TRAINING)) or read_tensors(folder, record)
            prefix = "decoder/"
            engine.decoder_copies.restore(
                number, {name.removeprefix(prefix): value for name, value in copies.items() if name.startswith(prefix)}
            )
    _counters(engine, index)
    source = index["stages"][source_of(engine, index)]
    snapshot.set_random_states(source["random"], read_tensors(folder, source["files"]["random_states"]))
    client = index["stages"][client_of(engine, index)]["files"].get("client_state")
    return read_client_state(folder / client["file"]) if client else {}


def _losses(engine: ALPipelineEngine, tensors: Mapping[int, Mapping[str, Tensor]]) -> None:
    for number, saved in tensors.items():
        engine.report[number] = saved["losses/latest"].to(engine.report.device)
    history = torch.stack([saved["losses/history"] for saved in tensors.values()], dim=1).to(engine.device)
    engine._loss_history = list(history)


def _counters(engine: ALPipelineEngine, index: Record) -> None:
    counters = index["counters"]
    for name in ("global_steps", "global_samples", "skipped_steps", "micro_steps"):
        setattr(engine, name, counters[name])
    engine.stage.trained_micro_batches = counters["trained_micro_batches"]
    engine.loaded_checkpoint_mp_world_size = index["num_stages"]
    position = index["stages"][0]["data_position"]
    if engine.loader is not None and position is not None:
        engine.loader.seek(position)
