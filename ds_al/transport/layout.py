"""Message layout: shapes, dtypes and offsets of tensors in a flat buffer, and their encoding as a header."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ds_al.errors import ALTransportError
from ds_al.tensors import is_channels_last

_ON_CPU, _ON_CUDA = 64, 512  # bytes, as torch aligns its own allocations, so that kernels choose the same paths
HEADER = 128  # int64 numbers
_DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
]  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Shapes, dtypes and memory formats of the tensors of a message in its flat buffer.

    Attributes:
        tensors: shape and dtype of each tensor.
        channels_last: whether each tensor is a feature map in channels-last memory format (:mod:`ds_al.tensors`).
        alignment: bytes of which the offset of each tensor is a multiple.
    """

    tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    channels_last: tuple[bool, ...]
    alignment: int = _ON_CPU

    @classmethod
    def of(cls, message: tuple[Tensor, ...]) -> Layout:
        """Returns the layout of a message."""
        return cls(
            tuple((tuple(tensor.shape), tensor.dtype) for tensor in message),
            tuple(map(is_channels_last, message)),
            _ON_CUDA if any(tensor.is_cuda for tensor in message) else _ON_CPU,
        )

    @cached_property
    def nbytes(self) -> int:
        """Size of the flat buffer in bytes."""
        return sum(self._padded(shape, dtype) for shape, dtype in self.tensors)

    def views(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """Returns the tensors of a message as views of a flat ``uint8`` buffer."""
        views, offset = [], 0
        for (shape, dtype), last in zip(self.tensors, self.channels_last, strict=True):
            size = math.prod(shape) * dtype.itemsize
            flat = buffer[offset : offset + size].view(dtype)
            if last:
                batch, channels, height, width = shape
                views.append(flat.view(batch, height, width, channels).permute(0, 3, 1, 2))
            else:
                views.append(flat.view(shape))
            offset += self._padded(shape, dtype)
        return tuple(views)

    def _padded(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return -(-math.prod(shape) * dtype.itemsize // self.alignment) * self.alignment

    def encode(self) -> list[int]:
        """Encodes the layout as ``HEADER`` integers: count, alignment; dtype, rank (negative: channels last), sizes of
        each; 0.

        The last one makes the sum 0, so that a changed bit is noticed.

        Raises:
            ALTransportError: the message has too many tensors or dimensions, or a dtype that cannot be sent.
        """
        numbers = [len(self.tensors), self.alignment]
        for (shape, dtype), last in zip(self.tensors, self.channels_last, strict=True):
            if dtype not in _DTYPES:
                raise ALTransportError(f"a tensor of dtype {dtype} cannot be sent between stages: use one of {_DTYPES}")
            numbers += [_DTYPES.index(dtype), -len(shape) if last else len(shape), *shape]
        if len(numbers) >= HEADER:
            raise ALTransportError(
                f"a message of {len(self.tensors)} tensors needs a header of {len(numbers)} numbers, at most "
                f"{HEADER - 1} fit: pass fewer tensors from layer to layer"
            )
        return [*numbers, *[0] * (HEADER - 1 - len(numbers)), -sum(numbers)]

    @classmethod
    def decode(cls, numbers: list[int]) -> Layout:
        """Inverts :meth:`encode`.

        Raises:
            ALTransportError: the numbers are not those of a header.
        """
        if sum(numbers):
            raise ALTransportError(
                "got a header with other bits than were sent. A memory or a network between the two is faulty: check "
                "or replace both hosts, and resume from the last checkpoint"
            )
        tensors, channels_last, at = [], [], 2
        for _ in range(numbers[0]):
            dtype, rank = _DTYPES[numbers[at]], abs(numbers[at + 1])
            channels_last.append(numbers[at + 1] < 0)
            tensors.append((tuple(numbers[at + 2 : at + 2 + rank]), dtype))
            at += 2 + rank
        return cls(tuple(tensors), tuple(channels_last), numbers[1])

    def __str__(self) -> str:
        return ", ".join(f"{list(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in self.tensors)
