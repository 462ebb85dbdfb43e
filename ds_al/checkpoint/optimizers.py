"""Optimizer and LR schedule state by AL layer and parameter name, so that it can be loaded on any number of stages.

A torch optimizer numbers parameters and groups within a stage; here both are identified by layer and name. For each
layer and role (``associated``, ``autoencoder``; ``optimizer`` for a user's own instance)::

    {"class": "AdamW",
     "groups": [{"options": {"lr": 0.1, ...}, "parameters": ["f.0.weight", ...], "schedule": {"base_lrs": 0.1}}],
     "state": {"f.0.weight": {"step": {"$tensor": "f.0.weight/step"}, ...}}}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ds_al.checkpoint.folder import Record
from ds_al.checkpoint.state import StageState
from ds_al.errors import ALCheckpointError
from ds_al.optim.masters import stepped
from ds_al.system.plain import Tensors, pack, unpack

Name = tuple[int, str]
"""Index of the layer, and name of the parameter within it."""

Place = tuple[int, str]
"""Index of the layer, and one of its files: a role, or :data:`TRAINING`."""
TRAINING = "training"

_BY_GROUP = {"base_lrs", "_last_lr", "min_lrs", "max_lrs", "base_momentums", "max_momentums", "lr_lambdas"}
"""Attributes of torch's LR schedules that are lists with one entry per parameter group."""
_GROUP = "$group"


def parts(state: StageState) -> dict[str, torch.optim.Optimizer]:
    """Returns the optimizer instances of a stage by role."""
    roles = {} if state.optimizer is None else state.optimizer.parts
    return {role: part for role, part in roles.items() if part is not None}


def names(state: StageState) -> dict[Tensor, Name]:
    """Maps each optimized tensor (parameter or fp32 master) to (layer index, name)."""
    return {
        stepped(parameter): (index, name)
        for index, layer in state.layers
        for name, parameter in layer.named_parameters()
    }


# ---- collecting the state --------------------------------------------------------------------------


def collect(
    state: StageState, states: Mapping[Tensor, Mapping[str, Any]] | None = None
) -> dict[int, dict[str, tuple[Record, Tensors]]]:
    """Collects the state of the optimizers by layer and role: a record for the index, and its tensors.

    Args:
        states: state by optimized tensor, see ``LocalOptimizer.gather``; by default that of the instances.

    Raises:
        ALCheckpointError: a parameter belongs to no layer, or a state cannot be saved.
    """
    called = names(state)
    schedule = _group_values(state)
    collected: dict[int, dict[str, tuple[Record, Tensors]]] = {index: {} for index, _ in state.layers}
    for role, part in parts(state).items():
        for group in part.param_groups:
            for index, members in _by_layer(group["params"], called).items():
                fresh: tuple[Record, Tensors] = ({"class": type(part).__name__, "groups": [], "state": {}}, {})
                record, tensors = collected[index].setdefault(role, fresh)
                number = len(record["groups"])
                options = {key: value for key, value in group.items() if key not in ("params", "name", "param_names")}
                record["groups"].append(
                    {
                        "options": pack(options, tensors, at=f"group {number}"),
                        "parameters": list(members),
                        "schedule": pack(schedule[id(group)], tensors, at=f"schedule {number}"),
                    }
                )
                for name, parameter in members.items():
                    values = (part.state if states is None else states).get(parameter, {})
                    record["state"][name] = pack(dict(values), tensors, at=name)
    return collected


def _by_layer(parameters: list[nn.Parameter], called: Mapping[Tensor, Name]) -> dict[int, dict[str, nn.Parameter]]:
    layers: dict[int, dict[str, nn.Parameter]] = {}
    for parameter in parameters:
        if parameter not in called:
            raise ALCheckpointError(
                f"the optimizer trains a parameter of shape {list(parameter.shape)} that is in no AL layer of its "
                "stage, so no checkpoint could place it: move it into the f, b, g or h that uses it"
            )
        index, name = called[parameter]
        layers.setdefault(index, {})[name] = parameter
    return layers


def _group_values(state: StageState) -> dict[int, dict[str, Any]]:
    """Returns the LR schedule's entries for each parameter group, by ``id`` of the group."""
    groups = state.optimizer.param_groups if state.optimizer is not None else []
    values: dict[int, dict[str, Any]] = {id(group): {} for group in groups}
    if state.lr_scheduler is not None:
        for path, entries in _group_lists(state.lr_scheduler.state_dict(), len(groups)):
            for group, entry in zip(groups, entries, strict=True):
                values[id(group)][path] = entry
    return values


def _group_lists(value: Any, groups: int, path: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Yields the per-group lists in a schedule's state; those of ``SequentialLR``'s schedules are nested."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if key in _BY_GROUP and isinstance(item, list) and len(item) == groups:
            yield f"{path}/{key}", item
        else:
            yield from _group_lists(item, groups, f"{path}/{key}")


def collect_schedule(state: StageState, tensors: Tensors) -> Record | None:
    """Returns the state of the LR schedule without its per-group entries, as JSON; ``None`` without a schedule."""
    scheduler = state.lr_scheduler
    if scheduler is None:
        return None
    groups = len(state.optimizer.param_groups) if state.optimizer is not None else 0
    values = pack(_without_lists(scheduler.state_dict(), groups), tensors, at="schedule")
    return {"class": type(scheduler).__name__, "state": values}


def _without_lists(value: Any, groups: int) -> Any:
    if isinstance(value, list):
        return [_without_lists(item, groups) for item in value]
    if type(value) is not dict:
        return value
    return {
        key: _GROUP
        if key in _BY_GROUP and isinstance(item, list) and len(item) == groups
        else _without_lists(item, groups)
        for key, item in value.items()
    }


# ---- restoring it ----------------------------------------------------------------------------------


def check(state: StageState, layers: Mapping[int, Record]) -> None:
    """Compares the optimizers of a checkpoint with those of this stage.

    Args:
        layers: records of this stage's layers, from the index.

    Raises:
        ALCheckpointError: the optimizers differ in class, in the parameters they step, or in options within a group.
    """
    mine = parts(state)
    called = names(state)
    there = {role: record["class"] for layer in layers.values() for role, record in layer["optimizers"].items()}
    here = {role: type(part).__name__ for role, part in mine.items()}
    if there != here:
        raise ALCheckpointError(
            f"the checkpoint has the state of {_kinds(there)}, this job trains with {_kinds(here)}: use the same, or "
            "start a new one by load_optimizer_states=False"
        )
    for role, part in mine.items():
        trained = {called[parameter] for group in part.param_groups for parameter in group["params"]}
        saved = {
            (index, name) for index, layer in layers.items() for name in layer["optimizers"].get(role, _NONE)["state"]
        }
        for index, name in sorted(trained ^ saved):
            raise ALCheckpointError(
                f"AL layer {index}, {name}: the optimizer {role!r} "
                + ("trains it here, not in the checkpoint" if (index, name) in trained else "trained it, not here")
                + ": freeze the same parameters, or start a new optimizer by load_optimizer_states=False"
            )
        for group in part.param_groups:
            _saved_group(group, role, called, layers)


_NONE: Record = {"groups": [], "state": {}}


def _kinds(classes: Mapping[str, str]) -> str:
    return " and ".join(classes[role] for role in sorted(classes)) or "no optimizer"


def _saved_group(
    group: Mapping[str, Any], role: str, called: Mapping[Tensor, Name], layers: Mapping[int, Record]
) -> tuple[int, Record]:
    """Returns layer and record of a group, whose parameters may be saved in several groups with equal options."""
    found: list[tuple[int, str, Record]] = []
    for parameter in group["params"]:
        index, name = called[parameter]
        groups = layers[index]["optimizers"].get(role, _NONE)["groups"]
        saved = next((saved for saved in groups if name in saved["parameters"]), None)
        if saved is None:
            raise ALCheckpointError(
                f"AL layer {index}, {name}: the checkpoint has no optimizer {role!r} that trains it. Freeze the same "
                "parameters, or start anew by load_optimizer_states=False and load_lr_scheduler_states=False"
            )
        found.append((index, name, saved))
    first, first_name, record = found[0]
    for index, name, saved in found:
        if any(saved[key] != record[key] for key in ("options", "schedule")):
            raise ALCheckpointError(
                f"AL layers {first} and {index}: {first_name} and {name} are in one parameter group here, and have "
                "different options in the checkpoint: give them groups of their own"
            )
    return first, record


def states_of(
    state: StageState, layers: Mapping[int, Record], tensors: Mapping[Place, Tensors]
) -> dict[str, dict[str, Any]]:
    """Returns the ``state_dict`` of each of this stage's optimizers from a checkpoint that :func:`check` has accepted.

    Args:
        layers: records of this stage's layers, from the index.
        tensors: tensors of each layer and role.
    """
    called = names(state)
    elsewhere: frozenset[Tensor] = frozenset() if state.optimizer is None else state.optimizer.elsewhere
    return {role: _state_dict(part, role, called, layers, tensors, elsewhere) for role, part in parts(state).items()}


def restore(state: StageState, states: Mapping[str, dict[str, Any]]) -> None:
    """Restores this stage's optimizers from :func:`states_of`."""
    if state.optimizer is not None:
        state.optimizer.load_state_dict({role: states.get(role) for role in state.optimizer.parts})


def _state_dict(
    part: torch.optim.Optimizer,
    role: str,
    called: Mapping[Tensor, Name],
    layers: Mapping[int, Record],
    tensors: Mapping[Place, Tensors],
    elsewhere: frozenset[Tensor],
) -> dict[str, Any]:
    """Builds the optimizer's ``state_dict`` for this stage, without the state held by other replicas."""
    groups: list[Record] = []
    state: dict[int, Record] = {}
    for group in part.param_groups:
        numbers = range(len(state), len(state) + len(group["params"]))
        first, saved = _saved_group(group, role, called, layers)
        options = unpack(saved["options"], tensors[first, role])
        groups.append({**{k: v for k, v in group.items() if k != "params"}, **options, "params": list(numbers)})
        for number, parameter in zip(numbers, group["params"], strict=True):
            index, name = called[parameter]
            saved_state = {} if parameter in elsewhere else layers[index]["optimizers"][role]["state"][name]
            values = unpack(saved_state, tensors[index, role])
            state[number] = {key: _laid_out_as(parameter, value) for key, value in values.items()}
    return {"state": {number: values for number, values in state.items() if values}, "param_groups": groups}


def _laid_out_as(parameter: Tensor, value: Any) -> Any:
    """Gives a state of the parameter's shape the parameter's strides, as when it was created: files store none."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape or parameter.is_contiguous():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def check_schedule(state: StageState, layers: Mapping[int, Record]) -> None:
    """Compares the LR schedule of a checkpoint with this job's.

    Raises:
        ALCheckpointError: the schedule is another one, or its state differs between layers of this stage.
    """
    here = type(state.lr_scheduler).__name__ if state.lr_scheduler is not None else None
    first = next(iter(layers))
    for index, layer in layers.items():
        there = layer["schedule"]["class"] if layer["schedule"] else None
        if there != here:
            raise ALCheckpointError(
                f"the checkpoint has the LR schedule {there}, this job has {here}: use the same, or start a new one by "
                "load_lr_scheduler_states=False"
            )
        if layer["schedule"] != layers[first]["schedule"]:
            raise ALCheckpointError(
                f"AL layers {first} and {index} are on one stage here, and had different LR schedules in the "
                "checkpoint: start a new one by load_lr_scheduler_states=False"
            )
    if here is not None:
        list(_schedules(state, layers))


def schedule_of(
    state: StageState, layers: Mapping[int, Record], tensors: Mapping[Place, Tensors]
) -> dict[str, Any] | None:
    """Returns the ``state_dict`` of the LR schedule from a checkpoint that :func:`check_schedule` has accepted.

    Args:
        layers: records of this stage's layers, from the index.
        tensors: tensors of each layer's optimizer states and training states.
    """
    if state.lr_scheduler is None:
        return None
    groups = [unpack(saved, tensors.get(place, {})) for place, saved in _schedules(state, layers)]
    index, layer = next(iter(layers.items()))
    values = unpack(layer["schedule"]["state"], tensors[index, TRAINING])
    return _with_lists(values, groups)


def _schedules(state: StageState, layers: Mapping[int, Record]) -> Iterator[tuple[Place, Record]]:
    """Yields file and saved schedule entries of each group of this stage; DeepSpeed's schedules have none."""
    saved = [group for layer in layers.values() for part in layer["optimizers"].values() for group in part["groups"]]
    if not any(group["schedule"] for group in saved):
        return
    called = names(state)
    for role, part in parts(state).items():
        for group in part.param_groups:
            index, values = _saved_group(group, role, called, layers)
            yield (index, role), values["schedule"]


def _with_lists(value: Any, groups: list[Record], path: str = "") -> Any:
    if isinstance(value, list):
        return [_with_lists(item, groups, f"{path}/{number}") for number, item in enumerate(value)]
    if type(value) is not dict:
        return value
    return {
        key: [group[f"{path}/{key}"] for group in groups]
        if isinstance(item, str) and item == _GROUP
        else _with_lists(item, groups, f"{path}/{key}")
        for key, item in value.items()
    }
