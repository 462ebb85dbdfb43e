"""LR schedules, by config, callable or instance: which can drive the optimizer of a stage, and errors for the rest.

DeepSpeed makes the schedule of a stage from the config, over all parameter groups of the stage, and the engine steps it
once per counted step, without arguments.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch.optim import lr_scheduler

from ds_al import host
from ds_al.config.optimizers import AUTO
from ds_al.errors import ALConfigError

OF_TORCH: dict[str, type] = {
    name: kind
    for name, kind in vars(lr_scheduler).items()
    if isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler) and not name.endswith("LRScheduler")
}
"""torch's LR schedules by name."""

_METRIC = (
    "whose step takes a metric that the engine does not know: make it of engine.optimizer after initialize, and call "
    'its step(metric) on every rank, such as with engine.evaluate(...)["loss"][-1]'
)
_CALLABLES = "which takes functions or schedules, not numbers: give initialize(lr_scheduler=lambda optimizer: ...)"
_REFUSED = {
    "ReduceLROnPlateau": _METRIC,
    **dict.fromkeys(("LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler"), _CALLABLES),
}
"""Schedules that a config cannot name, and what to do instead."""

_COUNTS = {
    *("step_size", "T_max", "T_0", "T_mult", "step_size_up", "step_size_down", "total_steps", "epochs"),
    *("steps_per_epoch", "total_num_steps", "warmup_num_steps", "cycle_first_step_size", "lr_range_test_step_size"),
}
"""Parameters that are lengths: 1 or more."""


def check(config: Mapping[str, Any], *, by_group: bool = False) -> None:
    """Checks the block ``"scheduler"`` of a config, before an engine is made from it.

    Args:
        by_group: whether a parameter may be a list with a value per parameter group, as with back-propagation.

    Raises:
        ALConfigError: it is no object, the name is unknown or needs more than numbers, or a parameter is unknown,
            missing, of another type or out of range.
    """
    if "scheduler" not in config:
        return
    block = config["scheduler"]
    if not isinstance(block, Mapping):
        raise ALConfigError(
            f'"scheduler": got {block!r}, expected an object such as {{"type": "WarmupLR", "params": {{}}}}: '
            "leave the key out for a constant rate"
        )
    if unknown := sorted(block.keys() - {"type", "params"}):
        raise ALConfigError(f'"scheduler.{unknown[0]}" is not a key of this block: its keys are "type" and "params"')
    name, params = block.get("type"), block.get("params", {})
    known = {**OF_TORCH, **host.SCHEDULES}
    if isinstance(name, str) and name in _REFUSED:
        raise ALConfigError(f'"scheduler.type": got {name!r}, {_REFUSED[name]}')
    if not isinstance(name, str) or name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(sorted(host.SCHEDULES))}, or torch's"
        raise ALConfigError(f'"scheduler.type": got {name!r}, which neither DeepSpeed nor torch has: {hint}')
    if not isinstance(params, Mapping):
        raise ALConfigError(f'"scheduler.params": got {params!r}, expected an object {{...}}')
    _check_params(known[name], params, by_group=by_group)


def _check_params(kind: type, params: Mapping[str, Any], *, by_group: bool) -> None:
    signature = inspect.signature(kind)
    known = [key for key in signature.parameters if key != "optimizer"]
    for key, value in params.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise ALConfigError(f'"scheduler.params.{key}" is no parameter of {kind.__name__}: {hint}')
        if by_group and isinstance(value, list):
            continue
        if expected := _expected(key, value, signature.parameters[key]):
            raise ALConfigError(f'"scheduler.params.{key}": got {value!r}, {expected}')
    try:
        signature.bind(None, **params)
    except TypeError as error:
        raise ALConfigError(f'"scheduler.params" of {kind.__name__}: {error}') from None


def _expected(key: str, value: Any, parameter: inspect.Parameter) -> str | None:
    """Returns what was expected of a parameter, or ``None`` where the value is right."""
    default, kind = parameter.default, str(parameter.annotation)
    if isinstance(value, str):
        if value == "auto":
            return AUTO
        if "Callable" in kind:
            return "expected a function, which no config holds: give initialize(lr_scheduler=lambda optimizer: ...)"
        return None if isinstance(default, str) or "Literal" in kind or "str" in kind else "expected a number"
    if isinstance(value, (list, tuple)):
        if key == "milestones":
            right = all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in value)
            return None if right else "expected numbers of steps"
        return "expected one number: a list has one per parameter group, and a stage's groups are those of its layers"
    if value is None:
        return None
    if isinstance(value, bool) or isinstance(default, bool):
        return None if isinstance(value, bool) and isinstance(default, bool) else "expected " + _kind(default)
    if isinstance(default, str):
        return "expected a name"
    if not isinstance(value, Real) or not math.isfinite(value):
        return "expected a finite number"
    if value < (-1 if key.startswith("last_") else key in _COUNTS):
        return f"expected {int(key in _COUNTS)} or more"
    return None


def _kind(default: Any) -> str:
    return "true or false" if isinstance(default, bool) else "a name" if isinstance(default, str) else "a number"


@contextmanager
def made(config: Any, *, given: Any, instance: Any) -> Iterator[None]:
    """Turns what raises while DeepSpeed makes a schedule into an error that names it.

    Args:
        config: a ``DeepSpeedConfig``.
        given: the user's callable or instance, if any.
        instance: the user's optimizer instance, if any.

    Raises:
        ALConfigError: the schedule cannot be made, or drives another optimizer than the engine's.
    """
    if given is not None and not callable(given):
        of = getattr(given, "optimizer", None)
        if isinstance(of, torch.optim.Optimizer) and of is not instance:
            raise ALConfigError(
                f"got the LR schedule {type(given).__name__} of another optimizer, whose rates nothing would use: give "
                "a callable, lr_scheduler=lambda optimizer: ..., or initialize(optimizer=) the one that it was made of"
            )
    try:
        yield
    except ALConfigError:
        raise
    except Exception as error:
        name = "lr_scheduler" if given is not None else f'"scheduler" ({config.scheduler_name})'
        params = "" if given is not None else f" with {config.scheduler_params!r}"
        hint = ""
        if "momentum" in str(error):
            hint = '. Both optimizers of a stage need the momentum that it cycles, or "cycle_momentum": false'
        raise ALConfigError(f"{name} cannot be made{params}: {type(error).__name__}: {error}{hint}") from error


def check_made(schedule: Any) -> None:
    """Checks that a schedule can be stepped as the engine does, without arguments.

    Raises:
        ALConfigError: it has no such step.
    """
    if schedule is None:
        return
    kind, step = type(schedule).__name__, getattr(schedule, "step", None)
    if not callable(step):
        raise ALConfigError(f"got an LR schedule that is a {kind}: expected one with step(), such as torch's")
    try:
        inspect.signature(step).bind()
    except TypeError:
        raise ALConfigError(f"got the LR schedule {kind}, {_METRIC}") from None


def step(schedule: Any) -> None:
    """Steps a schedule.

    Raises:
        ALConfigError: it raised, such as one that has come to its end.
    """
    try:
        schedule.step()
    except Exception as error:
        raise ALConfigError(
            f"the LR schedule {type(schedule).__name__} cannot be stepped: {type(error).__name__}: {error}. It counts "
            'one step per batch, or per optimizer step with "associated_learning": {"count": "step"}'
        ) from error
