"""A part of an AL layer: the blocks of f that one stage of a group holds. The last part also holds b, g and h."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import nn

from ds_al.layer import ALLayer
from ds_al.tensors import Activation, Target


def blocks(f: nn.Module) -> int:
    """Returns the number of blocks of f, between which stages may cut it: the children of an ``nn.Sequential``.

    A subclass that overrides ``forward`` is one block, unless it declares ``runs_in_order = True``: its forward of any
    run of children, one run after another, is that of the whole.
    """
    if not isinstance(f, nn.Sequential) or not f:
        return 1
    in_order = type(f).forward is nn.Sequential.forward or getattr(f, "runs_in_order", False)
    return len(f) if in_order else 1


def run_of(f: nn.Module, run: range) -> nn.Module:
    """Returns a run of the blocks of f, under the same names."""
    if run == range(blocks(f)):
        return f
    part = copy.copy(f)
    part._modules = dict(list(f._modules.items())[run.start : run.stop])
    return part


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
