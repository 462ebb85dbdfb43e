"""Model zoo: builders of each network as AL layers and as its backprop twin."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from deepspeed.pipe import LayerSpec
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ds_al.errors import ALConfigError
from ds_al.models.lstm import lstm_al, lstm_twin
from ds_al.models.mlp import mlp_al, mlp_twin
from ds_al.models.presets import PRESETS, preset_options
from ds_al.models.resnet import resnet_al, resnet_twin
from ds_al.models.transformer import transformer_al, transformer_twin
from ds_al.models.vgg import vgg_al, vgg_twin
from ds_al.spec import ALLayerSpec

AL_MODELS: dict[str, Callable[..., list[ALLayerSpec]]] = {
    "lstm": lstm_al,
    "mlp": mlp_al,
    "resnet": resnet_al,
    "transformer": transformer_al,
    "vgg": vgg_al,
}
"""Builders of AL layers by name; each accepts keyword arguments only."""

TWINS: dict[str, Callable[..., list[LayerSpec]]] = {
    "lstm": lstm_twin,
    "mlp": mlp_twin,
    "resnet": resnet_twin,
    "transformer": transformer_twin,
    "vgg": vgg_twin,
}
"""Builders of the backprop twins by name, for a plain DeepSpeed ``PipelineModule``."""

Spec = TypeVar("Spec", bound=LayerSpec)


def build_al(name: str, *, preset: str | None = None, **options: Any) -> list[ALLayerSpec]:
    """Builds the layer specs of an AL network, for :class:`~ds_al.module.ALPipelineModule`.

    Args:
        name: a key of :data:`AL_MODELS`.
        preset: ``"paper"``, ``"small"`` or ``"deep"``, sizes from :data:`~ds_al.models.presets.PRESETS`; ``options``
            override them.
        options: keyword arguments of the builder. The same options describe both forms of a model: options of the twin
            alone (its head) are ignored here.
    Raises:
        ALConfigError: the name, the preset or an option is unknown, an option has a wrong type, or a required one is
            missing.
    """
    return _make("AL model", AL_MODELS, TWINS, name, preset, options)


def build_twin(name: str, *, preset: str | None = None, **options: Any) -> list[LayerSpec]:
    """Builds the layer specs of the backprop twin of an AL network, for a plain ``PipelineModule``.

    The last layer returns scores ``(B, V)``; cross-entropy on them is the loss of the ``PipelineModule``.

    Args:
        name: a key of :data:`TWINS`.
        preset: as for :func:`build_al`.
        options: options of the AL network; those of AL alone (bridges and codes) are ignored here.
    Raises:
        ALConfigError: as :func:`build_al`.
    """
    return _make("backprop twin", TWINS, AL_MODELS, name, preset, options)


def _make(
    kind: str,
    makers: dict[str, Callable[..., list[Spec]]],
    others: dict[str, Callable[..., list[Any]]],
    name: str,
    preset: str | None,
    options: dict[str, Any],
) -> list[Spec]:
    if name not in makers:
        raise ALConfigError(f"got {kind} {name!r}: expected one of {sorted(makers)}")
    parameters = inspect.signature(makers[name]).parameters
    known = parameters.keys() | (inspect.signature(others[name]).parameters.keys() if name in others else set())
    if unknown := sorted(options.keys() - known):
        raise ALConfigError(f"got option {unknown[0]!r} for {kind} {name!r}: expected one of {sorted(known)}")
    if preset is not None:
        options = {**preset_options(name, preset), **options}
    _check_types(kind, name, makers[name], options)
    required = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    if missing := sorted(required - options.keys()):
        raise ALConfigError(f"{kind} {name!r} needs {', '.join(missing)}: pass them to the builder")
    return makers[name](**{key: value for key, value in options.items() if key in parameters})


def _check_types(kind: str, name: str, maker: Callable[..., Any], options: dict[str, Any]) -> None:
    """Checks options by the types of the builder's arguments, as strictly as the rest of a config."""
    for key, hint in typing.get_type_hints(maker).items():
        if key not in options:
            continue
        try:
            TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(options[key])
        except ValidationError as error:
            found = error.errors()[0]
            raise ALConfigError(
                f"got option {key}={options[key]!r} for {kind} {name!r}: {found['input']!r}: {found['msg']}"
            ) from None


__all__ = [
    "AL_MODELS",
    "PRESETS",
    "TWINS",
    "build_al",
    "build_twin",
    "lstm_al",
    "lstm_twin",
    "mlp_al",
    "mlp_twin",
    "resnet_al",
    "resnet_twin",
    "transformer_al",
    "transformer_twin",
    "vgg_al",
    "vgg_twin",
]
