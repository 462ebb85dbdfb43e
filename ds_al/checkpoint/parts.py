"""Parts of an AL layer in a checkpoint: a layer that spans several stages is saved by part, and stored as a whole.

Each stage of a group writes files of its part; the stage that publishes the checkpoint joins them, so a checkpoint is
the same whatever the number of stages, and any number of stages can load it: a stage takes what its part holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ds_al.checkpoint.folder import Record, write_tensors
from ds_al.checkpoint.form import layer_file
from ds_al.layer import ALLayer
from ds_al.partition.part import LayerPart


def part_file(layer: ALLayer, index: int, what: str) -> str:
    """Returns the name of a file of one AL layer, or of the part that this stage holds."""
    run = f"-blocks_{layer.run.start}" if isinstance(layer, LayerPart) else ""
    return layer_file(index, what + run)


def join(folder: Path, records: Sequence[Record]) -> list[Record]:
    """Returns one record per layer; joins the files of parts in the folder.

    Args:
        records: of layers and parts, by stage.
    """
    layers = (list(own) for _, own in groupby(records, key=lambda record: record["layer"]))
    return [own[0] if len(own) == 1 else _joined(folder, own) for own in layers]


def _joined(folder: Path, parts: Sequence[Record]) -> Record:
    last = parts[-1]
    files: dict[str, list[str]] = {}
    for part in parts:
        for what, record in part["files"].items():
            files.setdefault(what, []).append(record["file"])
    joined = {what: _join_files(folder, names, layer_file(last["layer"], what)) for what, names in files.items()}
    return {
        **last,
        "modules": _union(part["modules"] for part in parts),
        "extra": _union(part["extra"] for part in parts),
        "left_out": sorted({name for part in parts for name in part["left_out"]}),
        "optimizers": _optimizers([part["optimizers"] for part in parts]),
        "files": joined,
    }


def _join_files(folder: Path, names: Sequence[str], name: str) -> Record:
    record = write_tensors(folder / name, _union(load_file(folder / each) for each in names))
    for each in names:
        (folder / each).unlink()
    return record


def _optimizers(parts: Sequence[Mapping[str, Any]]) -> Record:
    """Joins the optimizers of parts: groups of equal options are one group, as on a stage that holds the layer."""
    joined: Record = {}
    for part in parts:
        for role, record in part.items():
            whole = joined.setdefault(role, {"class": record["class"], "groups": [], "state": {}})
            whole["state"] |= record["state"]
            for group in record["groups"]:
                same = (each for each in whole["groups"] if _options(each) == _options(group))
                found = next(same, None)
                if found is None:
                    whole["groups"].append({**group, "parameters": list(group["parameters"])})
                else:
                    found["parameters"] += group["parameters"]
    return joined


def _options(group: Mapping[str, Any]) -> tuple[Any, Any]:
    return group["options"], group["schedule"]


def held(record: Record, layer: ALLayer) -> Record:
    """Returns the entries of a layer's record that concern this stage: all of a whole layer, or those of its part."""
    if not isinstance(layer, LayerPart):
        return record
    names = set(layer.state_dict())
    modules = {name for name, _ in layer.named_modules()}
    model = record["files"]["model_states"]
    return {
        **record,
        "modules": {name: kind for name, kind in record["modules"].items() if name in modules},
        "extra": {name: value for name, value in record["extra"].items() if name in names},
        "left_out": [name for name in record["left_out"] if name in names],
        "optimizers": dict(_held(record["optimizers"], names)),
        "files": {
            **record["files"],
            "model_states": {**model, "tensors": {n: kind for n, kind in model["tensors"].items() if n in names}},
        },
    }


def _held(optimizers: Mapping[str, Any], names: set[str]) -> Iterator[tuple[str, Record]]:
    for role, record in optimizers.items():
        groups = [
            {**group, "parameters": own}
            for group in record["groups"]
            if (own := [name for name in group["parameters"] if name in names])
        ]
        if groups:
            state = {name: values for name, values in record["state"].items() if name in names}
            yield role, {**record, "groups": groups, "state": state}


def _union(mappings: Any) -> dict[str, Any]:
    return {name: value for mapping in mappings for name, value in mapping.items()}
