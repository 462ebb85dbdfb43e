"""``torch.compile`` of AL layers, each function separately, so that results are independent of the partition.

A graph never spans two functions, shapes are always static, and graphs of one function do not count toward another's
recompile limit: the compiled code of a layer depends on that layer alone. Random draws remain torch's own
(``fallback_random``), so they follow the layer's seed, and equal those of the eager layer.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ds_al.compute.recompute import Recomputed
from ds_al.config.associated_learning import CompileConfig
from ds_al.config.base import BLOCK
from ds_al.errors import ALConfigError
from ds_al.layer import ALLayer


def compile_config(
    backend: str, compile_kwargs: Mapping[str, Any] | None, unsupported: Mapping[str, Any]
) -> CompileConfig:
    """Returns the config block equivalent to arguments of ``engine.compile``.

    Raises:
        ALConfigError: an option is not supported.
    """
    kwargs = dict(compile_kwargs or {})
    options = kwargs.pop("options", None) or {}
    if refused := sorted({*kwargs, *(name for name, value in unsupported.items() if value)}):
        raise ALConfigError(f"engine.compile({refused[0]}=...) is not supported for AL layers: leave it out")
    return CompileConfig(backend=backend, options=options)


def compile_layers(layers: Iterable[tuple[int, ALLayer]], config: CompileConfig, *, dynamic_shape: bool) -> None:
    """Compiles functions of layers in place; see :func:`compile_layer`.

    Args:
        layers: ``(index in the network, layer)``.
        config: functions, backend and options.
        dynamic_shape: whether shapes of micro-batches may change.

    Raises:
        ALConfigError: shapes of micro-batches may change.
    """
    if dynamic_shape:
        raise ALConfigError(
            f'"{BLOCK}.compile" with dynamic_shape: a graph is compiled for one shape, so that it depends on no '
            "other. Give micro-batches of one shape (texts of one length), or do not compile"
        )
    for index, layer in layers:
        compile_layer(layer, config, index=index)


def compile_layer(layer: ALLayer, config: CompileConfig, *, index: int) -> None:
    """Compiles functions of a layer in place, without effect on ``state_dict``, copies and evaluation.

    The compiler runs at the first micro-batch. Each segment of an f with activation checkpointing is compiled
    separately.

    Args:
        index: index of the layer in the network, for the names of the graphs.
    """
    for name in config.functions:
        recomputed = layer.recomputed if name == "f" else None
        targets = recomputed.segments if isinstance(recomputed, Recomputed) else [layer.get_submodule(name)]
        for number, module in enumerate(targets):
            if any(True for _ in module.parameters()):
                _compile(module, config, name=f"layer_{index:02d}_{name}_{number}")


def _compile(module: nn.Module, config: CompileConfig, *, name: str) -> None:
    plain = module._call_impl

    def call(*args: Any) -> Any:
        return plain(*args)

    options = {**config.options, "fallback_random": True} if config.backend == "inductor" else None
    compiled = torch.compile(
        _with_own_code(call, name), backend=config.backend, dynamic=False, fullgraph=True, options=options
    )
    # The attribute that nn.Module.compile() sets; copies and pickles of the module omit it. Evaluation stays eager,
    # since exits of other stages' layers are decoded with eager copies.
    module._compiled_call_impl = lambda *args: (compiled if module.training else plain)(*args)


def _with_own_code(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Returns a function with its own code object, by which the compiler caches graphs and limits their number."""
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
