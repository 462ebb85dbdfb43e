"""``torch.compile`` of the functions of AL layers: each by itself, so that partitions change nothing.

A graph never reaches from one function into another, shapes are always static, and no function's graphs count
against another's limit: what is compiled for a layer depends on that layer alone. Random draws stay torch's own
(``fallback_random``), so they follow the layer's seed, and a compiled layer draws what the plain one draws.
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
    """The config block that arguments of ``engine.compile`` amount to.

    Raises:
        ALConfigError: an option is not supported.
    """
    kwargs = dict(compile_kwargs or {})
    options = kwargs.pop("options", None) or {}
    if refused := sorted({*kwargs, *(name for name, value in unsupported.items() if value)}):
        raise ALConfigError(f"engine.compile({refused[0]}=...) is not supported for AL layers: leave it out")
    return CompileConfig(backend=backend, options=options)


def compile_layers(layers: Iterable[tuple[int, ALLayer]], config: CompileConfig, *, dynamic_shape: bool) -> None:
    """Compiles functions of ``(index in the network, layer)``, each by itself; see :func:`compile_layer`.

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
    """Compiles functions of a layer in place: ``state_dict``, copies and evaluation stay as they are.

    The compiler runs at the first micro-batch. Of a recomputed f every segment is compiled by itself.

    Args:
        index: of the layer in the network, for the names of the graphs.
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
    # The slot that nn.Module.compile() fills: copies and pickles of the module go without it. Evaluation stays plain,
    # since exits of other stages' layers are decoded with plain copies.
    module._compiled_call_impl = lambda *args: (compiled if module.training else plain)(*args)


def _with_own_code(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A copy that shares no code object: by those the compiler keeps graphs, and counts them against its limit."""
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
