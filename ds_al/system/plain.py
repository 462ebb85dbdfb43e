"""Serialization of nested values as JSON and tensors, so that reading a checkpoint runs no code.

``None``, booleans, numbers, strings, lists and dicts with string keys are stored unchanged. Other values become a dict
with one key that starts with ``$``; for a tensor its value is the tensor's name in a separate table. Of dataclasses
only those of ds_al that are marked as :func:`record` have a form.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ds_al.errors import ALCheckpointError

Tensors = dict[str, Tensor]

_TENSOR, _TUPLE, _DICT, _COUNTER, _RECORD = "$tensor", "$tuple", "$dict", "$counter", "$record"
_records: dict[str, Any] = {}

Class = TypeVar("Class", bound=type)


def record(kind: Class) -> Class:
    """Decorates a dataclass of plain values, which :func:`pack` then stores by its name and fields."""
    _records[kind.__name__] = kind
    return kind


def check_dense(value: Tensor, *, at: str) -> None:
    """Checks that a tensor can be stored as its values alone.

    Raises:
        ALCheckpointError: it is sparse, nested or quantized.
    """
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        kind = "nested" if value.is_nested else "quantized" if value.is_quantized else str(value.layout)
        raise ALCheckpointError(
            f"{at}: a {kind} tensor cannot be saved: expected a dense one. A buffer can be left out "
            "(register_buffer(..., persistent=False)); the momentum of an embedding is dense with sparse=False"
        )


def pack(value: Any, tensors: Tensors, *, at: str) -> Any:
    """Returns a value as JSON, and adds its tensors to ``tensors``, under names that start with ``at``.

    Raises:
        ALCheckpointError: a value has an unsupported type, or a tensor is not dense.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        check_dense(value, at=at)
        tensors[at] = value
        return {_TENSOR: at}
    if isinstance(value, (list, tuple)):
        items = [pack(item, tensors, at=f"{at}/{number}") for number, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    if isinstance(value, Mapping):
        if type(value) is not Counter and all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: pack(item, tensors, at=f"{at}/{key}") for key, item in value.items()}
        pairs = [[key, pack(item, tensors, at=f"{at}/{key}")] for key, item in value.items()]
        return {_COUNTER if type(value) is Counter else _DICT: pairs}
    if _records.get(type(value).__name__) is type(value):
        fields = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        return {_RECORD: [type(value).__name__, pack(fields, tensors, at=at)]}
    raise ALCheckpointError(
        f"{at}: a value of {type(value).__name__} cannot be saved: expected numbers, strings, tensors, or lists, "
        "tuples and dicts of them"
    )


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverts :func:`pack`."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(unpack(item, tensors) for item in value[_TUPLE])
    if _RECORD in value:
        name, fields = value[_RECORD]
        return _records[name](**unpack(fields, tensors))
    for tag, kind in ((_DICT, dict), (_COUNTER, Counter)):
        if tag in value:
            return kind({key: unpack(item, tensors) for key, item in value[tag]})
    return {key: unpack(item, tensors) for key, item in value.items()}
