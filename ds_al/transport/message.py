"""Packing of a micro-batch's message to the next stage: one flat tuple ``(s ..., t ..., report)``."""

from __future__ import annotations

from torch import Tensor

from ds_al.tensors import Activation, Target


def pack(s: Activation, t: Target, report: Tensor) -> tuple[Tensor, ...]:
    """Returns activation, target message and report as one flat tuple."""
    return (*_parts(s), *_parts(t), report)


def unpack(message: tuple[Tensor, ...], *, target_tensors: int) -> tuple[Activation, Target, Tensor]:
    """Inverts :func:`pack`. A single tensor is returned without a tuple.

    Args:
        target_tensors: number of tensors in a target message, which the objective defines.
    """
    *parts, report = message
    cut = len(parts) - target_tensors
    return _join(parts[:cut]), _join(parts[cut:]), report


def _parts(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _join(parts: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return parts[0] if len(parts) == 1 else tuple(parts)
