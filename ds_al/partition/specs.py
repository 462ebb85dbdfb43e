"""Layers of a network by their specs: checks them, builds a layer or the part that a stage holds, counts costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepspeed.pipe import LayerSpec, TiedLayerSpec
from deepspeed.runtime import utils as ds_utils
from torch import nn

from ds_al.errors import ALConfigError
from ds_al.layer import ALLayer
from ds_al.partition.part import LayerPart, blocks, run_of
from ds_al.spec import ALLayerSpec
from ds_al.system.generators import Generators


def check_layers(layers: Sequence[Any]) -> None:
    """Raises :class:`~ds_al.errors.ALConfigError` unless these are AL layers or specs, at least one, none tied."""
    for index, layer in enumerate(layers):
        if isinstance(layer, TiedLayerSpec):
            raise ALConfigError(
                f"layer {index} is a TiedLayerSpec: tied weights would be averaged over stages at every step, "
                "so no stage could run freely. Tie inside one f, or give each layer weights of its own"
            )
        is_spec = isinstance(layer, LayerSpec) and issubclass(layer.typename, ALLayer)
        if not is_spec and not isinstance(layer, ALLayer):
            raise ALConfigError(
                f"layer {index} is {layer!r}: expected an ALLayerSpec or an ALLayer. A plain layer list runs "
                "by back-propagation: give it to deepspeed.pipe.PipelineModule, or turn it into AL layers by "
                "ds_al.from_layers"
            )
    if not layers:
        raise ALConfigError("an ALPipelineModule needs at least one AL layer, got none")


class PartSpec(LayerSpec):
    """Builds the part of an AL layer that one stage holds, with the weights that the whole layer has."""

    def __init__(self, layer: ALLayerSpec | ALLayer, index: int, run: range, seed: int) -> None:
        super().__init__(LayerPart)
        self.layer, self.index, self.run, self.seed = layer, index, run, seed

    def build(self, log: bool = False) -> ALLayer:
        """Builds the whole layer, and keeps the part."""
        layer = built(self.layer, self.seed)
        return layer if self.run == range(count_blocks(layer)) else LayerPart(layer, self.run)


def built(spec: ALLayerSpec | ALLayer, seed: int) -> ALLayer:
    """Builds a layer with a seed of its own, apart from the user's generators; a layer stays as it is."""
    if isinstance(spec, ALLayer):
        return spec
    with Generators().aside():
        ds_utils.set_random_seed(seed)
        return spec.build()


def count_blocks(layer: ALLayer) -> int:
    """Returns the number of blocks between which stages may cut a layer; a subclass of ``ALLayer`` stays whole."""
    return blocks(layer.f) if type(layer) is ALLayer else 1


def block_costs(layer: ALLayer, method: str) -> list[float]:
    """Returns the cost of each block of f, and of b, g and h with the last one."""
    count = count_blocks(layer)
    if method in ("uniform", "measured") or method.startswith("cuts:"):
        return [1.0] * count
    if method != "parameters":
        raise ALConfigError(
            f"got partition_method={method!r} for more stages than AL layers: expected 'measured', 'parameters', "
            "'uniform', or 'cuts:2,5', the first blocks of the stages after the first one"
        )
    parts = [run_of(layer.f, range(i, i + 1)) for i in range(count)]
    own = [float(sum(p.numel() for p in part.parameters())) for part in parts]
    own[-1] += sum(p.numel() for part in (layer.b, layer.g, layer.h) for p in part.parameters())
    return own


def name_of(spec: Any) -> str:
    """Returns the name of the class of f."""
    f = spec.parts["f"] if isinstance(spec, ALLayerSpec) else getattr(spec, "f", spec)
    return f.typename.__name__ if isinstance(f, LayerSpec) else type(f).__name__


def classes_of(spec: Any) -> list[str]:
    """Returns the names of the classes of a layer, its f and the blocks of f."""
    f = spec.parts["f"] if isinstance(spec, ALLayerSpec) else getattr(spec, "f", None)
    blocks = [type(block).__name__ for block in f] if isinstance(f, nn.Sequential) else []
    return [name_of(spec), *blocks, ALLayer.__name__]


def decoder_of(spec: Any) -> nn.Module:
    """Returns the h of a layer, built alone where possible."""
    if isinstance(spec, ALLayerSpec):
        return spec.build_decoder()
    return spec.h if isinstance(spec, ALLayer) else spec.build().h
