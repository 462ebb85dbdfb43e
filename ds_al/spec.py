"""Specifications of AL layers, so that each stage builds its own layers only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from deepspeed.pipe import LayerSpec
from torch import nn

from ds_al.errors import ALConfigError
from ds_al.layer import ALLayer

Part: TypeAlias = LayerSpec | nn.Module | Callable[[], nn.Module]
"""A function of a layer: a DeepSpeed ``LayerSpec``, a module, or a callable that makes a module."""


def _build(part: Part) -> nn.Module:
    if isinstance(part, LayerSpec):
        return part.build()
    return part if isinstance(part, nn.Module) else part()


class ALLayerSpec(LayerSpec):
    """Builds an :class:`~ds_al.layer.ALLayer` on the stage that owns it, as DeepSpeed's ``LayerSpec`` does.

    Example:
        >>> spec = ds_al.ALLayerSpec(
        ...     f=LayerSpec(nn.Linear, 784, 128),
        ...     b=LayerSpec(nn.Linear, 128, 32),
        ...     g=LayerSpec(nn.Linear, 10, 32),
        ...     h=LayerSpec(nn.Linear, 32, 10),
        ...     autoencoder_loss="cross_entropy",
        ... )
        >>> type(spec.build()).__name__
        'ALLayer'

    Args:
        f, b, g, h: each a ``LayerSpec``, a module, or a callable without arguments that returns a module.
            They are built in this order, so a seed fixes the weights whatever the partition is.
        options: keyword arguments of :class:`~ds_al.layer.ALLayer`.
    """

    def __init__(self, f: Part, b: Part, g: Part, h: Part, **options: Any) -> None:
        for key, part in {"f": f, "b": b, "g": g, "h": h}.items():
            if not callable(part) and not isinstance(part, LayerSpec):
                raise ALConfigError(
                    f"ALLayerSpec {key}={part!r}: expected a LayerSpec, a module or a callable that makes one"
                )
        super().__init__(ALLayer, **options)
        self.parts = {"f": f, "b": b, "g": g, "h": h}

    def build(self, log: bool = False) -> ALLayer:
        """Builds the layer: f, b, g, h in this order."""
        return ALLayer(*(_build(self.parts[key]) for key in "fbgh"), **self.module_kwargs)

    def build_decoder(self) -> nn.Module:
        """Builds h only, which later stages need to decode their own exits."""
        return _build(self.parts["h"])
