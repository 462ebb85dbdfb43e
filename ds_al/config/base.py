"""Base of config blocks: strict types, errors that name the nearest key, and reading of files."""

from __future__ import annotations

import difflib
import json
import math
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ds_al.errors import ALConfigError

BLOCK = "associated_learning"


class StrictModel(BaseModel):
    """Base class of config blocks. An unknown key raises an error that names the nearest valid one.

    Types are those of JSON, without conversion: ``true`` is no number, ``"2"`` and ``2.0`` are no integers, and numbers
    are finite.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def read_file(path: str | Path) -> dict[str, Any]:
    """Reads a config file, JSON in UTF-8.

    Raises:
        ALConfigError: the file does not exist, is not UTF-8 or not JSON, is not an object, has a key twice in one
            object, or has a value that :func:`checked` refuses.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ALConfigError(f"config {str(path)!r} {what}: give --deepspeed_config the path of a JSON file")
    try:
        config = parse(read_text(path))
    except OSError as error:
        raise ALConfigError(f"config {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ALConfigError(f"config {str(path)!r} is not UTF-8 ({error}): save it as UTF-8") from error
    except ValueError as error:
        raise ALConfigError(f"config {str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ALConfigError(f"config {str(path)!r} holds a {type(config).__name__}: expected an object {{...}}")
    return checked(config)


def read_text(path: Path) -> str:
    """Reads a text in UTF-8, with or without a byte order mark."""
    return path.read_bytes().decode("utf-8-sig")


def parse(text: str) -> Any:
    """Parses JSON.

    Raises:
        ValueError: the text is not JSON, is nested too deep, or has a key twice in one object.
    """
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a deep copy of a config.

    Raises:
        ALConfigError: a value is none of JSON's; a number is NaN or infinite, as ``1e400`` is; a string holds a NUL or
            half of a surrogate pair, so that no file has such a name or content. The message names the key's path.
    """
    try:
        return {key: _checked(value, key) for key, value in config.items() if _is_key(key, "")}
    except RecursionError:
        raise ALConfigError("the config is nested too deep, or holds itself") from None


def with_scheduler_steps(config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Returns a config whose ``"total_num_steps": "auto"`` of the LR schedule is replaced by a number of steps."""
    scheduler = config.get("scheduler")
    params = scheduler.get("params") if isinstance(scheduler, Mapping) else None
    if not isinstance(scheduler, Mapping) or not isinstance(params, Mapping) or params.get("total_num_steps") != "auto":
        return dict(config)
    return {**config, "scheduler": {**scheduler, "params": {**params, "total_num_steps": steps}}}


def validate(model: type[BaseModel], block: Any, *, where: str = "") -> Any:
    """Validates one block, and converts pydantic's errors into one :class:`ALConfigError`.

    Args:
        model: type of the block.
        block: its content.
        where: path of the block in the config; empty for the config itself.
    """
    if not isinstance(block, Mapping):
        raise ALConfigError(f'"{where}" is a {type(block).__name__}: expected an object {{...}}')
    try:
        return model.model_validate(dict(block))
    except ValidationError as error:
        lines = [_explain(model, block, item, where) for item in error.errors()]
        raise ALConfigError("\n".join(dict.fromkeys(lines))) from None


def nearest(name: Any, valid: Iterable[str], *, cutoff: float = 0.4, otherwise: str | None = None) -> str:
    """Returns a hint for a name that is not valid: the nearest one that is, or else ``otherwise``, or all of them."""
    valid = list(valid)
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else otherwise or f"valid keys: {', '.join(valid)}"


def _explain(model: type[BaseModel], block: Any, item: Any, where: str) -> str:
    keys = _keys(block, item)
    path = ".".join(filter(None, [where, *map(str, keys)]))
    if item["type"] == "extra_forbidden":
        return f'"{path}" is not a key of this block: {nearest(keys[-1], _model_at(model, keys[:-1]).model_fields)}'
    if item["type"] == "missing":
        return f'"{path}" is missing: this block needs it'
    return f'"{path}": got {item["input"]!r}: {item["msg"]}'


def _keys(block: Any, item: Any) -> list[Any]:
    """Returns the keys that lead to what an error is about, without pydantic's names of union members."""
    keys: list[Any] = []
    for part in item["loc"]:
        if isinstance(block, Mapping) and (part in block or item["type"] == "missing"):
            block = block.get(part)
        elif isinstance(block, Sequence) and isinstance(part, int):
            block = block[part] if part < len(block) else None
        else:
            continue
        keys.append(part)
    return keys


def _model_at(model: type[BaseModel], keys: Iterable[Any]) -> type[BaseModel]:
    """Returns the type of the block that keys lead to."""
    for key in keys:
        if key in model.model_fields:
            model = next(_models(model.model_fields[key].annotation), model)
    return model


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for member in typing.get_args(annotation):
        yield from _models(member)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f'the key "{key}" is given twice in one object, as {found[key]!r} and {value!r}')
        found[key] = value
    return found


def _checked(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _checked(entry, f"{path}.{key}") for key, entry in value.items() if _is_key(key, path)}
    if isinstance(value, (list, tuple)):
        return [_checked(entry, f"{path}.{index}") for index, entry in enumerate(value)]
    if isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ALConfigError(f'"{path}": got {value}: expected a finite number')
    elif not (value is None or isinstance(value, (bool, int, float))):
        raise ALConfigError(f'"{path}": got a {type(value).__name__}: expected a value that JSON has')
    return value


def _is_key(key: Any, path: str) -> bool:
    if not isinstance(key, str):
        raise ALConfigError(f'"{path}": got the key {key!r}, a {type(key).__name__}: expected strings')
    _check_text(key, path)
    return True


def _check_text(text: str, path: str) -> None:
    if "\0" in text:
        raise ALConfigError(f'"{path}": got {text!r}: expected a text without NUL')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ALConfigError(f'"{path}": got {text!r}, half of a surrogate pair: expected valid Unicode') from None
