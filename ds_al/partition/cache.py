"""On-disk cache of measured layer times, keyed by code, shapes, input, devices and versions.

The files are in ``$DS_AL_CACHE``, or ``$XDG_CACHE_HOME/ds_al``, or ``~/.cache/ds_al``: one JSON file per measurement,
which also contains its key and a digest, and can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import nn

from ds_al.partition.layer_times import LayerTime

Times = list[list[LayerTime]]
"""Layer times by rank and layer."""


def folder() -> Path:
    """Returns the cache folder."""
    if own := os.environ.get("DS_AL_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ds_al"


def signature(layers: Iterable[nn.Module]) -> str:
    """Returns a hash of layers: their modules, plain attributes, parameter shapes, and the source of their classes."""
    digest = hashlib.blake2b(digest_size=16)
    for layer in layers:
        digest.update(repr(layer).encode())
        for name, module in layer.named_modules():
            plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, tuple))}
            digest.update(repr((name, sorted(plain.items()), _source(type(module)))).encode())
        shapes = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in layer.named_parameters()]
        digest.update(repr(shapes).encode())
    return digest.hexdigest()


def path_of(facts: Any) -> Path:
    """Returns the file of a measurement.

    Args:
        facts: everything that determines the result, JSON-serializable.
    """
    return folder() / f"layer-times-{_digest(facts)}.json"


def read(facts: Any, *, ranks: int, layers: int) -> Times | None:
    """Returns the result of an earlier run with the same facts, or ``None``. Prints a warning if the file is
    unusable."""
    path = path_of(facts)
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        if content["digest"] != _digest([facts, content["times"]]):
            raise ValueError("it was changed, or is of other layers or devices")
        times = [[LayerTime(**entry) for entry in rank] for rank in content["times"]]
        numbers = [getattr(each, field.name) for rank in times for each in rank for field in fields(LayerTime)]
        if [len(rank) for rank in times] != [layers] * ranks:
            raise ValueError(f"expected {layers} layers on each of {ranks} ranks")
        if not all(type(x) in (int, float) and math.isfinite(x) and x >= 0 for x in numbers):
            raise ValueError("expected finite numbers of at least 0")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        print(f"ds_al: ignored the measured times in {path}: {type(error).__name__}: {error}", file=sys.stderr)
        return None
    return times


def write(facts: Any, times: Sequence[Sequence[LayerTime]]) -> None:
    """Saves a measurement. If the folder is not writable, it prints a warning and raises no error."""
    path = path_of(facts)
    rows = [[asdict(layer) for layer in rank] for rank in times]
    content = {"facts": facts, "times": rows, "digest": _digest([facts, rows])}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, path)  # atomic: no other job reads a partial file
    except OSError as error:
        print(f"ds_al: could not keep the measured times in {path}: {error}", file=sys.stderr)


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _source(kind: type) -> str:
    """Returns the source of a class that is not torch's own, since changes to it may change the cost of a layer."""
    if kind.__module__.partition(".")[0] == "torch":
        return ""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return kind.__qualname__
