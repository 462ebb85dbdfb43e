"""Groups of consecutive layers of a ``PipelineModule`` as one module, built and called as in DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from deepspeed.pipe import LayerSpec, TiedLayerSpec
from deepspeed.runtime import utils as ds_utils
from torch import nn

from ds_al.convert.head import last_linear, without
from ds_al.system.generators import Generators
from ds_al.tensors import Activation


class Function(nn.Module):
    """Module wrapper of a layer that is a plain function."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        """Calls the function."""
        return self.function(x)


class TiedUse(nn.Module):
    """Another use of a tied module whose weights belong to its first use in the same group."""

    def __init__(self, module: nn.Module, forward_fn: Callable[[nn.Module, Any], Any] | None) -> None:
        super().__init__()
        self._tied = (module,)  # a tuple, so that its weights are not listed, saved and counted twice
        self.forward_fn = forward_fn

    def forward(self, x: Any) -> Any:
        """Calls ``forward_fn(module, x)``, or the module itself."""
        (module,) = self._tied
        return module(x) if self.forward_fn is None else self.forward_fn(module, x)


class TiedFirst(nn.Module):
    """The first use of a tied module that has a ``forward_fn``."""

    def __init__(self, module: nn.Module, forward_fn: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.module = module
        self.forward_fn = forward_fn

    def forward(self, x: Any) -> Any:
        """Calls ``forward_fn(module, x)``."""
        return self.forward_fn(self.module, x)


class Group(nn.Sequential):
    """A sequence of layers: ``LayerSpec``, ``TiedLayerSpec``, modules, functions.

    Args:
        layers: the layers.
        start: index of the first one in the network.
        base_seed: plus a layer's index, the seed under which a specification is built, so the weights are those of
            ``PipelineModule(layers, seed_layers=True, base_seed=base_seed)``.
    """

    def __init__(self, layers: Sequence[Any], *, start: int, base_seed: int) -> None:
        tied: dict[Any, nn.Module] = {}
        super().__init__(*(build(layer, tied, seed=base_seed + start + i) for i, layer in enumerate(layers)))


class HeadBody(Group):
    """The last group of a network without the linear layer that computes the scores: ``s -> (B, D)``."""

    def __init__(self, layers: Sequence[Any], *, start: int, base_seed: int, num_classes: int) -> None:
        super().__init__(layers, start=start, base_seed=base_seed)
        path = last_linear(self, num_classes)
        assert path is not None
        self._modules.update({name: part for name, part in without(self, path)._modules.items() if part is not None})


def head_scores(layers: Sequence[Any], *, start: int, base_seed: int, num_classes: int) -> nn.Module:
    """Builds the linear layer omitted by :class:`HeadBody`, with its weights."""
    group = Group(layers, start=start, base_seed=base_seed)
    path = last_linear(group, num_classes)
    assert path is not None
    return group.get_submodule(path)


def build(layer: Any, tied: dict[Any, nn.Module], *, seed: int | None) -> nn.Module:
    """Builds the module of one layer. ``tied`` maps tied keys to the modules built so far. The random state is
    preserved."""
    if isinstance(layer, nn.Module):
        return layer
    if not isinstance(layer, LayerSpec):
        return Function(layer)
    if isinstance(layer, TiedLayerSpec) and layer.key in tied:
        return TiedUse(tied[layer.key], layer.forward_fn)
    with Generators().aside():
        if seed is not None:
            ds_utils.set_random_seed(seed)
        module = layer.build()
    if isinstance(layer, TiedLayerSpec):
        tied[layer.key] = module
        if layer.forward_fn is not None:
            return TiedFirst(module, layer.forward_fn)
    return module if isinstance(module, nn.Module) else Function(module)


def on_meta(s: Activation) -> Activation:
    """Moves an activation to the meta device, keeping its shapes only."""
    return tuple(part.to("meta") for part in s) if isinstance(s, tuple) else s.to("meta")
