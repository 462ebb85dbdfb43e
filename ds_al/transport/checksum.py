"""Checksums of messages: the receiver notices a bit that changed on the way, before it uses the message.

The checksum of a tensor is the sum of its numbers, read as integers, modulo 2^64. A single changed bit changes the sum
by a power of two, so it is always noticed. The sum does not depend on the order of the numbers, and thus not on the
tensor's strides, and is computed on the tensor's device.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksums(message: tuple[Tensor, ...]) -> Tensor:
    """Returns the checksum of each tensor, int64 ``(tensors,)``."""
    return torch.stack([_bits(tensor).sum(dtype=torch.int64) for tensor in message])


def changed(message: tuple[Tensor, ...], sent: Tensor) -> int | None:
    """Index of the first tensor whose checksum is not the one that was sent; waits for the device."""
    differs = (checksums(message) != sent).tolist()
    return differs.index(True) if True in differs else None


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers."""
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(_INTEGERS[tensor.itemsize])
