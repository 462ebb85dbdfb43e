"""Output shapes and parameter counts of each layer of a network, from a forward pass on the meta device.

If a layer needs values, all layers are run on the example itself, on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_al.convert.group import build, on_meta
from ds_al.errors import ALConfigError
from ds_al.tensors import Activation


@dataclass(frozen=True)
class Found:
    """Result for one layer.

    Attributes:
        module: the layer itself, on the device of the forward pass; for inspection only.
        output: its output, on the meta device.
        parameters: number of its parameters that no earlier layer has.
    """

    module: nn.Module
    output: Activation
    parameters: int


@torch.no_grad()
def probe(layers: Sequence[Any], example: Activation) -> list[Found]:
    """Runs every layer once, in evaluation mode; changes neither the layers nor the random state.

    Raises:
        ALConfigError: a layer fails on the example, or its output is neither a tensor nor a tuple of tensors.
    """
    try:
        return _run(layers, on_meta(example), _meta)
    except ALConfigError:
        raise
    except Exception:  # operations that need values raise various exceptions
        return _run(layers, example, _real)


def _run(layers: Sequence[Any], s: Any, make: Callable[[Any, dict[Any, nn.Module]], nn.Module]) -> list[Found]:
    found: list[Found] = []
    tied: dict[Any, nn.Module] = {}
    for index, layer in enumerate(layers):
        module = make(layer, tied)
        real = make is _real
        try:
            s = module.eval()(s) if not isinstance(layer, nn.Module) or not real else _evaluated(module, s)
        except Exception as error:
            if not real:
                raise
            raise ALConfigError(
                f"layer {index} ({type(module).__name__}) fails on the example: {type(error).__name__}: {error}. "
                "Give example=x, a micro-batch as training has it"
            ) from error
        parts = s if isinstance(s, tuple) else (s,)
        if not parts or not all(isinstance(part, Tensor) for part in parts):
            raise ALConfigError(
                f"layer {index} ({type(module).__name__}) returns a {type(s).__name__}: expected a tensor or a tuple "
                "of tensors, since only those can travel to the next layer"
            )
        count = sum(parameter.numel() for parameter in module.parameters())
        found.append(Found(module, on_meta(s), count))
    return found


def _meta(layer: Any, tied: dict[Any, nn.Module]) -> nn.Module:
    if isinstance(layer, nn.Module):
        return copy.deepcopy(layer).to("meta")
    with torch.device("meta"):
        return build(layer, tied, seed=None)


def _real(layer: Any, tied: dict[Any, nn.Module]) -> nn.Module:
    return build(layer, tied, seed=None)


def _evaluated(module: nn.Module, s: Any) -> Any:
    """Runs a user's module in evaluation mode and restores its training flags and the random state."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        with torch.random.fork_rng():
            return module.eval()(s)
    finally:
        for part, training in modes:
            part.training = training
