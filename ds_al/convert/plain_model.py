"""Checks that a model is what its class and config say, so that its blocks alone compute its scores, and an export of
its weights is the same model again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ds_al.convert import adapters
from ds_al.errors import ALConfigError


def check_plain(model: Any, *, scores: str, classifies: bool) -> None:
    """Checks a model of a supported type.

    Args:
        scores: path of the linear layer that computes the scores.
        classifies: whether the task is classification.

    Raises:
        ALConfigError: the model solves another problem than the task; its class is not one of ``transformers``; its
            weights are quantized or not loaded; modules, shapes or functions differ from those of a new model of its
            config; or it has adapters that cannot be exported.
    """
    if classifies:
        _check_problem(model.config)
    kind = type(model)
    if not kind.__module__.startswith("transformers."):
        raise ALConfigError(
            f"got a {kind.__name__} of {kind.__module__}: expected a class of transformers, since only its blocks are "
            "called, and not a forward of your own. Write the model as a list of layers, for ds_al.from_layers"
        )
    _check_loaded(model)
    adapters.check(model, scores=scores)
    _check_modules(model)


def _check_problem(config: Any) -> None:
    problem = getattr(config, "problem_type", None)
    if problem not in (None, "single_label_classification"):
        raise ALConfigError(
            f"got a model of problem_type={problem!r}: expected 'single_label_classification' or None. Regression and "
            "several labels per sample are not supported"
        )
    if config.num_labels == 1:
        raise ALConfigError(
            "got a model of num_labels=1, which transformers trains by regression: expected 2 or more classes; give 2 "
            "for a yes or no"
        )


def _check_loaded(model: nn.Module) -> None:
    owners = ((model, "hf_quantizer"), (model.config, "quantization_config"))
    if any(getattr(owner, name, None) is not None for owner, name in owners):
        raise ALConfigError("got a model of quantized weights: expected float32, bfloat16 or float16, which can train")
    if unloaded := [name for name, weight in model.named_parameters() if weight.is_meta]:
        raise ALConfigError(
            f"got a model whose {unloaded[0]} is on the meta device: expected weights in memory; load it without "
            "device_map"
        )
    for path, module in model.named_modules():
        if "forward" in vars(module):
            raise ALConfigError(
                f"got a model whose {path or type(model).__name__} has a forward of its own, as hooks of accelerate "
                "set it: expected that of its class; load the model without device_map"
            )


def _check_modules(model: Any) -> None:
    """Compares the model with a new one of its config, on the meta device."""
    with torch.random.fork_rng(), torch.device("meta"):
        new = type(model)(copy.deepcopy(model.config))
    name = type(model).__name__
    here, there = dict(_modules(model)), dict(_modules(new))
    for path in sorted(here.keys() | there.keys()):
        own, expected = here.get(path), there.get(path)
        if type(own) is not type(expected):
            raise ALConfigError(
                f"got a {name} whose {path} is {_kind(own)}: expected {_kind(expected)}, as its config says, since an "
                "exported model could not hold it. Merge low-rank layers into their weights, or give them as LoRA of "
                "peft; or write the model as a list of layers, for ds_al.from_layers"
            )
        shapes = _shapes(own)
        for key, expected_shape in _shapes(expected).items():
            if shapes.get(key) != expected_shape:
                raise ALConfigError(
                    f"got a {name} whose {path}.{key} has the shape {shapes.get(key)}: expected {expected_shape}, as "
                    "its config says. Resize a vocabulary by model.resize_token_embeddings, and give num_labels where "
                    "the model is loaded"
                )


def _modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields paths and modules, the adapted layer in place of its adapter."""
    module = adapters.base(module)
    yield path, module
    for name, child in module.named_children():
        yield from _modules(child, f"{path}.{name}".removeprefix("."))


def _shapes(module: nn.Module | None) -> dict[str, tuple[int, ...] | None]:
    """Returns the shapes of a module's own tensors."""
    if module is None:
        return {}
    tensors = {**module._parameters, **module._buffers}
    return {key: None if tensor is None else tuple(tensor.shape) for key, tensor in tensors.items()}


def _kind(module: nn.Module | None) -> str:
    return "missing" if module is None else f"a {type(module).__name__}"
