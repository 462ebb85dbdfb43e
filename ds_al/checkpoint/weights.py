"""Loading of weights from checkpoints of DeepSpeed, ds_al and Hugging Face into the layers of a pipeline."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.pipe import PipelineModule
from safetensors import safe_open
from torch import Tensor, nn

from ds_al import host
from ds_al.checkpoint.folder import read_index, verify
from ds_al.checkpoint.own import INDEX, LATEST, read_latest
from ds_al.errors import ALCheckpointError
from ds_al.module import ALPipelineModule
from ds_al.optim.finite import not_finite
from ds_al.optim.masters import master_here
from ds_al.parallel import meetings

Names = Mapping[str, str] | Callable[[str], str | None]

_LAYER_FILE = re.compile(r"layer_(\d+)-(.*-)?model_states\.pt")
_SHARDED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "pytorch_model.bin")


class LoadedWeights(NamedTuple):
    """Result of :func:`load_weights` on this rank, as names of weights."""

    loaded: list[str]
    """Names in the pipeline, ``"<layer>.<name>"``, that were loaded."""
    missing: list[str]
    """Names in the pipeline that are not in the source; these weights are unchanged."""
    unused: list[str]
    """Names in the source that match no layer of this network."""


def load_weights(target: Any, path: str | Path, *, names: Names | None = None, strict: bool = True) -> LoadedWeights:
    """Loads weights alone from a checkpoint of DeepSpeed, ds_al or Hugging Face. Every rank of the pipeline calls it.

    ``path`` is one of

    * a pipeline checkpoint of DeepSpeed, ``layer_XX-model_states.pt``: the folder given to ``save_checkpoint``, or that
      of a tag. Entry i of its layer list is loaded into f of AL layer i, so a backprop twin's weights fit the AL form;
    * a checkpoint of ds_al. Its chain of f is loaded into a plain ``PipelineModule``;
    * a Hugging Face folder, ``model.safetensors`` or ``pytorch_model.bin``, whole or sharded; or a single file of one
      of these kinds, such as ``python -m ds_al consolidate`` writes.

    In the pipeline the name of a weight is ``"<layer>.<name>"``: ``"2.f.0.weight"`` in an AL network, ``"2.0.weight"``
    in a plain one. Values are cast to the dtype of the pipeline. No weight is changed if any rank finds an error.
    Call it before training: momenta and decoder copies are not updated.

    Args:
        target: an engine, or its module: :class:`~ds_al.module.ALPipelineModule` or ``PipelineModule``.
        names: maps names in the source to names in the pipeline: a callable, which returns ``None`` to skip a weight;
            or a mapping of prefixes, of which the longest match is replaced, and weights without a match are skipped:
            ``{"bert.encoder.layer.0.": "1.f.0."}``. By default names are unchanged.
        strict: whether every weight of f, or of a plain pipeline, must be in the source.

    Returns:
        The names of loaded, missing and unused weights.

    Raises:
        ALCheckpointError: on every rank: no such checkpoint at ``path``, a file that cannot be read, a shape that
            differs, a name that matches no layer, or with ``strict`` a missing weight of f.
    """
    module = getattr(target, "module", target)
    if not isinstance(module, PipelineModule):
        raise ALCheckpointError(
            f"load_weights: got a {type(target).__name__}: expected an engine, an ALPipelineModule or a PipelineModule"
        )
    places = _places(module)
    problem: str | None = None
    values: dict[str, Tensor] = {}
    rest: list[str] = []
    try:
        values, rest = _matching(module, places, Path(path), names, strict)
    except ALCheckpointError as error:
        problem = str(error)
    except Exception as error:  # a damaged file may raise anything
        problem = f"{str(path)!r} cannot be read: {type(error).__name__}: {error}"
    if found := [text for text in meetings.gather(problem) if text is not None]:
        raise ALCheckpointError(found[0])
    with torch.no_grad():
        for name, value in values.items():
            places[name].copy_(value)
    refresh = getattr(getattr(target, "optimizer", None), "refresh_fp32_params", None)
    if refresh is not None:  # DeepSpeed's own fp32 masters
        refresh()
    masters = _masters(module)
    with torch.no_grad():
        for name in values.keys() & masters.keys():  # our masters keep the full precision of the source
            masters[name].copy_(values[name])
    return LoadedWeights(sorted(values), sorted(places.keys() - values.keys()), rest)


def _places(module: PipelineModule) -> dict[str, Tensor]:
    """Returns the tensors of this stage's layers by name in the pipeline."""
    return {
        f"{index}.{name}": value
        for index, layer in enumerate(module.forward_funcs, start=host.layer_range(module).start)
        if isinstance(layer, nn.Module)
        for name, value in layer.state_dict().items()
        if isinstance(value, Tensor)
    }


def _masters(module: PipelineModule) -> dict[str, Tensor]:
    """Returns the fp32 masters of this stage's weights by name, if layers compute in lower precision."""
    return {
        f"{index}.{name}": master
        for index, layer in enumerate(module.forward_funcs, start=host.layer_range(module).start)
        if isinstance(layer, nn.Module)
        for name, parameter in layer.named_parameters()
        if (master := master_here(parameter)) is not None
    }


def _matching(
    module: PipelineModule, places: Mapping[str, Tensor], path: Path, names: Names | None, strict: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """Returns values by name in the pipeline, for this stage, and unused names of the source."""
    rename = _renamer(names)
    values: dict[str, Tensor] = {}
    rest: list[str] = []
    for source, file, read in _source(
        path, into_al=isinstance(module, ALPipelineModule), layers=host.num_layers(module)
    ):
        name = rename(source)
        if name is None or not _has_place(name, module):
            if name is not None and names is not None:
                raise ALCheckpointError(
                    f"{source!r} in {str(file)!r} is to become {name!r}: expected '<layer>.<name>' with a layer of "
                    f"0..{host.num_layers(module) - 1}; let names leave it out"
                )
            rest.append(source)
            continue
        if int(name.split(".")[0]) not in host.layer_range(module):
            continue
        if name not in places:
            if names is None and not strict:
                rest.append(source)
                continue
            raise ALCheckpointError(
                f"{source!r} in {str(file)!r} is to become {name!r}, which this network has not: is it of another "
                "model? Give names=, or strict=False"
            )
        value = read()
        if value.shape != places[name].shape:
            raise ALCheckpointError(
                f"layer {name.split('.')[0]}: {source!r} in {str(file)!r} has shape {list(value.shape)}, {name!r} here "
                f"{list(places[name].shape)}"
            )
        if value.is_floating_point() and not_finite(value.float(), masks=True) is not None:
            raise ALCheckpointError(
                f"layer {name.split('.')[0]}: {source!r} in {str(file)!r} holds nan: load earlier weights"
            )
        values[name] = value
    if strict:
        wanted = [name for name in places if not isinstance(module, ALPipelineModule) or name.split(".")[1] == "f"]
        for name in wanted:
            if name not in values:
                raise ALCheckpointError(
                    f"layer {name.split('.')[0]}: {str(path)!r} has nothing for {name!r}. Give names=, or strict=False "
                    "to leave it as it is"
                )
    return values, rest


def _has_place(name: str, module: PipelineModule) -> bool:
    layer, dot, rest = name.partition(".")
    return bool(dot and rest) and layer.isdigit() and int(layer) < host.num_layers(module)


def _renamer(names: Names | None) -> Callable[[str], str | None]:
    if names is None:
        return lambda name: name
    if not isinstance(names, Mapping):
        return names
    prefixes = sorted(names.items(), key=lambda item: -len(item[0]))

    def rename(name: str) -> str | None:
        return next((new + name.removeprefix(old) for old, new in prefixes if name.startswith(old)), None)

    return rename


# ---- sources ---------------------------------------------------------------------------------------

Weights = Iterator[tuple[str, Path, Callable[[], Tensor]]]
"""Of each weight of a checkpoint: name, file, and a function that reads the tensor."""


def _source(path: Path, *, into_al: bool, layers: int) -> Weights:
    if path.is_file():
        return _file(path)
    if (path / LATEST).is_file() and not (path / INDEX).is_file():
        path = path / read_latest(path)
    if (path / INDEX).is_file():
        return _of_ds_al(path, into_al=into_al)
    if any(path.glob("layer_*-model_states.pt")):
        return _of_deepspeed(path, into_al=into_al, layers=layers)
    for name in _SHARDED:
        if (path / name).is_file():
            return _files(path / file for file in _parts(path / name))
    for name in _WHOLE:
        if (path / name).is_file():
            return _file(path / name)
    raise ALCheckpointError(
        f"no weights in {str(path)!r}: expected layer_XX-model_states.pt of a DeepSpeed pipeline, {INDEX} of ds_al, or "
        f"{' or '.join(_WHOLE)} of Hugging Face"
    )


def _parts(path: Path) -> list[str]:
    """Returns the names of the files that an index of Hugging Face lists, all beside it."""
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        beside = all(name and name == Path(name).name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        beside = False
    if not beside:
        raise ALCheckpointError(
            f"{str(path)!r} is no index of weights: expected an object 'weight_map' with names of files beside it"
        )
    return names


def _files(paths: Iterable[Path]) -> Weights:
    for path in paths:
        yield from _file(path)


def _file(path: Path) -> Weights:
    if not path.is_file():
        raise ALCheckpointError(f"file {path.name!r} is missing from {str(path.parent)!r}, whose index names it")
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no dict
                yield name, path, partial(file.get_tensor, name)
    else:
        for name, value in _unpickled(path).items():
            yield name, path, partial(_same, value)


def _same(value: Tensor) -> Tensor:
    return value


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise ALCheckpointError(
            f"file {path.name!r} in {str(path.parent)!r} is cut, altered, or holds more than tensors: "
            f"{str(error).splitlines()[0]}"
        ) from None
    if not isinstance(state, Mapping):
        raise ALCheckpointError(
            f"file {path.name!r} in {str(path.parent)!r} holds a {type(state).__name__}, expected a dict of tensors"
        )
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _of_deepspeed(folder: Path, *, into_al: bool, layers: int) -> Weights:
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("layer_*-model_states.pt")):
        match = _LAYER_FILE.fullmatch(path.name)
        if match is None:
            continue
        number = int(match[1])
        if number in found:
            raise ALCheckpointError(
                f"layer {number} is in {found[number].name!r} and in {path.name!r}: it is sharded by tensor "
                "parallelism, which is not supported. Merge it first"
            )
        found[number] = path
    for number, path in found.items():
        for name, value in _unpickled(path).items():
            # A twin's head follows the last f: it gets a name that matches no layer.
            inside = "f." if into_al and number < layers else ""
            yield f"{number}.{inside}{name}", path, partial(_same, value)


def _of_ds_al(folder: Path, *, into_al: bool) -> Weights:
    for layer in read_index(folder)["layers"]:
        record = layer["files"]["model_states"]
        verify(folder, [record], of=f"AL layer {layer['layer']}")
        for name, path, read in _file(folder / record["file"]):
            if into_al:
                yield f"{layer['layer']}.{name}", path, read
            elif name.startswith("f."):
                yield f"{layer['layer']}.{name.removeprefix('f.')}", path, read
