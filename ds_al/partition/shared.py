"""Refuses weights and buffers that two AL layers share: on two stages each would have a copy of its own.

Every rank sees the specifications of all layers, so all ranks raise alike, on any number of stages. A module that is
given is looked at; what a ``LayerSpec``, a ``partial`` or a function refers to is built to be looked at, but only where
two layers refer to one module, since they may as well copy it.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ds_al.errors import ALConfigError
from ds_al.layer import ALLayer
from ds_al.partition.part import run_of
from ds_al.spec import ALLayerSpec, _build
from ds_al.system.generators import Generators

_DEPTH = 6  # of containers, functions and objects inside each other


class _Use(NamedTuple):
    """A tensor of an AL layer."""

    layer: int
    name: str
    changes: bool
    """Whether training changes it: a weight that is trained, or a buffer that is part of the state."""


def refuse_shared(layers: Iterable[tuple[int, ALLayerSpec | ALLayer]]) -> None:
    """Checks that no two AL layers share a tensor that training changes.

    Args:
        layers: ``(index in the network, layer or its specification)``.

    Raises:
        ALConfigError: two layers share a weight or a buffer; the error names both places.
    """
    owners: dict[int, _Use] = {}
    built = []  # kept, or the next one could get the memory of one that is gone
    referred: dict[int, set[int]] = {}
    parts = [(index, key, part) for index, layer in layers for key, part in _parts(layer)]
    for index, _, part in parts:
        for key in {_address(tensor) for module in _referred(part) for _, tensor, _ in _tensors(module)}:
            referred.setdefault(key, set()).add(index)
    suspicious = {key for key, users in referred.items() if len(users) > 1}
    for index, name, part in parts:
        module = part
        if not isinstance(part, nn.Module):
            touched = {_address(tensor) for each in _referred(part) for _, tensor, _ in _tensors(each)}
            if not touched & suspicious:
                continue
            with Generators().aside():
                built.append(module := _build(part))
        for path, tensor, changes in _tensors(module):
            use = _Use(index, f"{name}.{path}", changes)
            former = owners.setdefault(_address(tensor), use)
            if former.layer != index and (former.changes or changes):
                raise ALConfigError(
                    f"AL layers {former.layer} and {index} share a tensor, {former.layer}.{former.name} and "
                    f"{index}.{use.name}: each AL layer learns by itself, and tied weights would have to be averaged "
                    "over stages at every step. Give each a copy (copy.deepcopy), hold both in one AL layer, or "
                    "freeze the weight (requires_grad_(False))"
                )


def refuse_shared_by_runs(index: int, layer: ALLayer, runs: Sequence[range]) -> None:
    """Checks that no two runs of blocks of a layer's f share a tensor that training changes: stages hold a run each,
    the last one with all that comes after f.

    Raises:
        ALConfigError: two runs share a weight or a buffer; the error names both places.
    """
    owners: dict[int, tuple[int, str, bool]] = {}
    rest = [(name, part) for name, part in layer.named_children() if name != "f"]
    for number, run in enumerate(runs):
        held = [("f", run_of(layer.f, run)), *(rest if number == len(runs) - 1 else ())]
        for place, module in (each for name, part in held for each in ((name, part), *_hidden(name, part))):
            for path, tensor, changes in _tensors(module):
                use = (number, f"{place}.{path}", changes)
                former = owners.setdefault(_address(tensor), use)
                if former[0] != number and (former[2] or changes):
                    raise ALConfigError(
                        f"AL layer {index}: {former[1]} and {use[1]} are one tensor, and two stages would each learn a "
                        "copy of it: let no stage begin between them (partition_method='cuts:...'), use fewer stages, "
                        "or give each a copy (copy.deepcopy)"
                    )


def _hidden(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields modules that parts of a module use without listing them, such as another use of a tied module, each with
    the path of the part."""
    for path, part in module.named_modules(prefix=name):
        for value in vars(part).values():
            if isinstance(value, tuple):
                yield from ((path, each) for each in value if isinstance(each, nn.Module))


def _parts(layer: ALLayerSpec | ALLayer) -> Iterator[tuple[str, Any]]:
    """Functions of a layer and what else it was made with, by name."""
    if isinstance(layer, ALLayer):
        yield from layer.named_children()
    else:
        yield from layer.parts.items()
        yield from ((key, value) for key, value in layer.module_kwargs.items() if isinstance(value, nn.Module))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """``(name, tensor, whether training changes it)`` of weights and buffers with values."""
    for name, weight in module.named_parameters():
        if weight.numel():
            yield name, weight, weight.requires_grad
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.numel() and name not in part._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer, True


def _address(tensor: Tensor) -> int:
    has_memory = tensor.layout is torch.strided and not tensor.is_meta
    return (tensor.data_ptr() if has_memory else 0) or id(tensor)


def _referred(value: Any, depth: int = 0) -> Iterator[nn.Module]:
    """Modules that exist and that a part is, holds, or refers to."""
    if isinstance(value, nn.Module):
        yield value
        return
    if isinstance(value, nn.Parameter):
        yield nn.ParameterList([value])
        return
    if depth == _DEPTH or isinstance(value, (type, types.ModuleType, str)):
        return
    inside: Sequence[Any] = ()
    if isinstance(value, (list, tuple, set)):
        inside = list(value)
    elif isinstance(value, Mapping):
        inside = list(value.values())
    elif isinstance(value, LayerSpec):
        inside = [value.module_args, value.module_kwargs]
    elif isinstance(value, functools.partial):
        inside = [value.func, value.args, value.keywords]
    elif isinstance(value, types.MethodType):
        inside = [value.__self__, value.__func__]
    elif isinstance(value, types.FunctionType):
        variables = inspect.getclosurevars(value)
        inside = [value.__defaults__, value.__kwdefaults__, *variables.nonlocals.values(), *variables.globals.values()]
    elif callable(value):
        inside = list(getattr(value, "__dict__", {}).values())
    for each in inside:
        yield from _referred(each, depth + 1)
