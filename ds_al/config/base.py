"""Base of config blocks: strict types, errors that name the nearest key, and reading of files."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ds_al.errors import ALConfigError

BLOCK = "associated_learning"


class StrictModel(BaseModel):
    """Base class of config blocks. An unknown key raises an error that names the nearest valid one."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_file(path: str | Path) -> dict[str, Any]:
    """Reads a config file.

    Raises:
        ALConfigError: the file does not exist, is not JSON, or is not an object.
    """
    path = Path(path)
    if not path.is_file():
        raise ALConfigError(f"config {str(path)!r} does not exist: give --deepspeed_config the path of a JSON file")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ALConfigError(f"config {str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ALConfigError(f"config {str(path)!r} holds a {type(config).__name__}: expected an object {{...}}")
    return config


def with_scheduler_steps(config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Returns a config whose ``"total_num_steps": "auto"`` of the LR schedule is replaced by a number of steps."""
    params = config.get("scheduler", {}).get("params", {})
    if params.get("total_num_steps") != "auto":
        return dict(config)
    return {**config, "scheduler": {**config["scheduler"], "params": {**params, "total_num_steps": steps}}}


def validate(model: type[BaseModel], block: Any, *, where: str) -> Any:
    """Validates one block, and converts pydantic's errors into one :class:`ALConfigError`."""
    if not isinstance(block, Mapping):
        raise ALConfigError(f'"{where}" is a {type(block).__name__}: expected an object {{...}}')
    try:
        return model.model_validate(dict(block))
    except ValidationError as error:
        lines = [_explain(model, item, where) for item in error.errors()]
        raise ALConfigError("\n".join(lines)) from None


def _explain(model: type[BaseModel], item: Any, where: str) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(item["loc"][-1]), model.model_fields, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(model.model_fields)}"
        return f'"{where}.{path}" is not a key of this block: {hint}'
    return f'"{where}.{path}": got {item["input"]!r}: {item["msg"]}'
