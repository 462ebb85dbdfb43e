"""Layers that change their stage while a network is trained: the state that leaves one stage and arrives on another.

::

    stage p                                                stage q
    move()      weights, buffers, masters, optimizer       builds the layer from its specification
                state, losses, loss scale, LR schedule
                ------------- one message per tensor --->  puts weights and buffers into it
                                                           (the engine makes the stage's optimizer anew)
    restore()                                              all else

It is the state that a checkpoint saves of a layer, and the same functions collect and restore it; here it stays in
memory. Unlike a checkpoint, weights travel as they are, with their dtype and their strides, and so do buffers that are
not saved. What is neither, such as a counter that a module keeps in an attribute, does not move: the new stage has the
module that the specification builds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from ds_al.checkpoint import optimizers, snapshot
from ds_al.checkpoint.folder import Record
from ds_al.checkpoint.saving import restore_losses
from ds_al.checkpoint.snapshot import DECODER
from ds_al.checkpoint.state import StageState
from ds_al.errors import ALCheckpointError, ALConfigError
from ds_al.layer import ALLayer
from ds_al.optim.masters import give_up, master_here
from ds_al.parallel.agreement import agreed
from ds_al.parallel.topology import StageTopology
from ds_al.system.plain import Tensors, check_dense

_WEIGHTS, _MASTERS = "weights", "masters"


@dataclass
class LayerState:
    """State of one layer between two batches."""

    record: Record
    """What is no tensor: optimizer groups and state, loss scale, LR schedule, and the form of the layer."""
    tensors: dict[str, Tensors]
    """Tensors by kind: weights and buffers, masters, the files of a checkpoint."""


class _Kind(NamedTuple):
    """Form of a tensor that travels."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...] | None
    """Of a tensor that fills its memory in another order than its dimensions; otherwise ``None``."""
    on_host: bool


@dataclass
class Moved:
    """What a stage restores once it has its layers."""

    layers: dict[int, LayerState]
    """State of each of its layers."""
    arrived: list[int]
    """Indices of those that come from another stage."""
    decoders: dict[int, Tensors]
    """Copies of the decoders of earlier layers, where the objective needs them."""


def move(state: StageState, bounds: Sequence[int]) -> Moved:
    """Changes the partition of the module. Every rank must call it, after the same batch, with the same bounds.

    The optimizer of the stage, and all that refers to its layers, must be made anew afterwards; then :func:`restore`.

    Args:
        bounds: of the stages, ``[0, ..., N]``.

    Raises:
        ALConfigError: on all ranks, and nothing has changed: a layer cannot change its stage.
    """
    module, topology, copies = state.module, state.topology, state.decoder_copies
    own = agreed("repartition", lambda: _leaving(state), facts=_schedule, bounded=False)
    ways = _routes(module.bounds, bounds, copies=copies is not None)
    announcement = _announced(own, ways, topology)

    def built() -> dict[int, ALLayer]:
        layers = {way.layer: module.build_layer(way.layer, state.device) for way in ways if _arrives(way, topology)}
        for index, layer in layers.items():
            _check_form(index, layer, announcement[index][0]["form"])
        return layers

    layers = agreed("repartition", built, bounded=False)
    arrived, decoders = _exchange(own, ways, announcement, topology=topology, device=state.device)
    former, before = dict(state.layers), range(len(copies or ()))
    decoders = {index: copies.state(index) for index in before if copies is not None} | decoders
    module.hold(bounds, layers)
    _give_up(former, dict(state.layers))
    for index, layer in layers.items():
        _put(layer, arrived[index])
    held = {index: (own | arrived)[index] for index, _ in state.layers}
    for index, layer in state.layers:
        _let_train(layer, held[index])
    return Moved(held, list(layers), decoders)


def _give_up(former: Mapping[int, ALLayer], present: Mapping[int, ALLayer]) -> None:
    """Frees masters, and device memory, of layers that went elsewhere: a list of modules may hold them all the same.

    A frozen weight that a layer which stays shares with one of them stays on the device.
    """
    staying = {tensor for layer in present.values() for _, tensor in _tensors(layer)}
    for index, layer in former.items():
        if index not in present:
            give_up(layer)
            if not any(tensor in staying for _, tensor in _tensors(layer)):
                layer.cpu()


def _schedule(states: Mapping[int, LayerState]) -> dict[str, Any]:
    """What layers that come together on a stage must have in common."""
    return {"the LR schedule": next(iter(states.values())).record["schedule"]}


def _leaving(state: StageState) -> dict[int, LayerState]:
    """Returns :func:`_taken`; what no file could hold, no message does either."""
    try:
        return _taken(state)
    except ALCheckpointError as error:
        raise ALConfigError(f"layers cannot change their stage: {error}") from error


def _taken(state: StageState) -> dict[int, LayerState]:
    """Returns the state of each layer of a stage, after a batch. With ZeRO all replicas of the stage call it."""
    gathered = (None, None) if state.optimizer is None else state.optimizer.gather()
    steps = optimizers.collect(state, gathered[0])
    masters: Mapping[Any, Tensor] = gathered[1] or {}
    history, found = snapshot.kept_losses(state), {}
    for row, (index, layer) in enumerate(state.layers):
        record, training = snapshot.training_state(state, index, history[:, row])
        weights = dict(layer.named_parameters(remove_duplicate=False))
        record |= {
            "form": _form(layer),
            "training": {name: module.training for name, module in layer.named_modules()},
            "requires_grad": {name: weight.requires_grad for name, weight in weights.items()},
            "extra": {n: value for n, value in layer.state_dict().items() if not isinstance(value, Tensor)},
            "optimizers": {role: saved for role, (saved, _) in steps[index].items()},
        }
        tensors: dict[str, Tensors] = {
            _WEIGHTS: {name: value.detach() for name, value in _tensors(layer)},
            _MASTERS: {name: masters[weight] for name, weight in weights.items() if weight in masters},
            optimizers.TRAINING: training,
            **{role: values for role, (_, values) in steps[index].items()},
        }
        for name, value in tensors[_WEIGHTS].items():
            check_dense(value, at=f"AL layer {index}, {name}")
        found[index] = LayerState(record, tensors)
    return found


def _tensors(layer: ALLayer) -> Iterator[tuple[str, Tensor]]:
    """Weights and buffers by name, each once, buffers that are not saved included."""
    yield from layer.named_parameters()
    yield from layer.named_buffers()


def _form(layer: ALLayer) -> dict[str, str]:
    """What a layer must have in common with the one that takes over its state: modules, hooks, tensors."""
    form = {f"module {name}": type(module).__name__ for name, module in layer.named_modules()}
    form |= {f"hooks of {n}": _hooks(m) for n, m in layer.named_modules() if _hooks(m)}
    return form | {f"tensor {name}": str(list(value.shape)) for name, value in _tensors(layer)}


def _hooks(module: nn.Module) -> str:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return ", ".join(f"{len(hooks)} {kind[1:]}" for kind in kinds if (hooks := getattr(module, kind)))


def _check_form(index: int, layer: ALLayer, form: Mapping[str, str]) -> None:
    """Compares a layer that is built to take over a state with the one that the state is of.

    Raises:
        ALConfigError: they differ: the layer was changed since it was built.
    """
    own = _form(layer)
    for name in sorted(own.keys() | form.keys()):
        if own.get(name) != form.get(name):
            raise ALConfigError(
                f"AL layer {index} cannot change its stage: {name} is {form.get(name, 'missing')} where it is trained, "
                f"{own.get(name, 'missing')} in the layer that its specification builds: make modules and hooks where "
                "the specification makes the layer"
            )


# ---- the journey -------------------------------------------------------------------------------------


class _Route(NamedTuple):
    """A layer that a stage sends to another one: all of its state, or only the copy of its decoder."""

    layer: int
    source: int
    target: int
    whole: bool


def _routes(old: Sequence[int], new: Sequence[int], *, copies: bool) -> list[_Route]:
    """Returns what stages send to each other, in the order in which all of them send and receive.

    Args:
        old, new: bounds of the stages, ``[0, ..., N]``.
        copies: whether each stage holds copies of the decoders of all layers up to its last one.
    """
    here, there = _owners(old), _owners(new)
    moves = [_Route(layer, here[layer], there[layer], True) for layer in range(old[-1]) if here[layer] != there[layer]]
    if copies:
        for stage, (former, present) in enumerate(zip(old[1:], new[1:], strict=True)):
            moves += [_Route(i, here[i], stage, False) for i in range(former, present) if there[i] != stage]
    return moves


def _owners(bounds: Sequence[int]) -> list[int]:
    return [stage for stage, (start, stop) in enumerate(pairwise(bounds)) for _ in range(start, stop)]


def _arrives(way: _Route, topology: StageTopology) -> bool:
    return way.whole and way.target == topology.stage


def _announced(states: Mapping[int, LayerState], moves: Sequence[_Route], topology: StageTopology) -> dict[int, Any]:
    """Returns records, and kinds of tensors, of all layers on their way. Every rank of the pipeline must call it."""
    own = {
        route.layer: (
            states[route.layer].record,
            {kind: _kinds(tensors) for kind, tensors in states[route.layer].tensors.items()},
        )
        for route in moves
        if route.source == topology.stage
    }
    return {layer: entry for entries in topology.gather(own) for layer, entry in entries.items()}


@torch.no_grad()
def _exchange(
    states: Mapping[int, LayerState],
    moves: Sequence[_Route],
    announcement: Mapping[int, Any],
    *,
    topology: StageTopology,
    device: torch.device,
) -> tuple[dict[int, LayerState], dict[int, Tensors]]:
    """Sends and receives all tensors. Every rank of the pipeline must call it.

    All ranks go through the same list, so a rank waits only for one that is at an earlier entry.

    Returns:
        The states that arrived here, and the copies of decoders of layers that went elsewhere.
    """
    arrived: dict[int, LayerState] = {}
    decoders: dict[int, Tensors] = {}
    for layer, source, target, whole in moves:
        record, kinds = announcement[layer]
        tensors = {
            kind: {name: each for name, each in named.items() if whole or name.startswith(DECODER)}
            for kind, named in kinds.items()
            if whole or kind == optimizers.TRAINING
        }
        if topology.stage == source:
            for kind, named in tensors.items():
                for name in named:
                    _send(states[layer].tensors[kind][name], topology.pipeline[target], topology, device)
        elif topology.stage == target:
            received = {
                kind: {
                    name: _receive(each, topology.pipeline[source], topology, device) for name, each in named.items()
                }
                for kind, named in tensors.items()
            }
            if whole:
                arrived[layer] = LayerState(record, received)
            else:
                decoders[layer] = _copy_of_decoder(received[optimizers.TRAINING])
    return arrived, decoders


def _copy_of_decoder(training: Mapping[str, Tensor]) -> Tensors:
    """Returns the weights of the copy of a layer's decoder, if the objective needs one, by name."""
    return {name.removeprefix(DECODER): value for name, value in training.items() if name.startswith(DECODER)}


def _kinds(tensors: Tensors) -> dict[str, _Kind]:
    return {
        name: _Kind(
            tuple(value.shape),
            value.dtype,
            None if value.is_contiguous() or not _fills_its_memory(value) else value.stride(),
            value.device.type == "cpu",
        )
        for name, value in tensors.items()
    }


def _fills_its_memory(value: Tensor) -> bool:
    return torch.ops.aten.is_non_overlapping_and_dense(value)


def _send(value: Tensor, rank: int, topology: StageTopology, device: torch.device) -> None:
    if value.numel():
        flat = value.detach().contiguous().reshape(-1).to(device)
        dist.send(flat.view(torch.uint8), rank, group=topology.pipeline_group)


def _receive(kind: _Kind, rank: int, topology: StageTopology, device: torch.device) -> Tensor:
    value = torch.empty(kind.shape, dtype=kind.dtype, device=device)
    if value.numel():
        dist.recv(value.reshape(-1).view(torch.uint8), rank, group=topology.pipeline_group)
    if kind.strides is not None:
        value = torch.empty_strided(kind.shape, kind.strides, dtype=kind.dtype, device=device).copy_(value)
    return value.cpu() if kind.on_host else value


# ---- arrival -----------------------------------------------------------------------------------------


@torch.no_grad()
def _put(layer: ALLayer, state: LayerState) -> None:
    """Gives a layer the weights, buffers and modes that have arrived."""
    weights = state.tensors[_WEIGHTS]
    for prefix, module in layer.named_modules():
        module.training = state.record["training"][prefix]
        for name in [name for name, value in module._parameters.items() if value is not None]:
            value = weights.get(f"{prefix}.{name}".lstrip("."))
            if value is not None:  # a tied weight has one of its names
                module._parameters[name].data = value  # type: ignore[union-attr]
        for name in [name for name, value in module._buffers.items() if value is not None]:
            value = weights.get(f"{prefix}.{name}".lstrip("."))
            if value is not None:
                module._buffers[name] = value
    if state.record["extra"]:
        layer.load_state_dict(state.record["extra"], strict=False)


def _let_train(layer: ALLayer, state: LayerState) -> None:
    """Lets exactly those weights require a gradient that the optimizer of the layer has, to build a new one."""
    names = {name for saved in state.record["optimizers"].values() for name in saved["state"]}
    for name, weight in layer.named_parameters():
        weight.requires_grad_(name in names)


@torch.no_grad()
def restore(state: StageState, moved: Moved) -> None:
    """Restores a stage whose optimizer, LR schedule, report and copies of decoders are new."""
    records = {index: each.record for index, each in moved.layers.items()}
    tensors = {(index, kind): named for index, each in moved.layers.items() for kind, named in each.tensors.items()}
    if state.optimizer is not None:
        optimizers.restore(state, optimizers.states_of(state, records, tensors))
    if state.lr_scheduler is not None:
        state.lr_scheduler.load_state_dict(optimizers.schedule_of(state, records, tensors))
    for index, layer in state.layers:
        masters = tensors[index, _MASTERS]
        for name, weight in layer.named_parameters():
            weight.requires_grad_(records[index]["requires_grad"][name])
            if (master := master_here(weight)) is not None and master is not masters[name]:
                master.copy_(masters[name])
        if (scale := state.scales.get(index)) is not None:
            scale.restore(records[index]["loss_scale"])
    training = {index: tensors[index, optimizers.TRAINING] for index in records}
    restore_losses(state, training)
    if state.decoder_copies is not None:
        decoders = moved.decoders | {index: _copy_of_decoder(own) for index, own in training.items()}
        for index in range(len(state.decoder_copies)):
            state.decoder_copies.restore(index, decoders[index])
