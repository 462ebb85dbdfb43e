"""The ``transformers`` model that a network was built from, and the mapping of weight names for export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deepspeed.pipe import LayerSpec
from torch import nn

from ds_al.convert.head import CodeHead
from ds_al.errors import ALConfigError
from ds_al.spec import ALLayerSpec


@dataclass(frozen=True)
class Source:
    """The ``transformers`` model that a network was built from.

    Attributes:
        model_class: class of the model.
        config: config of the model, with all weights untied.
        generation: its generation config, or ``None``.
        names: for each AL layer, maps the layer's names of tensors to those in the model.
        classifier: path in the model of the linear layer that computes the scores.
        task: task of the network.
        description: JSON description that rebuilds the AL layers, see :mod:`ds_al.convert.description`.
    """

    model_class: type
    config: Any
    generation: Any
    names: tuple[dict[str, str], ...]
    classifier: str
    task: str
    description: dict[str, Any]


def names_of(
    layers: Sequence[ALLayerSpec], model: nn.Module, scores: nn.Linear, classifier: str
) -> tuple[dict[str, str], ...]:
    """Returns :attr:`Source.names`.

    Args:
        layers: specs of the AL layers.
        model: the model that owns their tensors.
        scores: the linear layer that computes the scores; a copy of the model's own if that was tied.
        classifier: its path in the model.

    Raises:
        ALConfigError: a tensor of the model is in no layer.
    """
    known = {id(tensor): name for name, tensor in reversed(list(model.state_dict(keep_vars=True).items()))}
    own = {f"{classifier}.{name}": tensor for name, tensor in scores.state_dict(keep_vars=True).items()}
    known |= {id(tensor): name for name, tensor in own.items()}
    names = tuple(
        {
            f"{prefix}{name}": known[id(tensor)]
            for prefix, part in modules_of(spec)
            for name, tensor in part.state_dict(keep_vars=True).items()
            if id(tensor) in known  # true for all but user-defined bridges
        }
        for spec in layers
    )
    held = {name for each in names for name in each.values()} | own.keys()
    if missing := sorted(set(model.state_dict()) - held):
        raise ALConfigError(f"this {type(model).__name__} has weights that no AL layer takes, {missing[0]} among them")
    return names


def modules_of(spec: ALLayerSpec) -> Iterator[tuple[str, nn.Module]]:
    """Yields the parts of an AL layer that are the model's own, with their prefixes in the layer."""
    for key, part in spec.parts.items():
        if isinstance(part, nn.Module):
            yield f"{key}.", part
        elif isinstance(part, LayerSpec) and issubclass(part.typename, CodeHead):
            yield f"{key}.body.", part.module_args[0]
