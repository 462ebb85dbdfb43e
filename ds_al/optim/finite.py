"""Check that the numbers of a stage are finite, before a layer steps on them.

    forward     the outputs of f and g, before they leave for the next layer
    backward    both losses and the gradients, before the step
    weights     in every :data:`BEHIND`-th micro-batch, before the step, and before every save: one that is not finite
                mostly shows in an output, a loss or a gradient at once

On a CPU a number that is not finite raises there, so that no step is applied; with ``"non_finite": "skip"`` and
``"save_and_stop"`` the step of that layer alone is left out (:mod:`ds_al.optim.skip`, :mod:`ds_al.optim.stop`). On a
GPU the host does not wait: the maximum norms of a micro-batch are copied to it, and are read as soon as they have
arrived, at the latest :data:`BEHIND` micro-batches later; :meth:`FiniteCheck.settle`, which every save calls, looks at
all weights, and waits for all norms.

A sum, the cheapest pass over the numbers of a tensor on a CPU, is infinite or NaN where one of them is. It may also
overflow, so the numbers themselves are then looked at. A maximum norm cannot overflow.
"""

from __future__ import annotations

import cmath
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ds_al.config.base import BLOCK
from ds_al.errors import ALConfigError, ALLayerError
from ds_al.layer import ALLayer
from ds_al.optim.masters import stepped
from ds_al.tensors import Activation, HostCopy

BEHIND = 8
"""Micro-batches between two looks at the weights, and, on a GPU, whose norms may be on their way to the host before it
waits for the oldest ones."""

_MASKS = "another part of the output"
"""May hold infinite numbers, as an additive attention mask does, but no NaN."""


class _Place(NamedTuple):
    """What a number belongs to, for errors."""

    layer: int
    function: str
    what: str


class _Weight(NamedTuple):
    parameter: nn.Parameter
    stepped: nn.Parameter
    """Holds the gradient: the weight, or its fp32 master."""
    place: _Place
    gradient: _Place


class FiniteCheck:
    """Checks the numbers of one stage's layers.

    Args:
        layers: ``(index in the network, layer)``.
        stage_id: index of the stage, for errors.
        device: device of the layers.
        scaled: indices of the layers whose gradients their loss scale checks, and skips a step on overflow; with
            ``skips`` of all.
        skips: whether an output or a loss that is not finite leaves out the layer's step, and raises no error. A weight
            always does, since no step would mend it.
        found: with ``skips``: called with micro-batch, layer and description of every number that is not finite, those
            of gradients included.

    Raises:
        ALConfigError: ``skips`` on a GPU.
    """

    def __init__(
        self,
        layers: Sequence[tuple[int, ALLayer]],
        *,
        stage_id: int,
        device: torch.device,
        scaled: Collection[int] = (),
        skips: bool = False,
        found: Callable[[int, int, str], None] | None = None,
    ) -> None:
        if skips and device.type == "cuda":
            policy = "skip" if found is None else "save_and_stop"
            raise ALConfigError(
                f'"{BLOCK}.non_finite": got "{policy}" on a GPU, whose host reads '
                'numbers after the step: use "raise", or "fp16", whose loss scale skips steps'
            )
        self._layers, self._stage_id, self._skips, self._found = dict(layers), stage_id, skips, found
        self._scaled = scaled if found is None else ()
        self._bad: set[int] = set()  # layers whose present micro-batch is left out
        self._micro_batch = 0  # the last one, for errors of :meth:`settle`
        self._waits = device.type != "cuda"
        self._weights = {index: _weights(index, layer) for index, layer in layers}
        self._places_of_losses = {index: [_Place(index, *of) for of in _LOSSES] for index, _ in layers}
        self._places_of_outputs = {
            index: [(_Place(index, f, f"the output of {f}"), _Place(index, f, _MASKS)) for f in ("f", "g")]
            for index, _ in layers
        }
        self._norms: list[Tensor] = []
        self._places: list[_Place] = []
        self._on_their_way: deque[tuple[HostCopy, list[_Place], int]] = deque()

    @torch.no_grad()
    def outputs(self, index: int, s: Activation, t: Activation, *, micro_batch: int) -> None:
        """Checks the outputs of a layer's f and g.

        Raises:
            ALLayerError: a number is not finite.
        """
        self._check(self._outputs(index, s, t), micro_batch)

    @torch.no_grad()
    def before_step(
        self, index: int, losses: Sequence[Tensor], *, micro_batch: int, buffers: Sequence[Tensor] = ()
    ) -> None:
        """Checks the losses of a layer, the gradients that are accumulated so far, and at times its weights.

        A micro-batch that is left out makes the gradients NaN, by which the layer does not step, and leaves its buffers
        as they were.

        Args:
            buffers: what :meth:`buffers` returned before the forward.

        Raises:
            ALLayerError: a number is not finite.
        """
        self._micro_batch = micro_batch
        self._check(self._of_step(index, losses), micro_batch)
        if micro_batch % BEHIND == 0:
            self._check(self._of_weights(index), micro_batch)
        if index not in self._bad:
            return
        self._bad.remove(index)
        for weight in self._weights[index]:
            if (gradient := weight.stepped.grad) is not None:
                (gradient._values() if gradient.is_sparse else gradient).fill_(math.nan)
        for buffer, before in zip(self._layers[index].buffers(), buffers, strict=True):
            buffer.copy_(before)

    def buffers(self, layer: ALLayer) -> list[Tensor]:
        """Returns copies of a layer's buffers, where a micro-batch may be left out."""
        return [buffer.clone() for buffer in layer.buffers()] if self._skips else []

    def after_backward(self, *, micro_batch: int) -> None:
        """Ends a micro-batch: on a GPU sends its norms to the host, and reads those that have arrived.

        Raises:
            ALLayerError: a number of an earlier micro-batch was not finite.
        """
        self._send(micro_batch)
        self._read(waiting=BEHIND)

    @torch.no_grad()
    def settle(self) -> None:
        """Looks at all weights, and waits for all numbers.

        Raises:
            ALLayerError: one of them is not finite.
        """
        for index in self._layers:
            self._check(self._of_weights(index), self._micro_batch)
        self._send(self._micro_batch)
        self._read(waiting=0)

    def _send(self, micro_batch: int) -> None:
        if self._norms:
            self._on_their_way.append((HostCopy(torch.cat(self._norms)), self._places, micro_batch))
            self._norms, self._places = [], []

    def _read(self, *, waiting: int) -> None:
        while self._on_their_way and (len(self._on_their_way) > waiting or self._on_their_way[0][0].is_there()):
            copy, places, micro_batch = self._on_their_way.popleft()
            for place, norm in zip(places, copy.wait().tolist(), strict=True):
                if math.isnan(norm) or (math.isinf(norm) and place.what != _MASKS):
                    self._blame(place, norm, micro_batch)

    def _outputs(self, index: int, s: Activation, t: Activation) -> Iterator[tuple[_Place, Tensor]]:
        for (output, rest), value in zip(self._places_of_outputs[index], (s, t), strict=True):
            if isinstance(value, Tensor):
                value = (value,)
            for number, part in enumerate(value):
                if part.is_floating_point() and part.numel():
                    yield (rest if number else output), part

    def _of_step(self, index: int, losses: Sequence[Tensor]) -> list[tuple[_Place, Tensor]]:
        # The first stages of a group compute no losses.
        numbers = list(zip(self._places_of_losses[index], losses, strict=True)) if losses else []
        if index not in self._scaled:
            for weight in self._weights[index]:
                gradient = weight.stepped.grad
                if gradient is None or not weight.parameter.requires_grad:
                    continue
                values = gradient._values() if gradient.is_sparse else gradient
                if values.numel():  # a sparse one of a micro-batch without entries has none, and no maximum norm
                    numbers.append((weight.gradient, values))
        return numbers

    def _of_weights(self, index: int) -> list[tuple[_Place, Tensor]]:
        weights = self._weights[index]
        return [(weight.place, weight.parameter) for weight in weights if weight.parameter.requires_grad]

    def _check(self, numbers: Iterable[tuple[_Place, Tensor]], micro_batch: int) -> None:
        if self._waits:
            for place, value in numbers:
                if not cmath.isfinite(value.sum().item()):
                    self._look_again(place, value, micro_batch)
            return
        by_kind: dict[torch.dtype, list[Tensor]] = {}  # one kernel for all tensors of a kind
        places: dict[torch.dtype, list[_Place]] = {}
        for place, value in numbers:
            by_kind.setdefault(value.dtype, []).append(value)
            places.setdefault(value.dtype, []).append(place)
        for kind, values in by_kind.items():
            self._norms.append(torch.stack(torch._foreach_norm(values, math.inf)).float())
            self._places += places[kind]

    def _look_again(self, place: _Place, value: Tensor, micro_batch: int) -> None:
        """Raises where a number is not finite; blames a weight of the layer that is not finite either."""
        if (bad := not_finite(value, masks=place.what == _MASKS)) is None:
            return
        for weight in sorted(self._weights[place.layer], key=lambda weight: weight.place.function != place.function):
            if (worse := not_finite(weight.parameter)) is not None:
                self._blame(weight.place, worse, micro_batch)
        if not self._skips:
            self._blame(place, bad, micro_batch)
        if self._found is not None:
            self._found(micro_batch, place.layer, self._text(place, bad, micro_batch))
        if not place.what.startswith(_GRADIENT):  # on which the layer's own LayerSkip decides
            self._bad.add(place.layer)

    def _blame(self, place: _Place, value: float, micro_batch: int) -> NoReturn:
        raise ALLayerError(self._text(place, value, micro_batch))

    def _text(self, place: _Place, value: float, micro_batch: int) -> str:
        return (
            f"stage {self._stage_id}, {self._layers[place.layer].label}, micro-batch {micro_batch}, function "
            f"{place.function}: {place.what} {'is' if place.what.endswith('loss') else 'holds'} {value}: lower the "
            'learning rate or set "layer_gradient_clipping"'
        )


_GRADIENT = "the gradient of"
_LOSSES = (("b", "the associated loss"), ("h", "the autoencoder loss"))


def _weights(index: int, layer: ALLayer) -> list[_Weight]:
    found = []
    for name, parameter in layer.named_parameters():
        if parameter.numel():
            function = name.partition(".")[0]
            place, gradient = (_Place(index, function, f"{what} {name}") for what in ("weight", _GRADIENT))
            found.append(_Weight(parameter, stepped(parameter), place, gradient))
    return found


def not_finite(value: Tensor, *, masks: bool = False) -> float | None:
    """Returns the first number of a tensor that is NaN or infinite (with ``masks``: NaN), ``None`` without one."""
    if cmath.isfinite(value.sum().item()):
        return None
    bad = value[torch.isnan(value) if masks else ~torch.isfinite(value)]
    return bad[0].item() if len(bad) else None
