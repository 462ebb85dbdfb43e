"""Compression of messages for slow links: float32 tensors are sent as fp32, bf16 or block-quantized int8.

::

    (s ..., t ..., report)  --- encode --->  compressed tensors  --- decode --->  (s ..., t ..., report)

Compressed are the float32 activations and the float32 tensors of the target message: codes and code tables. Integers
such as labels, boolean masks, other floats and the report (losses and stage metrics) are sent unchanged. The next stage
trains on the decoded tensors, so the weights depend on the partition, but neither on the schedule nor on the queue
depth. Rounding is deterministic, and the host never waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_al.errors import ALTransportError

Message = tuple[Tensor, ...]

BLOCK = 128
"""Block size of int8: consecutive numbers of a flattened tensor that share a scale."""
_STEPS = 127  # int8 steps on either side of 0


class Compression:
    """``"fp32"``: messages are sent unchanged. Base class of the others."""

    def encode(self, message: Message) -> Message:
        """Returns the tensors to send for ``(s ..., t ..., report)``.

        Raises:
            ALTransportError: the receiver could not decode the message unambiguously; see the subclasses.
        """
        return message

    def decode(self, message: Message) -> Message:
        """Inverts :meth:`encode`, up to its rounding."""
        return message

    def relative_error(self, x: Tensor) -> float:
        """Returns ``|decode(encode(x)) - x| / |x|`` of a float32 tensor, in the 2-norm; 0 if x is 0."""
        arrived, _ = self.decode(self.encode((x, x.new_zeros(1))))
        norm = torch.linalg.vector_norm(x)
        return (torch.linalg.vector_norm(arrived - x) / norm).item() if norm > 0 else 0.0


class BFloat16Compression(Compression):
    """``"bf16"``: rounds to the nearest bfloat16, to within ``2^-8`` of each number. Keeps NaN and infinity."""

    def encode(self, message: Message) -> Message:
        """Casts float32 to bfloat16.

        Raises:
            ALTransportError: a tensor is bfloat16 already, and would be received as float32.
        """
        *parts, report = message
        if any(part.dtype is torch.bfloat16 for part in parts):
            raise ALTransportError(
                'a layer passes bfloat16 on, which message_dtype "bf16" would turn into float32 on arrival: use '
                '"fp32", which sends every tensor unchanged, or pass float32 on'
            )
        return (*(part.to(torch.bfloat16) if part.dtype is torch.float32 else part for part in parts), report)

    def decode(self, message: Message) -> Message:
        """Casts bfloat16 to float32."""
        *parts, report = message
        return (*(part.to(torch.float32) if part.dtype is torch.bfloat16 else part for part in parts), report)


class Int8Compression(Compression):
    """``"int8"``: quantizes blocks of :data:`BLOCK` numbers with one float32 scale each, the block's largest magnitude.

    The error is at most half a step, ``scale / 254``; zeros and the largest number of a block are exact. A block with
    NaN or infinity is decoded as all NaN, which the losses show: pass masks as booleans, not as minus infinities.
    """

    def encode(self, message: Message) -> Message:
        """Replaces each float32 tensor by int8 of its shape, followed by its scales ``(blocks,)``."""
        *parts, report = message
        travelling: list[Tensor] = []
        for part in parts:
            travelling += quantize(part) if part.dtype is torch.float32 else (part,)
        return (*travelling, report)

    def decode(self, message: Message) -> Message:
        """Restores float32 from int8 and scales."""
        *parts, report = message
        arrived = []
        for part, behind in zip(parts, [*parts[1:], report.new_empty(0, dtype=torch.bool)], strict=True):
            if part.dtype is torch.float32:
                continue  # scales: the only float32 tensors that are sent
            arrived.append(dequantize(part, behind) if behind.dtype is torch.float32 else part)
        return (*arrived, report)


COMPRESSIONS: dict[str, type[Compression]] = {"fp32": Compression, "bf16": BFloat16Compression, "int8": Int8Compression}
"""Compression classes by value of ``message_dtype``."""


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a float32 tensor as int8 of its shape, and scales ``(blocks,)``: NaN for blocks with NaN or infinity."""
    blocks = _blocks(x)
    scales = torch.linalg.vector_norm(blocks, ord=torch.inf, dim=1)
    steps = (blocks / scales.masked_fill(scales == 0, 1.0)[:, None]).mul_(_STEPS).round_().to(torch.int8)
    return steps.flatten()[: x.numel()].view(x.shape), scales.masked_fill_(~scales.isfinite(), torch.nan)


def dequantize(steps: Tensor, scales: Tensor) -> Tensor:
    """Inverts :func:`quantize`, up to its rounding."""
    numbers = _blocks(steps.to(torch.float32)).div(_STEPS).mul_(scales[:, None])
    return numbers.flatten()[: steps.numel()].view(steps.shape)


def _blocks(x: Tensor) -> Tensor:
    """Reshapes to ``(blocks, BLOCK)``, the last block padded with zeros."""
    flat = x.reshape(-1)
    missing = -flat.numel() % BLOCK
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, BLOCK)
