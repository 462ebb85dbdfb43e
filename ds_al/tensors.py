"""Tensors between layers: their types, where gradients stop, and how values are laid out in memory.

A map ``(B, C, H, W)`` with channels last keeps its layout, in a message as within a process: to turn it around and back
would cost a convolution network some percent of its time. This module imports neither DeepSpeed nor
``torch.distributed``.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

Activation = Tensor | tuple[Tensor, ...]
"""What travels between layers on the input side: a tensor, or a tuple (hidden, state, mask, ...)."""

Target = Tensor | tuple[Tensor, ...]
"""What travels between layers on the target side: a tensor, or a tuple of tensors."""


def is_channels_last(tensor: Tensor) -> bool:
    """Whether this is a map whose channels lie last, without gaps. One of a single pixel or channel lies both ways at
    once; torch's kernels, whose rounding differs, then go by its strides, and so does this."""
    if tensor.dim() != 4 or not tensor.is_contiguous(memory_format=torch.channels_last):
        return False
    if not tensor.is_contiguous():
        return True
    _, channels, height, width = tensor.shape
    return tensor.stride()[1::2] == (1, channels) and channels * height * width > 1


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself if it is contiguous or a map with channels last, else a contiguous copy."""
    return tensor if is_channels_last(tensor) else tensor.contiguous()


def first(s: Activation) -> Tensor:
    """The default ``reduce``: the tensor itself, or the first of a tuple."""
    return s if isinstance(s, Tensor) else s[0]


@overload
def stop_gradient(activation: Tensor) -> Tensor: ...
@overload
def stop_gradient(activation: Activation) -> Activation: ...
def stop_gradient(activation: Activation) -> Activation:
    """Cuts the graph, and makes the values dense (:mod:`ds_al.tensors`), so that a layer sees the same bits
    and the same strides whether its predecessor lives in this process or in another one."""
    if isinstance(activation, Tensor):
        return dense(activation.detach())
    return tuple(dense(tensor.detach()) for tensor in activation)


def to_float32(x: Tensor) -> Tensor:
    """bfloat16 and float16 as float32, all others as they are: losses are computed with the digits of float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class HostCopy:
    """A copy of a small tensor on the host, which is not waited for.

    Args:
        tensor: on any device; one on the CPU is taken as it is.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._value, self._event = tensor, None
        if tensor.device.type == "cuda":
            self._value = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._value.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def is_there(self) -> bool:
        """Whether the values have arrived."""
        return self._event is None or self._event.query()

    def wait(self) -> Tensor:
        """Waits for the values, and returns them on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._value
