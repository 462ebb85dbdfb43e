"""A part of an AL layer: the blocks of f that one stage of a group holds. The last part also holds b, g and h."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import nn

from ds_al.layer import ALLayer
from ds_al.tensors import Activation, Target


@runtime_checkable
class Divisible(Protocol):
    """A module of blocks that stages may cut, beside ``nn.Sequential``."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""

    def part(self, run: range) -> nn.Module:
        """Returns the module of a run of the blocks, with the names of the whole."""


def blocks(f: nn.Module) -> int:
    """Returns the number of blocks of f, between which stages may cut it: the children of an ``nn.Sequential``, and the
    blocks of those that are :class:`Divisible`.

    A subclass that overrides ``forward`` is one block, unless it declares ``runs_in_order = True``: its forward of any
    run of children, one run after another, is that of the whole.
    """
    return _divisible(f) if isinstance(f, Divisible) else sum(map(_divisible, _children(f).values())) or 1


def run_of(f: nn.Module, run: range) -> nn.Module:
    """Returns a run of the blocks of f, under the same names."""
    if run == range(blocks(f)):
        return f
    if isinstance(f, Divisible):
        return f.part(run)
    part, at = copy.copy(f), 0
    part._modules = {}
    for name, child in _children(f).items():
        size = _divisible(child)
        own = range(max(run.start - at, 0), min(run.stop - at, size))
        if own:
            part._modules[name] = child if len(own) == size else child.part(own)  # type: ignore[operator]
        at += size
    return part


def _children(f: nn.Module) -> dict[str, nn.Module]:
    in_order = type(f).forward is nn.Sequential.forward or getattr(f, "runs_in_order", False)
    if not isinstance(f, nn.Sequential) or not in_order:
        return {}
    return {name: child for name, child in f._modules.items() if child is not None}


def _divisible(module: nn.Module) -> int:
    return module.num_blocks if isinstance(module, Divisible) else 1


class LayerPart(ALLayer):
    """The blocks ``run`` of an AL layer's f. Weights and buffers have the names that they have in the whole layer.

    Args:
        layer: the whole layer, whose modules are used as they are.
        run: blocks of f, not empty.
    """

    def __init__(self, layer: ALLayer, run: range) -> None:
        ends = run.stop == blocks(layer.f)
        super().__init__(
            run_of(layer.f, run),
            layer.b,
            layer.g,
            layer.h,
            objective=layer.objective,
            associated_loss=layer.associated_loss,
            autoencoder_loss=layer.autoencoder_loss,
            reduce=layer.reduce,
            target_gradient=layer.target_gradient,
            name=layer.name,
        )
        self.run = run
        self.ends = ends
        if not ends:  # only the last part trains, saves and counts what comes after f
            self._modules = {"f": self.f}
            self.__dict__ |= {"objective": layer.objective, "reduce": layer.reduce}
            self.__dict__ |= {name: nn.Identity() for name in "bgh"}

    def forward(self, s: Activation, t: Target) -> tuple[Activation, Target]:
        """Computes ``s`` after this part's blocks; ``t`` is encoded by the last part, and passes through the others."""
        if self.ends:
            return super().forward(s, t)
        return self.activation(s), t

    def associated_parameters(self) -> Iterator[nn.Parameter]:
        """Yields the parameters of this part's blocks, and of what else trains with them on the last part."""
        yield from super().associated_parameters() if self.ends else self.f.parameters()

    def autoencoder_parameters(self) -> Iterator[nn.Parameter]:
        """Yields the parameters of g and h, which the last part holds."""
        if self.ends:
            yield from super().autoencoder_parameters()
