"""``torch.compile`` of the functions of AL layers: each by itself, so that partitions change nothing.

A graph never reaches from one function into another, shapes are always static, and no function's graphs count
against another's limit: what is compiled for a layer depends on that layer alone. Random draws stay torch's own
(``fallback_random``), so they follow the layer's seed, and a compiled layer draws what the plain one draws.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import nn

from ds_al.compute.recompute import Recomputed
from ds_al.config.associated_learning import ALConfig, CompileConfig
from ds_al.config.base import BLOCK
from ds_al.errors import ALConfigError

if TYPE_CHECKING:
    from ds_al.layer import ALLayer
    from ds_al.module import ALPipelineModule


class ComputeOptions(PipelineEngine):
    """The part of the AL engine that says how its layers compute: recomputed, compiled, or plainly."""

    al: ALConfig
    module: ALPipelineModule
    _is_compiled: bool

    def _prepare_layers(self) -> None:
        """Sets up activation checkpointing, then compilation, as the config says."""
        interval = self.module.activation_checkpoint_interval
        for _, layer in self.module.local_layers:
            layer.recomputed = Recomputed(layer.f, interval=interval) if interval else None
        if self.al.compile is not None:
            self._compile_layers(self.al.compile)

    def compile(  # type: ignore[override]
        self, backend: str = "inductor", compile_kwargs: dict[str, Any] | None = None, **unsupported: Any
    ) -> None:
        """Compiles f and b of every layer of this stage, as the config's ``compile`` block does; on every rank.

        Args:
            backend: of ``torch.compile``.
            compile_kwargs: ``{"options": {...}}`` for the backend.

        Raises:
            ALConfigError: the layers are compiled already, shapes may change, or an option is not supported.
        """
        kwargs = dict(compile_kwargs or {})
        options = kwargs.pop("options", None) or {}
        if refused := sorted({*kwargs, *(name for name, value in unsupported.items() if value)}):
            raise ALConfigError(f"engine.compile({refused[0]}=...) is not supported for AL layers: leave it out")
        self._compile_layers(CompileConfig(backend=backend, options=options))

    def _compile_layers(self, config: CompileConfig) -> None:
        if self._is_compiled:
            raise ALConfigError(
                f'the layers are compiled already, by "{BLOCK}.compile" or engine.compile(): do it once'
            )
        if self.module.dynamic_shape:
            raise ALConfigError(
                f'"{BLOCK}.compile" with dynamic_shape: a graph is compiled for one shape, so that it depends on no '
                "other. Give micro-batches of one shape (texts of one length), or do not compile"
            )
        for index, layer in self.module.local_layers:
            compile_layer(layer, config, index=index)
        self._is_compiled = True


def compile_layer(layer: ALLayer, config: CompileConfig, *, index: int) -> None:
    """Compiles functions of a layer in place: ``state_dict``, copies and evaluation stay as they are.

    The compiler runs at the first micro-batch. Of a recomputed f every segment is compiled by itself.

    Args:
        index: of the layer in the network, for the names of the graphs.
    """
    for name in config.functions:
        targets = layer.recomputed.segments if name == "f" and layer.recomputed else [getattr(layer, name)]
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
