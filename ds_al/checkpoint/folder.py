"""On-disk format of a checkpoint: files, index, and verification by hashes.

::

    latest                                         tag of the last complete checkpoint
    <tag>/index.json                               layers, shapes, dtypes, scalars, and a hash of each file
    <tag>/layer_02-model_states.safetensors        weights and buffers of AL layer 2: f, b, g, h and its objective
    <tag>/layer_02-associated_optim_states.safetensors    optimizer state of f and b
    <tag>/layer_02-autoencoder_optim_states.safetensors   optimizer state of g and h
    <tag>/layer_02-training_states.safetensors     losses, and the copy of its decoder that later layers decode with
    <tag>/stage_00-random_states.safetensors       states of the host's random number generators
    <tag>/stage_00-client_state.pt                 the user's client state
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ds_al.checkpoint.form import REMEDY, check_form
from ds_al.checkpoint.own import INDEX, check_tag, read_latest
from ds_al.errors import ALCheckpointError
from ds_al.system.plain import Tensors

FORMAT = 2
"""Version of the format; 1 was DeepSpeed's own files with an additional dict."""

_CHUNK = 1 << 22

Record = dict[str, Any]
"""An entry of the index: of a layer, a stage or a file."""


def find(load_dir: str | Path, tag: str | None = None) -> Path:
    """Returns the folder of a checkpoint, by default the latest.

    Raises:
        ALCheckpointError: no checkpoint was found, or the tag names no folder in ``load_dir``.
    """
    root = Path(load_dir)
    folder = root / (read_latest(root) if tag is None else check_tag(str(tag), where="load_checkpoint"))
    if not folder.exists():  # the process ended while it replaced a checkpoint by another one of the same tag
        folder = max(folder.parent.glob(f".{folder.name}.*.old"), default=folder)
    if not (folder / INDEX).is_file():
        raise ALCheckpointError(f"no checkpoint in {str(folder)!r}: {_lacks_index(folder, root)}")
    return folder


def newest(root: Path) -> str | None:
    """Returns the tag of the complete checkpoint of a folder that has trained longest; ``None`` without one.

    It is that of ``latest``, or a later one where the process ended before it could write that file.
    """
    folders = {path.parent.name: path.parent for path in root.glob(f"[!.]*/{INDEX}")}
    with contextlib.suppress(ALCheckpointError):
        folders[read_latest(root)] = find(root)
    trained = {}
    for tag, folder in folders.items():
        with contextlib.suppress(ALCheckpointError):
            trained[tag] = read_index(folder)["counters"]["trained_micro_batches"]
    return max(trained, key=lambda tag: trained[tag], default=None)


def opened(path: str | Path, tag: str | None = None) -> tuple[Path, Record]:
    """Returns folder and index of a checkpoint.

    Args:
        path: folder of checkpoints, of which the latest is used, or of one checkpoint.
        tag: tag of the checkpoint; by default the latest.

    Raises:
        ALCheckpointError: no checkpoint was found, or its index is truncated, altered, or of another format.
    """
    root = Path(path)
    folder = root if tag is None and (root / INDEX).is_file() else find(root, tag)
    return folder, read_index(folder)


def layer_weights(folder: Path, index: Record) -> dict[int, Tensors]:
    """Reads weights and buffers by AL layer, after verifying the files.

    Raises:
        ALCheckpointError: a file is missing, truncated or altered, or holds no tensors.
    """
    found: dict[int, Tensors] = {}
    for layer in index["layers"]:
        record = layer["files"]["model_states"]
        verify(folder, [record], of=f"AL layer {layer['layer']}")
        try:
            found[layer["layer"]] = load_file(folder / record["file"])
        except Exception as error:  # of safetensors and torch: with the right hash, and yet not what a save writes
            raise ALCheckpointError(
                f"file {record['file']!r} in {str(folder)!r} holds no tensors ({_first_line(error)}). {REMEDY}"
            ) from error
    return found


def _lacks_index(folder: Path, root: Path) -> str:
    if any(folder.glob("*model_states.pt")):
        return (
            f"it was saved by DeepSpeed's own engine, or by ds_al before format {FORMAT}, which is not read any more. "
            "The weights of a DeepSpeed pipeline can be loaded into f by ds_al.load_weights(engine, path)"
        )
    there = sorted(path.parent.name for path in root.glob(f"*/{INDEX}") if not path.parent.name.startswith("."))
    return f"expected a file {INDEX}" + (f". Complete checkpoints there: {', '.join(there)}" if there else "")


def read_index(folder: Path) -> Record:
    """Reads the index of a checkpoint.

    Raises:
        ALCheckpointError: the index is truncated, altered, or of a format that this release does not read.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text())
        digest = index.pop("blake2b")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ALCheckpointError(f"{str(path)!r} is cut or altered: it is no index. {REMEDY}") from None
    if index.get("format") != FORMAT:
        raise ALCheckpointError(
            f"{str(path)!r} has format {index.get('format')!r}, this ds_al reads {FORMAT}: use the one that saved it"
        )
    if _digest_of(index) != digest:
        raise ALCheckpointError(f"{str(path)!r} was altered: its hash is not the one that it was saved with. {REMEDY}")
    check_form(index, str(path))
    return index


def write_index(folder: Path, index: Record) -> None:
    """Writes the index, including its own hash."""
    write_text(folder / INDEX, json.dumps({**index, "blake2b": _digest_of(index)}, indent=1))


def _digest_of(index: Record) -> str:
    return hashlib.blake2b(json.dumps(index, sort_keys=True).encode(), digest_size=32).hexdigest()


# ---- files -----------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Record:
    """Writes one file of tensors, and returns its record for the index.

    Raises:
        ALCheckpointError: safetensors does not support a tensor.
    """
    own: Tensors = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        own[name] = value.clone() if storage in storages else value  # the format refuses shared memory
        storages.add(storage)
    try:
        save_file(own, path)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ALCheckpointError(f"{str(path)!r} cannot be written: {error}") from error
    return {**_record(path), "tensors": {name: _kind(value) for name, value in own.items()}}


def write_client_state(path: Path, state: Mapping[str, Any]) -> Record:
    """Writes the user's client state, and checks that :func:`read_client_state` can read it.

    Raises:
        ALCheckpointError: it holds objects whose unpickling could run code.
    """
    torch.save(dict(state), path)
    read_client_state(path)
    return _record(path)


def read_client_state(path: Path) -> dict[str, Any]:
    """Reads the user's client state of a checkpoint.

    Raises:
        ALCheckpointError: it holds objects whose unpickling could run code, or is no dict.
    """
    try:
        _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise anything
        raise ALCheckpointError(
            f"the client_state in {str(path)!r} is cut, or holds what torch.load(weights_only=True) does not read: "
            "keep to numbers, strings, tensors, lists and dicts, or allow a class by "
            f"torch.serialization.add_safe_globals. ({_first_line(error)})"
        ) from None
    if not isinstance(state, dict):
        raise ALCheckpointError(f"the client_state in {str(path)!r} is a {type(state).__name__}, expected a dict")
    return state


def _check_archive(path: Path) -> None:
    """Refuses what ``torch.save`` has not written since 1.6: torch before 2.6 runs code of older forms."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise ValueError("no archive of torch.save")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    sync(part)
    part.replace(path)


def sync(path: Path) -> None:
    """Flushes a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _record(path: Path) -> Record:
    sync(path)
    return {"file": path.name, "bytes": path.stat().st_size, "blake2b": hash_file(path)}


def _kind(value: Tensor) -> list[Any]:
    return [str(value.dtype).removeprefix("torch."), list(value.shape)]


def kinds(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Returns ``[dtype, shape]`` of each tensor, as in the index."""
    return {name: _kind(value) for name, value in tensors.items()}


def hash_file(path: Path) -> str:
    """Returns the BLAKE2b hash of a file, 256 bits."""
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def verify(folder: Path, records: Iterable[Record], *, of: str) -> None:
    """Verifies that files exist in the folder and match size and hash in the index.

    Args:
        records: records of the files in the index.
        of: owner of the files, for errors.

    Raises:
        ALCheckpointError: a file is missing, truncated or altered, or a link that leads out of the folder.
    """
    for record in records:
        path = folder / record["file"]  # a name alone, as the form of the index demands
        name = f"{record['file']!r} of {of} in {str(folder)!r}"
        if not path.is_file():
            raise ALCheckpointError(f"file {name} is missing. {REMEDY}")
        if path.resolve().parent != folder.resolve():
            raise ALCheckpointError(f"file {name} is a link that leads out of it: put the file itself there")
        size = path.stat().st_size
        if size != record["bytes"]:
            raise ALCheckpointError(f"file {name} has {size} bytes, expected {record['bytes']}: it was cut. {REMEDY}")
        if hash_file(path) != record["blake2b"]:
            raise ALCheckpointError(f"file {name} was altered: its hash is not the one that was saved. {REMEDY}")


def read_tensors(folder: Path, record: Record) -> Tensors:
    """Reads the tensors of a verified file as copies: the originals are backed by a memory map of the file.

    Raises:
        ALCheckpointError: the file holds other tensors than the index says.
    """
    tensors = {name: value.clone() for name, value in load_file(folder / record["file"]).items()}
    if kinds(tensors) != record["tensors"]:
        raise ALCheckpointError(
            f"file {record['file']!r} in {str(folder)!r} holds other tensors than its index says. {REMEDY}"
        )
    return tensors
