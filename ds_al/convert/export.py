"""``ds_al.export``: conversion of a trained AL network to a plain model.

If the path to the scores folds into the model's own classifier (:mod:`ds_al.convert.fold`), the folder is that of the
model's ``save_pretrained``: ``AutoModelFor...from_pretrained(folder)`` computes the scores of ``engine.predict``.
Otherwise the folder contains the model's trunk for ``AutoModel.from_pretrained``, and ``inference.pt2``, the whole path
from ``x`` to the scores as a ``torch.export`` program. An early exit, or the mean of several, is a program alone. None
of them needs ds_al.
:mod:`ds_al.convert.export_command` is the command-line interface.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed
from safetensors.torch import load_file
from torch import Tensor, nn

from ds_al.checkpoint.folder import Record, layer_weights, opened
from ds_al.convert import adapters
from ds_al.convert.description import made_again
from ds_al.convert.fold import Folded, Same, fold
from ds_al.convert.program import Format, InferencePath, check_format, write
from ds_al.convert.source import Source
from ds_al.engine import ALPipelineEngine
from ds_al.errors import ALCheckpointError, ALConfigError, ALError
from ds_al.exits import check_average
from ds_al.layer import ALLayer
from ds_al.module import ALPipelineModule
from ds_al.optim.local import LocalOptimizer
from ds_al.optim.masters import full_state
from ds_al.parallel import worker
from ds_al.tensors import Activation

TEXT_EXAMPLE = (2, 8)


def export(
    model: ALPipelineEngine | ALPipelineModule | str | Path,
    path: str | Path,
    *,
    weights: str | Path | None = None,
    tag: str | None = None,
    same: Same = "scores",
    program: Format | None = None,
    example: Activation | None = None,
    adapter: bool = False,
    exit: int | None = None,
    average: int = 1,
) -> str:
    """Writes the trained network as a plain model. If ranks were started, every rank calls it; the first one writes.

    Args:
        model: an engine or its module; or a folder written by ``save_checkpoint``, on any number of stages, of a
            network built by :func:`ds_al.from_pretrained`. Exporting a folder needs neither ranks nor the training
            script.
        path: the output folder.
        weights: weights to write instead of the module's own: a checkpoint, or a safetensors file with the names of the
            module's ``state_dict`` on one stage, ``"<layer>.f.<name>"``.
        tag: tag of a checkpoint, instead of the latest.
        same: ``"labels"`` also folds ``contrast``: the plain model then predicts the same labels, and its scores are
            those of the engine times the norm of the code.
        program: also writes the inference path, as ``"torch.export"``, ``"torchscript"`` or ``"onnx"``.
        example: a micro-batch ``x`` for tracing programs; required if the network was not built by
            :func:`ds_al.from_pretrained`, in which case only a program can be written.
        adapter: also writes the adapter of ``peft`` by itself, with the classifier, to the subfolder ``adapter``. The
            plain model has it merged into its weights.
        exit: number of layers that x passes, instead of all. The program of an earlier exit has neither later layers
            nor a plain model beside it.
        average: number of exits, the asked one and those before it, whose mean probability the scores are the log of,
            as in ``engine.predict``; also a program alone if it is more than 1.

    Returns:
        ``"classifier"`` for a plain model with the same scores, ``"program"`` if only the program computes the scores.
        All ranks return the same.

    Raises:
        ALConfigError: an option is unknown, an example is missing, a format needs a package, or there is no such exit.
        ALCheckpointError: a checkpoint or file is missing, truncated or altered, belongs to another network, or to one
            that cannot be rebuilt from a folder; the message says how to export that network.
    """
    if same not in ("scores", "labels"):
        raise ALConfigError(f"got same={same!r}: expected 'scores' or 'labels'")
    check_format(program)
    if not isinstance(model, (ALPipelineEngine, ALPipelineModule, str, Path)):
        raise ALConfigError(
            f"got a {type(model).__name__} to export: expected an engine, its module, or the folder of a checkpoint"
        )
    if Path(path).is_file():
        raise ALConfigError(f"got path={str(path)!r}, which is a file: expected a folder")
    from_folder = isinstance(model, (str, Path))
    if from_folder and weights is not None:
        raise ALConfigError(
            "got weights= and the folder of a checkpoint: give the folder alone, or a module and weights="
        )
    if tag is not None and not from_folder and weights is None:
        raise ALConfigError(
            f"got tag={tag!r} with an engine or module: it names a checkpoint of a folder, or of weights="
        )
    module = model.module if isinstance(model, ALPipelineEngine) else model
    if isinstance(module, ALPipelineModule) and module.source is None and (program is None or example is None):
        raise ALConfigError(
            "this network was not made by ds_al.from_pretrained, so there is no plain model to write: give "
            'program="torch.export" and example=x'
        )
    if worker.IS_WORKER:
        raise ALConfigError("export with recovery: save a checkpoint, and export that once the job has ended")
    written: list[Any] = [None]
    try:
        found = (
            gathered(module, None if weights is None else Path(weights), tag=tag, masters=_masters(model))
            if isinstance(module, ALPipelineModule)
            else of_checkpoint(Path(module), tag=tag)
        )
        if found is not None:
            exits = _exits(found, exit, average)
            written[0] = _write(found, Path(path), same, program, example, adapter, exits)
    except ALError as error:  # an error on the first rank is raised on all ranks
        written[0] = error
    except Exception as error:
        written[0] = ALError(f"export to {path} failed: {type(error).__name__}: {error}")
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(written, src=0)
    if isinstance(written[0], Exception):
        raise written[0]
    return cast(str, written[0])


def _exits(network: LoadedNetwork, exit: int | None, average: int) -> range:
    """Returns the indices of the exits to average; one is that exit itself."""
    count = len(network.layers)
    depth = count if exit is None else exit
    if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= count:
        raise ALConfigError(f"got exit={exit!r}: expected 1..{count}, the number of layers that x passes")
    if isinstance(average, bool) or not isinstance(average, int):
        raise ALConfigError(f"got average={average!r}: expected a number of exits")
    check_average(average, exit=depth)
    exits = range(depth - average, depth)
    if missing := sorted(set(exits) & set(network.without_bridge)):
        raise ALCheckpointError(
            f"the bridge of AL layer {missing[0]}, exit {missing[0] + 1}, is one of your own, which no folder holds. "
            "Make the module as the job did, and give it: ds_al.export(module, path, weights=checkpoint, exit=...)"
        )
    return exits


def _write(
    network: LoadedNetwork,
    folder: Path,
    same: Same,
    program: Format | None,
    example: Activation | None,
    adapter: bool,
    exits: range,
) -> str:
    folded: Folded | str = "there is no plain model"
    source, layers, num_classes = network.source, network.layers, network.num_classes
    whole = exits == range(len(layers) - 1, len(layers))
    described = source.description.get("adapter") if source is not None else None
    if adapter and not (described and described["alone"]):
        raise ALConfigError(
            "got adapter=True for a network whose model "
            + ("trains weights beside its adapter" if described else "has no adapter of peft")
            + ": expected LoRA beside frozen weights; the plain model has all weights"
        )
    if adapter and not whole:
        raise ALConfigError(
            "got adapter=True with exit= or average=: an adapter belongs to the last exit; leave it out"
        )
    for layer in layers:
        adapters.merge(layer)
    if source is not None:
        if whole:
            folded = plain(layers, source, folder, num_classes=num_classes, same=same, adapter=adapter)
        example = _example(source) if example is None else example
        if program is None and isinstance(folded, str):
            program = "torch.export"
    if program is not None:
        assert example is not None
        path = InferencePath(layers, num_classes=num_classes, exit=exits.stop, average=len(exits))
        write(path, example, folder, format=program)
    return "program" if isinstance(folded, str) else "classifier"


def plain(
    layers: list[ALLayer],
    source: Source,
    folder: Path,
    *,
    num_classes: int,
    same: Same = "scores",
    adapter: bool = False,
) -> Folded | str:
    """Writes a folder for ``from_pretrained`` of ``transformers``: the model, or its trunk alone.

    Returns:
        The folded classifier, now part of the model; or the reason why only the trunk could be written.

    Raises:
        ALConfigError: the adapter is to be written, and there is no classifier for it.
    """
    folded: Folded | str = "its head reads the mean over the tokens, which no class of transformers does"
    if source.description["classifier_pooling"] is None:
        folded = fold(layers, num_classes=num_classes, same=same)
    weights: dict[str, Tensor] = {}
    for layer, names in zip(layers, source.names, strict=True):
        own = layer.state_dict()
        weights |= {there: own[name].cpu() for name, there in names.items()}
    model = source.model_class(copy.deepcopy(source.config))
    if isinstance(folded, Folded):
        weights[f"{source.classifier}.weight"] = folded.weight.cpu()
        if folded.bias is not None:
            weights[f"{source.classifier}.bias"] = folded.bias.cpu()
    if adapter:
        if isinstance(folded, str):
            raise ALConfigError(f"got adapter=True for a network without a plain classifier: {folded}")
        adapters.write(folder / "adapter", weights, source.description["adapter"], head=source.classifier)
    result = model.load_state_dict(adapters.own(weights), strict=False)
    missing = [name for name in result.missing_keys if not name.startswith(f"{source.classifier}.")]
    assert not result.unexpected_keys and not missing, (result, "names of a source cover its model")
    model.to(next(iter(weights.values())).dtype)
    if source.generation is not None and hasattr(model, "generation_config"):
        model.generation_config = source.generation
    (model if isinstance(folded, Folded) else model.base_model).save_pretrained(folder)
    return folded


@dataclass(frozen=True)
class LoadedNetwork:
    """All AL layers of a network, in evaluation mode on the CPU."""

    layers: list[ALLayer]
    num_classes: int
    source: Source | None
    without_bridge: Sequence[int] = ()
    """Indices of layers whose bridge is user-defined, and is not here."""


def _masters(model: Any) -> Mapping[nn.Parameter, Tensor] | None:
    """Returns the master weights of this stage's engine; every rank calls it."""
    optimizer = getattr(model, "optimizer", None)
    return optimizer.gather()[1] if isinstance(optimizer, LocalOptimizer) else None


def gathered(
    module: ALPipelineModule,
    weights: Path | None = None,
    *,
    tag: str | None = None,
    masters: Mapping[nn.Parameter, Tensor] | None = None,
) -> LoadedNetwork | None:
    """Returns the network of a module on the first rank, and ``None`` on others. Every rank calls it.

    Args:
        masters: master weights of this stage, see :func:`~ds_al.optim.masters.full_state`.
    """
    if weights is None:
        states = _states(module, masters)
    elif torch.distributed.is_initialized() and torch.distributed.get_rank():
        return None
    elif weights.is_dir():
        states = layer_weights(*_of(weights, tag, layers=module.num_layers))
    else:
        states = _read(weights, module.num_layers)
    if states is None:
        return None
    layers = _loaded(module.al_layers, states, origin=weights)
    return LoadedNetwork(layers, module.num_classes, module.source)


def of_checkpoint(path: Path, *, tag: str | None = None) -> LoadedNetwork | None:
    """Returns the network of a checkpoint that contains its description, on the first rank or without any ranks.

    Raises:
        ALCheckpointError: see :func:`export`.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return None
    folder, index = opened(path, tag)
    description = index.get("network")
    if description is None:
        raise ALCheckpointError(
            f"the checkpoint {str(folder)!r} does not say how its network was made, as those of ds_al.from_pretrained "
            "do. Make the module as the job did, and give it: ds_al.export(module, path, weights=checkpoint, "
            'program="torch.export", example=x)'
        )
    try:
        specs, source = made_again(description)
    except ALCheckpointError as error:
        raise ALCheckpointError(f"the checkpoint {str(folder)!r} cannot be exported by itself: {error}") from None
    states: dict[int, dict[str, Tensor]] = dict(layer_weights(folder, index))
    for number in description["own_bridges"]:  # unused by the scores, and of a different form than the rebuilt bridge
        states[number] = {name: value for name, value in states[number].items() if not name.startswith("b.")}
    layers = _loaded(specs, states, origin=folder, without_bridge=description["own_bridges"])
    return LoadedNetwork(layers, index["num_classes"], source, description["own_bridges"])


def _of(path: Path, tag: str | None, *, layers: int) -> tuple[Path, Record]:
    """Opens a checkpoint and checks its number of layers."""
    folder, index = opened(path, tag)
    if index["num_layers"] != layers:
        raise ALCheckpointError(
            f"the checkpoint {str(folder)!r} has {index['num_layers']} AL layers, this network {layers}"
        )
    return folder, index


def _loaded(
    specs: Sequence[Any],
    states: Mapping[int, Mapping[str, Tensor]],
    *,
    origin: Path | None,
    without_bridge: Sequence[int] = (),
) -> list[ALLayer]:
    layers = []
    for index, spec in enumerate(specs):
        with torch.random.fork_rng():
            layer = copy.deepcopy(spec if isinstance(spec, ALLayer) else spec.build())
        if index in without_bridge:
            layer.b = torch.nn.Identity()
        try:
            layer.load_state_dict(states[index], assign=True)
        except RuntimeError as error:
            raise ALCheckpointError(f"{origin}, AL layer {index}: {error}") from None
        layers.append(layer.cpu().eval())
    return layers


def _states(
    module: ALPipelineModule, masters: Mapping[nn.Parameter, Tensor] | None
) -> dict[int, dict[str, Tensor]] | None:
    """Returns the weights by layer, on the first rank."""
    own = {i: {n: v.detach().cpu() for n, v in full_state(layer, masters).items()} for i, layer in module.local_layers}
    found: list[dict[int, dict[str, Tensor]]] = [own]
    if module.world_size > 1:
        rank = torch.distributed.get_rank()
        found = [{}] * module.world_size
        torch.distributed.gather_object(own, found if rank == 0 else None, dst=0)
        if rank:
            return None
    states: dict[int, dict[str, Tensor]] = {}
    for each in found:
        for index, state in each.items():
            states.setdefault(index, {}).update(state)  # stages may hold parts of a layer
    return states


def _read(file: Path, layers: int) -> dict[int, dict[str, Tensor]]:
    """Returns the weights by layer from a file."""
    states: dict[int, dict[str, Tensor]] = {index: {} for index in range(layers)}
    for name, value in load_file(file).items():
        index, _, own = name.partition(".")
        if not index.isdigit() or int(index) >= layers:
            raise ALCheckpointError(f"{file} has {name!r}: expected names '<layer>.<name>' of {layers} AL layers")
        states[int(index)][own] = value
    return states


def _example(source: Source) -> Activation:
    config = source.config
    if source.task == "image-classification":
        size = getattr(config, "image_size", 64)
        height, width = (size, size) if isinstance(size, int) else size
        return torch.zeros(TEXT_EXAMPLE[0], config.num_channels, height, width)
    ids = torch.ones(TEXT_EXAMPLE, dtype=torch.int64)
    return ids, torch.ones_like(ids)
