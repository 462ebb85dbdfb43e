"""How a message travels: as it is, or with its float32 tensors as bfloat16 or int8, for slow links.

::

    (s ..., t ..., report)  --- encode --->  tensors that travel  --- decode --->  (s ..., t ..., report)

Encoded are the activations and what is float32 of the target message: codes and code tables. Labels and other
integers, masks of booleans, other floats and the report (losses and stage metrics) travel as they are. A stage's
neighbour trains on what arrives, so the result depends on where the network is cut; it depends on nothing else, neither
on the schedule nor on the queue depth. Nothing is drawn at random, and no device is waited for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_al.errors import ALTransportError

Message = tuple[Tensor, ...]

BLOCK = 128
"""Neighbouring numbers of a flattened tensor that share a scale, in int8."""
_STEPS = 127  # of int8, on either side of 0


class Compression:
    """Messages as they are: ``"fp32"``."""

    def encode(self, message: Message) -> Message:
        """What travels for ``(s ..., t ..., report)``.

        Raises:
            ALTransportError: what arrives could not be told from something else; see the subclasses.
        """
        return message

    def decode(self, message: Message) -> Message:
        """The inverse of :meth:`encode`, up to its rounding."""
        return message

    def relative_error(self, x: Tensor) -> float:
        """``|decode(encode(x)) - x| / |x|`` of a float32 tensor, in the 2-norm; 0 where x is 0."""
        arrived, _ = self.decode(self.encode((x, x.new_zeros(1))))
        norm = torch.linalg.vector_norm(x)
        return (torch.linalg.vector_norm(arrived - x) / norm).item() if norm > 0 else 0.0


class BFloat16Compression(Compression):
    """``"bf16"``: rounded to the nearest bfloat16, so to within ``2^-8`` of each number. NaN and infinity arrive."""

    def encode(self, message: Message) -> Message:
        """float32 as bfloat16.

        Raises:
            ALTransportError: a tensor is bfloat16 already, which would arrive as float32.
        """
        *parts, report = message
        if any(part.dtype is torch.bfloat16 for part in parts):
            raise ALTransportError(
                'a layer passes bfloat16 on, which message_dtype "bf16" would turn into float32 on arrival: use '
                '"fp32", under which every tensor travels as it is, or pass float32 on'
            )
        return (*(part.to(torch.bfloat16) if part.dtype is torch.float32 else part for part in parts), report)

    def decode(self, message: Message) -> Message:
        """bfloat16 as float32."""
        *parts, report = message
        return (*(part.to(torch.float32) if part.dtype is torch.bfloat16 else part for part in parts), report)


class Int8Compression(Compression):
    """``"int8"``: a scale per block of :data:`BLOCK` numbers, the largest magnitude in it, in float32.

    Numbers arrive to within half a step, ``scale / 254``; zeros and the largest of a block are exact. A block that
    holds NaN or infinity arrives as NaN throughout, and the losses show it: pass masks as booleans, not as minus
    infinities.
    """

    def encode(self, message: Message) -> Message:
        """Each float32 tensor as int8 of its shape, and behind it its scales ``(blocks,)``."""
        *parts, report = message
        travelling: list[Tensor] = []
        for part in parts:
            travelling += quantize(part) if part.dtype is torch.float32 else (part,)
        return (*travelling, report)

    def decode(self, message: Message) -> Message:
        """int8 and scales as float32."""
        *parts, report = message
        arrived = []
        for part, behind in zip(parts, [*parts[1:], report.new_empty(0, dtype=torch.bool)], strict=True):
            if part.dtype is torch.float32:
                continue  # no float32 travels but scales
            arrived.append(dequantize(part, behind) if behind.dtype is torch.float32 else part)
        return (*arrived, report)


COMPRESSIONS: dict[str, type[Compression]] = {"fp32": Compression, "bf16": BFloat16Compression, "int8": Int8Compression}
"""By ``message_dtype``."""


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as int8 of its shape, and scales ``(blocks,)``: NaN where a block has a number that is none."""
    blocks = _blocks(x)
    scales = torch.linalg.vector_norm(blocks, ord=torch.inf, dim=1)
    steps = (blocks / scales.masked_fill(scales == 0, 1.0)[:, None]).mul_(_STEPS).round_().to(torch.int8)
    return steps.flatten()[: x.numel()].view(x.shape), scales.masked_fill_(~scales.isfinite(), torch.nan)


def dequantize(steps: Tensor, scales: Tensor) -> Tensor:
    """The inverse of :func:`quantize`, up to its rounding."""
    numbers = _blocks(steps.to(torch.float32)).div(_STEPS).mul_(scales[:, None])
    return numbers.flatten()[: steps.numel()].view(steps.shape)


def _blocks(x: Tensor) -> Tensor:
    """``(blocks, BLOCK)``, the last one filled up with zeros."""
    flat = x.reshape(-1)
    missing = -flat.numel() % BLOCK
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, BLOCK)
