"""What one stage sends to the next for a micro-batch: ``(s ..., t ..., report)``, flat."""

from __future__ import annotations

from torch import Tensor

from ds_al.tensors import Activation, Target


def pack(s: Activation, t: Target, report: Tensor) -> tuple[Tensor, ...]:
    """Activation, target message and report as one flat tuple."""
    return (*_parts(s), *_parts(t), report)


def unpack(message: tuple[Tensor, ...], *, target_tensors: int) -> tuple[Activation, Target, Tensor]:
    """The inverse of :func:`pack`. A single tensor is not left in a tuple.

    Args:
        target_tensors: tensors in a target message, which the objective says.
    """
    *parts, report = message
    cut = len(parts) - target_tensors
    return _join(parts[:cut]), _join(parts[cut:]), report


def _parts(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _join(parts: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return parts[0] if len(parts) == 1 else tuple(parts)
