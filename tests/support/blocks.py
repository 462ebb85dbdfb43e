"""Blocks as users write them, each in two forms: ``plain``, and with what the engine must be robust against.

The plain form computes the same out of place, without checkpoints and without buffers that are used again.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_al.spec import ALLayerSpec

Sides = tuple[Tensor, Tensor, Tensor]
"""Hidden values ``(B, D)``, a boolean mask ``(B, D)``, and whole numbers ``(B,)``."""


class Scaled(nn.Linear):
    """A linear layer that multiplies its input by 0.75 first, in place unless ``plain``."""

    def __init__(self, width_in: int, width_out: int, *, plain: bool = False) -> None:
        super().__init__(width_in, width_out)
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 0.75 if self.plain else x.view(-1).mul_(0.75).view_as(x))


class Entering(nn.Module):
    """First layer: clamps its input and counts up its numbers in place; float64, boolean and integer tensors leave.

    Args:
        reuses: whether every call returns the same mask, overwritten.
    """

    def __init__(self, *, plain: bool, reuses: bool = True) -> None:
        super().__init__()
        self.linear, self.plain, self.reuses = nn.Linear(12, 16), plain, reuses and not plain
        self.register_buffer("used_again", torch.zeros(8, 16, dtype=torch.bool), persistent=False)

    def forward(self, given: tuple[Tensor, Tensor]) -> Sides:
        x, numbers = given
        x = x.clamp(-1, 1) if self.plain else x.clamp_(-1, 1)
        h = self.linear(x)
        mask = h.detach() > -0.5
        if self.reuses and len(mask) == 8:
            mask = self.used_again.copy_(mask)
        return h, mask, numbers + 1 if self.plain else numbers.add_(1)


class Masking(nn.Module):
    """Starts with a ReLU in place, changes mask and numbers in place, and passes them on."""

    def __init__(self, *, plain: bool) -> None:
        super().__init__()
        self.linear, self.dropout, self.plain = nn.Linear(16, 16), nn.Dropout(0.2), plain

    def forward(self, s: Sides) -> Sides:
        h, mask, numbers = s
        if self.plain:
            mask = mask & (numbers > 1).unsqueeze(1)
            h = h.relu()
        else:
            mask.logical_and_((numbers > 1).unsqueeze(1))
            h = nn.functional.relu(h, inplace=True)
        return self.dropout(self.linear(h)) * mask, mask, numbers


class Rectifying(nn.Module):
    """A ReLU in place, and a linear layer."""

    def __init__(self, *, plain: bool) -> None:
        super().__init__()
        self.linear, self.plain = nn.Linear(16, 16), plain

    def forward(self, s: Sides) -> Sides:
        h, *sides = s
        return (self.linear(nn.functional.relu(h, inplace=not self.plain)), *sides)


class Checkpointing(nn.Module):
    """Checkpoints its block itself, in the reentrant form."""

    def __init__(self, *, plain: bool, reentrant: bool = True) -> None:
        super().__init__()
        self.block, self.plain, self.reentrant = nn.Sequential(nn.Linear(16, 16), nn.Tanh()), plain, reentrant

    def forward(self, s: Sides) -> Sides:
        h, *sides = s
        h = self.block(h) if self.plain else checkpoint(self.block, h, use_reentrant=self.reentrant)
        return (h, *sides)


class Experts(nn.Module):
    """One of two experts of unequal size, by the first of the numbers, or the sign of the first value."""

    def __init__(self, width_in: int = 16, width_out: int = 16) -> None:
        super().__init__()
        big = nn.Sequential(nn.Linear(width_in, 20), nn.Tanh(), nn.Linear(20, width_out))
        self.experts = nn.ModuleList([nn.Linear(width_in, width_out), big])

    def forward(self, s: Any) -> Any:
        if isinstance(s, Tensor):
            return self.experts[int(s[0, 0] > 0)](s)
        h, mask, numbers = s
        return self.experts[int(numbers[0] % 2)](h), mask, numbers


class Skipped(nn.Module):
    """Left out at random, by Python's generator and by numpy's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        import numpy as np

        return self.linear(x) if random.random() < 0.6 and np.random.rand() < 0.8 else x * 0.5


class AtTimes(nn.Module):
    """Writes on its input in call number ``first`` alone."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.linear, self.first, self.calls = nn.Linear(4, 4), first, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x.mul_(0.5) if self.calls == self.first else x * 0.5)


def users_layers(*, plain: bool = False) -> list[ALLayerSpec]:
    """Four layers of such blocks; bridges, g and h work in place as well, and so does ``reduce``."""

    def part(width_in: int, width_out: int) -> LayerSpec:
        return LayerSpec(Scaled, width_in, width_out, plain=plain)

    fs = [LayerSpec(f, plain=plain) for f in (Entering, Masking, Checkpointing)] + [LayerSpec(Experts)]
    codes = [4, 6, 6, 6, 6]
    return [
        ALLayerSpec(
            f=f,
            b=part(16, codes[i + 1]),
            g=part(codes[i], codes[i + 1]),
            h=part(codes[i + 1], codes[i]),
            reduce=masked if plain else masked_in_place,
        )
        for i, f in enumerate(fs)
    ]


def masked(s: Sides) -> Tensor:
    return s[0].masked_fill(~s[1], 0.0)


def masked_in_place(s: Sides) -> Tensor:
    return s[0].masked_fill_(s[1].logical_not_(), 0.0)


def users_input(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
    """``x`` of the first layer: values, and numbers."""
    return torch.randn(size, 12, generator=generator), torch.randint(4, (size,), generator=generator)
