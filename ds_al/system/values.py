"""Nested values as bytes, in the form of :mod:`ds_al.system.plain`: reading them runs no code."""

from __future__ import annotations

import json
import struct
from typing import Any

from safetensors.torch import load, save

from ds_al.system.plain import Tensors, pack, unpack

_LENGTH = struct.Struct("<Q")


def encode(value: Any, *, of: str) -> bytes:
    """Returns a value as bytes.

    Args:
        of: what it is, for errors.

    Raises:
        ALCheckpointError: a part of it has no plain form.
    """
    tensors: Tensors = {}
    text = json.dumps(pack(value, tensors, at=of)).encode()
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return _LENGTH.pack(len(text)) + text + (save(own) if own else b"")


def decode(data: bytes) -> Any:
    """Inverts :func:`encode`; tensors are on the CPU."""
    (length,) = _LENGTH.unpack_from(data)
    end = _LENGTH.size + length
    return unpack(json.loads(data[_LENGTH.size : end]), load(data[end:]) if len(data) > end else {})
