"""Optimizers that can step a stage: those that need a gradient alone, on the weights that the stage trains."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ds_al.config.optimizers import at, check_options
from ds_al.errors import ALConfigError
from ds_al.optim.groups import NO_OPTIONS, ParamGroups

_OF_SCHEDULES = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
"""Options that torch's schedules add to groups."""
_OF_OTHERS = {"weight_decay", "betas", "momentum", "eps", "nesterov", "amsgrad"}
"""Options that an optimizer without them would ignore, rather than a schedule or the user's own code read."""


def accepted(optimizer: Any, *, asked: ParamGroups | None = None) -> torch.optim.Optimizer:
    """Returns an optimizer that a user's callable or a config has made, or the user's own instance, after checks.

    Args:
        asked: parameter groups that it was made from; ``None`` for an instance.

    Raises:
        ALConfigError: it is no torch optimizer, it steps other weights, it needs more than a gradient, or an option of
            a group is not valid.
    """
    kind = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ALConfigError(
            f"the optimizer callable returned a {kind}: expected a torch.optim.Optimizer of the groups that it got"
        )
    if asked is not None and _weights(optimizer.param_groups) != _weights(asked):
        raise ALConfigError(
            f"the optimizer callable returned {kind} for other weights than those of the groups that it got: it is "
            "called once for f and b and once for g and h. Pass its argument on, such as "
            "lambda groups: torch.optim.SGD(groups, lr=0.1)"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ALConfigError("got the optimizer SparseAdam, which takes sparse gradients alone: use another")
    if isinstance(optimizer, torch.optim.LBFGS) or _needs_closure(optimizer):
        raise ALConfigError(
            f"got the optimizer {kind}, whose step evaluates the loss anew, while a stage steps once per gradient: "
            "use another"
        )
    for number, group in enumerate(optimizer.param_groups):
        _check_group(group, optimizer.defaults, where=f"{kind}, group {group.get('name', number)}, {{}}")
    return optimizer


def required(optimizer: Any) -> Any:
    """Returns the optimizer of an engine that is to train.

    Raises:
        ALConfigError: there is none.
    """
    if optimizer is None:
        raise ALConfigError(
            'there is no optimizer: give "optimizer" in the config, or initialize(optimizer=...); without one an '
            "engine only evaluates and predicts"
        )
    return optimizer


def _weights(groups: ParamGroups) -> set[int]:
    return {id(parameter) for group in groups for parameter in group["params"]}


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    try:
        inspect.signature(type(optimizer).step).bind(optimizer)
    except TypeError:
        return True
    return False


def _check_group(group: Mapping[str, Any], defaults: Mapping[str, Any], *, where: str) -> None:
    options = {key: value for key, value in group.items() if key not in NO_OPTIONS}
    check_options(options, where=where)
    if options.get("differentiable"):
        raise ALConfigError(f"{at(where, 'differentiable')}: got True, which steps out of place: remove it")
    if options.get("capturable") and any(parameter.device.type == "cpu" for parameter in group["params"]):
        raise ALConfigError(f"{at(where, 'capturable')}: got True for weights on the CPU: it is for CUDA graphs")
    for key in sorted(options.keys() - defaults.keys() - _OF_SCHEDULES):  # torch takes any key
        if key in _OF_OTHERS:
            raise ALConfigError(f"{at(where, key)} is no option of this optimizer, which has {', '.join(defaults)}")
        if near := difflib.get_close_matches(key, defaults, n=1, cutoff=0.8):
            raise ALConfigError(f"{at(where, key)} is no option of this optimizer: did you mean {near[0]!r}?")
