"""How the numbers of a tensor lie when it travels: as torch's convolutions left them, or else row by row.

A map ``(B, C, H, W)`` with channels last stays so, on its way to another process as within one. Turning it around and
back would cost a convolution network some percent of its time. This file knows no ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(tensor: Tensor) -> bool:
    """Whether this is a map whose channels lie last, without gaps, and which is not contiguous as well."""
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself if it is contiguous or a map with channels last, else a contiguous copy."""
    return tensor if is_channels_last(tensor) else tensor.contiguous()
